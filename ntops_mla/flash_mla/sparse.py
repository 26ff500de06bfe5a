"""flash_mla_sparse_fwd, FlashMLA's sparse prefill, and what sparse decode shares with it."""

from __future__ import annotations

import torch

from ntops_mla.flash_mla import _arguments
from ntops_mla.ops import _check, mla_sparse

_NO_KEY = float("-inf")


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend, each query token over the keys that its indices name, whose first d_v columns are the value.

    s[j] = sm_scale q . kv[indices[j]];  max_logits = max s;  lse = log sum exp(s);  out = softmax(s) kv[indices, :d_v];
    with attn_sink: out exp(lse) / (exp(lse) + exp(attn_sink))

    q: `[s_q, H, 576]`. kv: `[s_kv, 1, 576]`. indices: int32 `[s_q, 1, topk]`; below 0 or from s_kv on: no key, and
    nothing is read; one that is named twice counts twice. d_v: 512 (q and kv of 288 columns and 256 work too; other
    widths in PyTorch). attn_sink: float32 `[H]`, -inf without effect, +inf makes out 0; lse and max_logits are without
    it. topk_length: int32 `[s_q]`, only as many of a token's first indices count. Any strides, any H, s_q and topk.

    Returns out `[s_q, H, 512]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch), max_logits and lse
    float32 `[s_q, H]`, natural logarithm (FlashMLA's README still says base 2, its kernels and tests do not). A row
    without keys: out 0, max_logits -inf, lse +inf. Nothing ever requires grad. Raises TypeError or ValueError that
    names the argument, NotImplementedError for q of 512 columns. Source: deepseek-ai/FlashMLA, flash_mla_interface.py
    and tests/ref.py.
    """
    op = "flash_mla_sparse_fwd"
    _check.tensor(op, "q", q, "[s_q, H, 576]", 3)
    _check.dtype(op, "q", q)
    _arguments.columns(op, q, "d_v", d_v)
    _check.tensor(op, "kv", kv, f"[s_kv, 1, {q.shape[2]}]", 3)
    for dim, expected in ((1, 1), (2, q.shape[2])):
        _check.size(op, "kv", kv, dim, expected, f"[s_kv, 1, {q.shape[2]}]")
    _check.same(op, "q", q, ("kv", kv))
    lengths = "topk_length", topk_length
    _arguments.indices(op, q, ("indices", indices), lengths, (q.shape[0], 1), "[s_q, 1, topk]")
    sm_scale = _arguments.number(op, "sm_scale", sm_scale)
    _arguments.sink(op, q, q.shape[1], attn_sink)
    with torch.no_grad():
        # Each key a page of its own: its address is an int64 product.
        out, lse, max_logits = mla_sparse(
            q[None, ..., :d_v],
            q[None, ..., d_v:],
            kv[..., :d_v],
            kv[..., d_v:],
            indices.transpose(0, 1),
            sm_scale,
            None if topk_length is None else topk_length[None],
            want_max=True,
        )
        out = with_sink(out, lse, attn_sink)
        return out[0], max_logits[0], infinite(lse)[0]


def with_sink(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None) -> torch.Tensor:
    """out `[..., H, C]`, ours to change, times exp(lse) / (exp(lse) + exp(attn_sink)); lse `[..., H]`."""
    if attn_sink is None:
        return out
    # Where there is no key, out is 0 already, and -inf - -inf would make it NaN.
    share = torch.where(lse == _NO_KEY, 0.0, torch.sigmoid(lse - attn_sink))
    return out.mul_(share[..., None])


def infinite(lse: torch.Tensor) -> torch.Tensor:
    """lse, changed in place, with FlashMLA's +inf where a row has no key: ops say -inf, so that parts merge."""
    return lse.masked_fill_(lse == _NO_KEY, float("inf"))
