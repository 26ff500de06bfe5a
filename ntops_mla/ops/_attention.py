"""Attention with its log-sum-exp in PyTorch, never holding all scores at once: the ground of both references."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Elements of a score matrix.
_SCORE_ELEMENTS = 16 << 20
# For two-byte inputs PyTorch's CPU kernel sums exponentials of 13 bits: its lse is off by up to 1.04e-4 whatever its
# size. From here on that is less than 2^-15 of it; below are mostly the rows that see a few dozen keys.
_SMALL_LSE = 3.4


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    exact_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T + mask) v -> (out `[B, H, Lq, Dv]` of q's dtype, lse `[B, H, Lq]`, natural log, in float32 or
    float64).

    q `[B, H, Lq, D]`, k `[B, H, Lk, D]`, v `[B, H, Lk, Dv]`, Lq and Lk at least 1 (PyTorch's CPU kernel divides by
    them); mask additive, broadcast to `[B, H, Lq, Lk]`; causal: square, row i sees the first i + 1 keys. A row without
    any visible key gives NaN: the caller replaces it. exact_lse False: small ones are left as PyTorch's kernel gives
    them, where nobody reads the lse or the caller mends it.
    """
    if q.device.type == "cpu":
        # The kernel behind scaled_dot_product_attention, which has the lse and wants one width for all three. Zero
        # columns change no product, and even padding by a copy is 1.7-1.9 times faster than the unfused path that
        # unequal widths take.
        width = max(q.shape[-1], v.shape[-1])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            widen(q, width), widen(k, width), _over(v, width), 0.0, causal, attn_mask=mask, scale=scale
        )
        lse = lse if lse.dtype == torch.float64 else lse.float()
        if exact_lse and may_be_inexact(lse, q):
            sharpen(lse, q, k, scale, mask, causal)
        return out[..., : v.shape[-1]], lse
    return _attend_by_rows(q, k, v, scale, mask, causal)


def may_be_inexact(lse: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether there may be small ones in the lse of these queries, which are not exact as the kernel gives them."""
    if q.device.type != "cpu" or q.element_size() != 2:
        return False
    low, high = lse.aminmax()  # NaN if one is: then there may be
    return not (low >= _SMALL_LSE or high <= -_SMALL_LSE)


def is_small(lse: torch.Tensor) -> torch.Tensor:
    """Where the kernel's lse is not exact: not in a row without keys, whose lse is NaN or -inf."""
    return lse.abs() < _SMALL_LSE


def sharpen(
    lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool = False
) -> None:
    """Compute the small ones of `attend`'s lse `[B, H, Lq]` anew, in place."""
    small = is_small(lse)
    if not small.any():
        return
    batches, rows = small.any(1).any(1).nonzero()[:, 0], small.any(1).any(0).nonzero()[:, 0]
    keys = min(k.shape[2], int(rows[-1]) + 1) if causal else k.shape[2]
    # [b, H, D, keys] of the requests concerned
    kt = k.index_select(0, batches)[:, :, :keys].float().transpose(-1, -2)
    step = max(1, _SCORE_ELEMENTS // (len(batches) * q.shape[1] * keys))
    for some in rows.split(step):
        scores = torch.matmul(q.index_select(0, batches).index_select(2, some).float(), kt) * scale
        if mask is not None:
            of = mask if mask.shape[0] == 1 else mask.index_select(0, batches)
            scores += (of if of.shape[2] == 1 else of.index_select(2, some))[..., :keys]
        if causal:
            scores.masked_fill_(torch.arange(keys) > some[:, None], float("-inf"))
        place = (batches[:, None], slice(None), some[None, :])
        # [b, some, H]: the indexed dimensions come first
        exact, old = scores.logsumexp(-1).transpose(1, 2), lse[place]
        lse[place] = torch.where(small[place], exact, old)


def lse_in_float32(q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor) -> torch.Tensor:
    """All of `attend`'s lse by products in float32; mask `[B, 1, 1 or Lq, Lk]`."""
    kt = k.float().transpose(-1, -2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    step = max(1, _SCORE_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        block = slice(start, start + step)
        scores = torch.matmul(q[:, :, block].float(), kt).mul_(scale)
        lse[:, :, block] = scores.add_(mask if mask.shape[2] == 1 else mask[:, :, block]).logsumexp(-1)
    return lse


def _attend_by_rows(q, k, v, scale, mask, causal):
    """The same from matrix products, a block of rows at a time, where no fused kernel returns the lse."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Keys that are the values too are widened once. [B, H, D, Lk], [B, H, Lk, Dv]
    same = v is k
    k = k.to(wide)
    kt, v = k.transpose(-1, -2), k if same else v.to(wide)
    batch, heads, rows, _ = q.shape
    keys = k.shape[-2]
    out = torch.empty(batch, heads, rows, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=wide, device=q.device)
    step = max(1, _SCORE_ELEMENTS // (batch * heads * keys))
    position = torch.arange(keys, device=q.device)
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        scores = torch.matmul(q[:, :, block].to(wide), kt) * scale
        if mask is not None:
            scores += mask if mask.shape[-2] == 1 else mask[..., block, :]
        if causal:
            hidden = position[None, :] > torch.arange(block.start, block.stop, device=q.device)[:, None]
            scores.masked_fill_(hidden, float("-inf"))
        total = torch.logsumexp(scores, -1)
        out[:, :, block] = torch.matmul(scores.sub_(total[..., None]).exp_(), v)
        lse[:, :, block] = total
    return out, lse


def _over(v: torch.Tensor, width: int) -> torch.Tensor:
    """`v` `[..., Dv]` with any columns up to `width`: what lies behind its own, where its storage has so much, for they
    meet no column of the result but their own."""
    if v.shape[-1] == width:
        return v
    end = v.storage_offset() + sum((n - 1) * stride for n, stride in zip(v.shape[:-1], v.stride())) + width
    if v.stride(-1) != 1 or end * v.element_size() > v.untyped_storage().nbytes():
        return widen(v, width)
    return v.as_strided((*v.shape[:-1], width), v.stride())


def widen(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x` `[..., D]` with zero columns up to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the union of two disjoint sets of keys: out `[..., D]` and lse `[...]` of each -> of both, in lse's
    dtype.

    lse' = log(exp(lse_a) + exp(lse_b)), out' = out_a exp(lse_a - lse') + out_b exp(lse_b - lse'). An lse of -inf merges
    as nothing; both -inf give out 0 and lse -inf. Source: arXiv 2205.14135, section 3.1.
    """
    total = torch.logaddexp(lse, other_lse)
    empty = total == float("-inf")
    weight = torch.where(empty, 0.0, (lse - total).exp())[..., None]
    other_weight = torch.where(empty, 0.0, (other_lse - total).exp())[..., None]
    return out * weight + other * other_weight, total
