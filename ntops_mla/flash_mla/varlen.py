"""flash_attn_varlen_func: FlashMLA's attention over packed requests, by mla_prefill."""

from __future__ import annotations

import torch

from ntops_mla.flash_mla import _arguments
from ntops_mla.ops import _check, mla_prefill


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each request of a packed batch, every head with its own keys and values; forward only.

    out[t, h] = softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h];  lse[t, h] = log sum_j exp(softmax_scale q[t, h] .
    k[j, h])

    q: `[T, H, 192]`. k: `[Tk, Hk, 192]`, v: `[Tk, Hk, 128]`, Hk dividing H: head h reads k and v of h // (H / Hk), and
    fewer than H are copied out to H. Other widths run in PyTorch. cu_seqlens_qo, cu_seqlens_kv: int32 `[B + 1]`, rising
    from 0 to T and Tk. max_seqlen_qo, max_seqlen_kv: at least the longest request; only what needs no look at the
    device is checked of them. dropout_p: 0. softmax_scale: None, 1 / sqrt(192). causal: the diagonal is aligned at the
    end of each request. deterministic: False (every run repeats bit for bit anyway). is_varlen: False says that all
    requests are of one length; the cu_seqlens are read all the same.

    Returns out `[T, H, 128]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[T, H]`,
    natural logarithm, T contiguous. A row that sees no key: out 0, lse -inf: here FlashMLA says -inf, other than in
    `flash_mla_with_kvcache`. Raises TypeError or ValueError that names the argument, NotImplementedError for dropout,
    for deterministic, and for an input that requires grad in grad mode. Source: deepseek-ai/FlashMLA,
    flash_mla_interface.py.
    """
    op = "flash_attn_varlen_func"
    _check.number(op, "dropout_p", dropout_p)
    for name, value in (("causal", causal), ("deterministic", deterministic), ("is_varlen", is_varlen)):
        _check.flag(op, name, value)
    if dropout_p != 0:
        raise NotImplementedError(f"{op}: dropout_p: dropout is not implemented, FlashMLA has none either: pass 0")
    if deterministic:
        raise NotImplementedError(
            f"{op}: deterministic concerns the backward pass, which is not implemented; the forward pass repeats bit "
            "for bit without it: pass False"
        )
    _check_prefill(op, q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    for name, value, rows, total in (
        ("max_seqlen_qo", max_seqlen_qo, "q", q.shape[0]),
        ("max_seqlen_kv", max_seqlen_kv, "k", k.shape[0]),
    ):
        _check_longest(op, name, value, rows, total, cu_seqlens_qo.shape[0] - 1, is_varlen)
    scale = _arguments.scale(op, softmax_scale, q)
    if torch.is_grad_enabled():
        for name, value in (("q", q), ("k", k), ("v", v)):
            if value.requires_grad:
                raise NotImplementedError(
                    f"{op}: {name} requires grad, but only the forward pass is implemented: call it under "
                    "torch.no_grad() or with detached tensors"
                )
    if k.shape[1] != q.shape[1]:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    try:
        out, lse = mla_prefill(q, k, v, cu_seqlens_qo, cu_seqlens_kv, scale, causal)
    except ValueError as error:
        names = {"cu_seqlens_q ": "cu_seqlens_qo ", "cu_seqlens_k ": "cu_seqlens_kv "}
        raise _arguments.renamed(error, "mla_prefill", op, names) from error
    return out, lse.T


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each request, as `flash_attn_varlen_func` does, queries, keys and values in one tensor.

    q, k, v = qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 head_dim_qk], qkv[..., 2 head_dim_qk :]

    qkv: `[T, H, 2 * 192 + 128]`. cu_seqlens: int32 `[B + 1]`. The rest, what is returned and raised:
    `flash_attn_varlen_func`, which errors name.
    """
    _packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, "[T, H, 2 * 192 + 128]", 2, head_dim_qk)
    return flash_attn_varlen_func(
        *(qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 * head_dim_qk], qkv[..., 2 * head_dim_qk :]),
        *(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_qo: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each request, as `flash_attn_varlen_func` does, keys and values in one tensor.

    k, v = kv[..., :head_dim_qk], kv[..., head_dim_qk:]

    q: `[T, H, 192]`. kv: `[Tk, Hk, 192 + 128]`. The rest, what is returned and raised: `flash_attn_varlen_func`, which
    errors name.
    """
    _packed("flash_attn_varlen_kvpacked_func", "kv", kv, "[Tk, Hk, 192 + 128]", 1, head_dim_qk)
    return flash_attn_varlen_func(
        *(q, kv[..., :head_dim_qk], kv[..., head_dim_qk:]),
        *(cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )


def _packed(op, name, value, shape, before, head_dim_qk):
    """`before` times head_dim_qk columns come before the value's."""
    _check.tensor(op, name, value, shape, 3)
    _check.count(op, "head_dim_qk", head_dim_qk, 1)
    if before * head_dim_qk >= value.shape[2]:
        raise ValueError(
            f"{op}: head_dim_qk must leave columns for the value, got {head_dim_qk} for {name} of {value.shape[2]} "
            "columns"
        )


def _check_prefill(op, q, k, v, cu_seqlens_qo, cu_seqlens_kv):
    _check.tensor(op, "q", q, "[T, H, 192]", 3)
    _check.dtype(op, "q", q)
    _check.tensor(op, "k", k, "[Tk, Hk, 192]", 3)
    _check.size(op, "k", k, 2, q.shape[2], "[Tk, Hk, 192]")
    if k.shape[1] != q.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0):
        raise ValueError(
            f"{op}: k must be [Tk, Hk, {q.shape[2]}] with Hk dividing q's {q.shape[1]} heads, got shape {list(k.shape)}"
        )
    _check.tensor(op, "v", v, "[Tk, Hk, 128]", 3)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v must be [Tk, Hk, 128] with k's {list(k.shape[:2])}, got shape {list(v.shape)}")
    _check.same(op, "q", q, ("k", k), ("v", v))
    _check.cu_seqlens(op, q, ("cu_seqlens_qo", cu_seqlens_qo), ("cu_seqlens_kv", cu_seqlens_kv))


def _check_longest(op, name, longest, rows, total, batch, is_varlen):
    """What can be said of max_seqlen without the lengths, which lie on the device."""
    _check.count(op, name, longest, 0)
    if longest * batch < total:
        raise ValueError(
            f"{op}: {name} must be at least the longest request, got {longest} for {batch} requests and "
            f"{total} rows of {rows}"
        )
    if not is_varlen and total % max(batch, 1) != 0:
        raise ValueError(
            f"{op}: is_varlen must be True where requests differ in length, got False for {batch} requests and "
            f"{total} rows of {rows}"
        )
