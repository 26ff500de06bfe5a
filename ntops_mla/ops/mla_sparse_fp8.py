"""mla_sparse_fp8: mla_sparse over FlashMLA's fp8 cache of 656 bytes a token."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board
from ntops_mla.kernel import within_int32
from ntops_mla.ops import _check
from ntops_mla.ops._fp8 import LATENT, ROPE, TOKEN_BYTES
from ntops_mla.ops._op import register
from ntops_mla.ops._rows import rows_of_bytes
from ntops_mla.ops._split import Made, make, needed, plan
from ntops_mla.ops.mla_decode import check_numbers
from ntops_mla.ops.mla_decode_fp8 import check_fp8, example_cache, split_views
from ntops_mla.ops.mla_sparse import (
    SPLIT_KEYS,
    attend_lists,
    check_lists,
    counts,
    example_lists,
    launch_lists,
    results,
)
from ntops_mla.platform import Platform, Tile


def mla_sparse_fp8(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    num_splits: int | None = None,
    want_max: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as mla_sparse does, over latents of one byte a column, which are dequantised where they are read.

    kv[i, c] = scale[i, c // 128] code[i, c];  s[j] = softmax_scale (q_nope . kv[i_j] + q_pe . pe[i_j]);
    out = softmax(s) kv;  lse = log sum exp(s);  max_logits = max(s)

    q_nope: `[B, s_q, H, 512]`, already absorbed. q_pe: `[B, s_q, H, 64]`. cache: `[pages, page_size, 656]`, uint8 or
    float8_e4m3fn: of each token 512 codes (float8_e4m3fn), 4 scales (float32, any) and 64 rope columns (bfloat16); a
    page's tokens are adjacent, its pages, of any size, may be further apart. indices: int32 `[B, s_q, topk]`, page *
    page_size + slot; one below 0 or past the last page is no key, one that occurs twice counts twice. topk_length:
    int32 `[B, s_q]`, how many of the indices count, from the first on (below 0: none; above topk: all), or None: all.
    What no index names is never read. num_splits: parts a token's indices are cut into, None: chosen. want_max: whether
    max_logits is wanted.

    Returns out `[B, s_q, H, 512]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch), lse and max_logits
    float32 `[B, s_q, H]`, natural logarithm; max_logits is empty, `[0]`, unless it is wanted. A token without keys: out
    0, lse and max_logits -inf. Raises TypeError or ValueError that names the argument. Source: deepseek-ai/FlashMLA
    flash_mla_with_kvcache(is_fp8_kvcache=True, indices=...), README.md and tests/quant.py; arXiv 2512.02556, section
    2.1.
    """
    return torch.ops.ntops_mla.mla_sparse_fp8(
        q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max
    )


def _check_args(q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max):
    op = "mla_sparse_fp8"
    check_fp8(op, q_nope, q_pe, cache)
    check_lists(op, q_nope, indices, topk_length)
    check_numbers(op, softmax_scale, num_splits)
    _check.flag(op, "want_max", want_max)


def _reference(q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max):
    rows = rows_of_bytes(cache, q_nope.dtype)
    return attend_lists(rows, q_nope, q_pe, indices, softmax_scale, topk_length, want_max)


def _fake(q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max):
    return results(q_nope, want_max)


def _key(q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max):
    return (q_nope.dtype,), (q_nope.shape[2],)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return needed(board, "mla_sparse_fp8", _tile(board, dtypes[0], sizes[0]), dtypes[0], LATENT)


def _tile(board: Board, dtype: torch.dtype, heads: int) -> Tile | None:
    return board.tile("mla_sparse_fp8", dtype, rows=heads)


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, heads: int) -> Made:
    return make(board, "mla_sparse_fp8", _tile(board, dtype, heads), dtype, LATENT)


def _kernel(board: Board, q_nope, q_pe, cache, indices, softmax_scale, topk_length, num_splits, want_max):
    out, lse, maxima = results(q_nope, want_max)
    if not out.numel():
        return out, lse, maxima
    # [T, H, C], [T, H, R], [T, topk]: views, unless requests lie apart from each other
    q_nope, q_pe, indices = (within_int32(x.flatten(0, 1), 1) for x in (q_nope, q_pe, indices))
    pages, page_size, _ = cache.shape
    # Pages that follow each other are one page.
    flat = pages == 1 or (pages > 1 and cache.stride(0) == page_size * TOKEN_BYTES)
    if flat:
        cache = cache.as_strided((1, pages * page_size, TOKEN_BYTES), (pages * page_size * TOKEN_BYTES, TOKEN_BYTES, 1))
    lengths = counts(indices, topk_length)
    (tokens, heads, _), topk = q_nope.shape, indices.shape[1]
    made = _made(board, q_nope.dtype, heads)
    splits, least = plan(board, made, tokens, heads, topk, num_splits, SPLIT_KEYS)
    # All that the launches depend on; outputs are contiguous, and the parts of the cache hang on the whole.
    key = (
        q_nope.dtype, made.block_n, q_nope.shape, q_nope.stride(), q_pe.stride(), cache.shape, cache.stride(),
        indices.shape, indices.stride(), softmax_scale, least, flat, splits, want_max,
        q_nope.data_ptr() & 15, q_pe.data_ptr() & 15, cache.data_ptr() & 15, indices.data_ptr() & 15,
        lengths.data_ptr() & 15,
    )  # fmt: skip
    inputs = (q_nope, q_pe, *split_views(cache), indices, lengths, softmax_scale, least)
    constants = (flat, want_max, made.block_n, made.attend.parameters["hardware"])
    maximum = maxima if want_max else None
    launch_lists(made, (*inputs, *constants), key, indices, lengths, least, splits, out, lse, maximum)
    return out, lse, maxima


def _example(
    device="cpu",
    dtype=torch.bfloat16,
    *,
    tokens=4,
    heads=16,
    page_size=64,
    s_q=1,
    topk=48,
    pages=4,
    num_splits=None,
    want_max=False,
    gap=0,
    ragged=True,
    **_,
):
    """gap: slots between two pages. ragged: see `example_lists`."""
    return (
        torch.randn(tokens, s_q, heads, LATENT, device=device, dtype=dtype),
        torch.randn(tokens, s_q, heads, ROPE, device=device, dtype=dtype),
        example_cache(pages, page_size, device, gap),
        example_lists(tokens, s_q, topk, pages * page_size, ragged, device),
        (LATENT + ROPE) ** -0.5,
        None,
        num_splits,
        want_max,
    )


mla_sparse_fp8 = register(
    mla_sparse_fp8,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor cache, Tensor indices, float softmax_scale, Tensor? topk_length=None, "
        "int? num_splits=None, bool want_max=False) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
)
