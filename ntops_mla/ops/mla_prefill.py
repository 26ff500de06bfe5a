"""mla_prefill: expanded (multi-head) attention of whole prompts, packed without padding."""

from __future__ import annotations

import functools
import itertools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel, within_int32
from ntops_mla.ops import _check
from ntops_mla.ops._attention import attend
from ntops_mla.ops._op import register
from ntops_mla.platform import Platform

# (query/key columns, value columns) that the kernel is written for.
_HEAD_SIZES = ((192, 128), (256, 256))

# Rows of a request with a past that share one mask of this many rows by the keys that the last of them sees: fewer rows
# waste less work above the diagonal, more rows give longer products. Measured with 16 heads, milliseconds in blocks of
# 128, 256 and 512 rows: 512 on a past of 2048 take 30.5, 22.0, 17.8; 2048 on 512 77, 63, 54; 512 on 64 3.4, 3.8, 3.7.
_MASKED_ROWS = 512
_LEAST_MASKED_ROWS = 128
# Elements of a mask from which on it has fewer rows.
_MASK_ELEMENTS = 8 << 20


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    want_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each request of a packed batch, every head with its own keys and values.

    out[t, h] = softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h];  lse[h, t] = log sum_j exp(softmax_scale q[t, h] .
    k[j, h])

    q: `[T, H, Dqk]`. k: `[Tk, H, Dqk]`. v: `[Tk, H, Dv]` (192 and 128 in DeepSeek's models, 256 and 256 in GLM's), any
    strides. cu_seqlens_q, cu_seqlens_k: int32 `[B + 1]`, rising from 0 to T and Tk (PyTorch checks it; a kernel leaves
    rows of no request unwritten). Causal: the diagonal is aligned at the end of each request, row i of n sees the first
    n_k - n + 1 + i keys.

    Returns out `[T, H, Dv]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[H, T]`,
    natural logarithm; `[0]` where want_lse is False. A row that sees no key: out 0, lse -inf. Raises TypeError or
    ValueError that names the argument. Source: arXiv 2405.04434, section 2.1.2; Dao-AILab/flash-attention
    flash_attn_varlen_func.
    """
    return torch.ops.ntops_mla.mla_prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse)


def _check_args(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    op = "mla_prefill"
    _check.tensor(op, "q", q, "[T, H, Dqk]", 3)
    _check.dtype(op, "q", q)
    _check.tensor(op, "k", k, "[Tk, H, Dqk]", 3)
    if k.shape[1:] != q.shape[1:]:
        raise ValueError(f"{op}: k must be [Tk, H, Dqk] with q's {list(q.shape[1:])}, got shape {list(k.shape)}")
    _check.tensor(op, "v", v, "[Tk, H, Dv]", 3)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: v must be [Tk, H, Dv] with k's {list(k.shape[:2])}, got shape {list(v.shape)}")
    _check.same(op, "q", q, ("k", k), ("v", v))
    _check.cu_seqlens(op, q, ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    _check.number(op, "softmax_scale", softmax_scale)
    _check.flag(op, "causal", causal)
    _check.flag(op, "want_lse", want_lse)


def _bounds(name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"mla_prefill: {name} must rise from 0 to {total}, got {bounds}")
    return bounds


def _look(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    _bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    _bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])


def _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    starts = _bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    key_starts = _bounds("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]) if want_lse else 0, dtype=torch.float32, device=q.device)
    if q.shape[1] == 0:  # PyTorch's CPU kernel divides by the number of heads
        return out, lse
    # [1, H, tokens, D]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    for b in range(len(starts) - 1):
        key = key_starts[b]
        past = key_starts[b + 1] - key - (starts[b + 1] - starts[b])
        for start, end, seen, mode in _blocks(starts[b], starts[b + 1], key_starts[b + 1] - key, past, causal):
            if mode == "blind":
                part, part_lse = out.new_zeros(()), lse.new_tensor(float("-inf"))
            else:
                keys = slice(key, key + seen)
                mask = _diagonal(end - start, seen, q) if mode == "mask" else None
                some = q[:, :, start:end], k[:, :, keys], v[:, :, keys]
                part, part_lse = attend(*some, softmax_scale, mask, mode == "square", exact_lse=want_lse)
                part, part_lse = part[0].transpose(0, 1), part_lse[0]
            out[start:end] = part
            if want_lse:
                lse[:, start:end] = part_lse
    return out, lse


def _blocks(start: int, end: int, keys: int, past: int, causal: bool):
    """(first row, end row, keys seen, blind | full | square | mask) of the calls that cover a request's rows."""
    blind = end if keys == 0 else start - min(past, 0) if causal else start
    if blind > start:  # rows above the diagonal, or of a request without keys
        yield start, blind, 0, "blind"
    if blind == end:
        return
    if not causal:
        yield start, end, keys, "full"
    elif past <= 0:
        yield blind, end, keys, "square"
    else:
        rows = max(_LEAST_MASKED_ROWS, min(_MASKED_ROWS, _MASK_ELEMENTS // keys))
        for row in range(start, end, rows):
            stop = min(row + rows, end)
            # One row sees exactly the keys up to itself.
            yield row, stop, past + stop - start, "full" if stop - row == 1 else "mask"


def _diagonal(rows: int, keys: int, like: torch.Tensor) -> torch.Tensor:
    """Additive `[1, 1, rows, keys]` mask whose diagonal ends in the last corner."""
    hidden = torch.full((1, 1, rows, keys), float("-inf"), dtype=like.dtype, device=like.device)
    return hidden.triu_(keys - rows + 1)


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    return out, torch.empty((q.shape[1], q.shape[0]) if want_lse else 0, dtype=torch.float32, device=q.device)


def _key(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    return (q.dtype,), (q.shape[2], v.shape[2], q.shape[1], causal)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    if sizes[:2] not in _HEAD_SIZES:
        allowed = " or ".join(f"{d} / {v}" for d, v in _HEAD_SIZES)
        return f"expanded heads of {sizes[0]} / {sizes[1]} columns; the kernel takes {allowed}"
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    tile = board.tile("mla_prefill", dtypes[0], width=sizes[0])
    return [Needed("mla_prefill", tile, (tile.blocks["block_m"], tile.blocks["block_n"]) if tile else ())]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, width: int, v_width: int) -> tuple[Kernel, int, int]:
    """The kernel and its tile's rows and keys."""
    tile = board.tile("mla_prefill", dtype, width=width)
    kernel = board.make("mla_prefill", tile, qk_width=width, v_width=v_width)
    return kernel, tile.blocks["block_m"], tile.blocks["block_n"]


def _kernel(board: Board, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, want_lse):
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if out.numel():
        q, k, v = (within_int32(x, 1, 2) for x in (q, k, v))
        launch, block_m, block_n = _made(board, q.dtype, q.shape[2], v.shape[2])
        launch(q, q, k, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, block_n, out, lse, block_m)
    return out, lse if want_lse else lse.new_empty(0)


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, heads=16, rope=64, nope=128, v=128, **_):
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    return (
        torch.randn(tokens, heads, nope + rope, device=device, dtype=dtype),
        torch.randn(tokens, heads, nope + rope, device=device, dtype=dtype),
        torch.randn(tokens, heads, v, device=device, dtype=dtype),
        cu_seqlens,
        cu_seqlens.clone(),
        (nope + rope) ** -0.5,
        True,
        True,
    )


mla_prefill = register(
    mla_prefill,
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, "
        "bool causal=True, bool want_lse=True) -> (Tensor, Tensor)"
    ),
    check=_check_args,
    look=_look,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
)
