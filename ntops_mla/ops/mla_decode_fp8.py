"""mla_decode_fp8: mla_decode over FlashMLA's fp8 cache of 656 bytes a token."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board
from ntops_mla.kernel import within_int32
from ntops_mla.ops import _check, _inspect
from ntops_mla.ops._fp8 import GROUPS, LATENT, ROPE, TOKEN_BYTES, quantize_into
from ntops_mla.ops._op import register
from ntops_mla.ops._paged import attend_paged
from ntops_mla.ops._rows import rows_of_bytes
from ntops_mla.ops._split import Made, check_schedule, launch, make, needed, parts, plan
from ntops_mla.ops.mla_decode import (
    check_numbers,
    check_queries,
    check_requests,
    example_requests,
    results,
    unsupported_pages,
)
from ntops_mla.ops.mla_schedule import mla_schedule
from ntops_mla.platform import Platform, Tile

_SHAPE = f"[pages, page_size, {TOKEN_BYTES}]"


def mla_decode_fp8(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    num_splits: int | None = None,
    schedule: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as mla_decode does, over latents of one byte a column, which are dequantised where they are read.

    kv[j, c] = scale[j, c // 128] code[j, c];  s[j] = softmax_scale (q_nope . kv[j] + q_pe . pe[j]);  out = softmax(s)
    kv;  lse = log sum exp(s)

    q_nope: `[B, s_q, H, 512]`, already absorbed. q_pe: `[B, s_q, H, 64]`. cache: `[pages, page_size, 656]`, uint8 or
    float8_e4m3fn: of each token 512 codes (float8_e4m3fn), 4 scales (float32, any) and 64 rope columns (bfloat16); a
    page's tokens are adjacent, its pages may be further apart; page_size a power of two (kernels: 16 to 128).
    block_table: int32 `[B, max_pages]`; entries past a request's pages and slots past its length are never read.
    seq_lens: int32 `[B]`, with the new tokens. Row i of s_q sees the first seq_len - s_q + 1 + i keys (causal), or all
    seq_len. num_splits: parts a request's keys are cut into, None: chosen. schedule: what mla_schedule made for these
    requests, None: all are cut into the same number of parts; it says how the work is shared, not what comes out.

    Returns out `[B, s_q, H, 512]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[B, H,
    s_q]`, natural logarithm. A row that sees no key: out 0, lse -inf. Raises TypeError or ValueError that names the
    argument. Source: deepseek-ai/FlashMLA flash_mla_with_kvcache(is_fp8_kvcache=True), README.md and tests/quant.py.
    """
    return torch.ops.ntops_mla.mla_decode_fp8(
        q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule
    )


def check_fp8(op: str, q_nope: object, q_pe: object, cache: object) -> None:
    """Absorbed queries of 512 + 64 columns, and a cache of 656 bytes a token."""
    check_queries(op, q_nope, q_pe)
    _check.size(op, "q_nope", q_nope, 3, LATENT, "[B, s_q, H, C]")
    _check.size(op, "q_pe", q_pe, 3, ROPE, "[B, s_q, H, R]")
    _check.tensor(op, "cache", cache, _SHAPE, 3)
    _check.dtype(op, "cache", cache, (torch.uint8, torch.float8_e4m3fn))
    check_bytes(op, "cache", cache)
    _check.same(op, "q_nope", q_nope, ("q_pe", q_pe))
    _check.same_device(op, "q_nope", q_nope, ("cache", cache))


def check_bytes(op: str, name: str, cache: torch.Tensor) -> None:
    """`cache` `[pages, page_size, 656]` can be read as codes, scales and rope columns."""
    _check.size(op, name, cache, 2, TOKEN_BYTES, _SHAPE)
    _check.any_page_size(op, name, cache)
    # Of a dimension of one element the stride says nothing.
    pages, page_size, _ = cache.shape
    page, token, byte = cache.stride()
    if byte != 1 or (page_size > 1 and token != TOKEN_BYTES):
        raise ValueError(
            f"{op}: {name} must have the {TOKEN_BYTES} bytes of a token, and a page's tokens, adjacent, "
            f"got strides {[page, token, byte]}"
        )
    if (pages > 1 and page % 4) or cache.storage_offset() % 4:
        raise ValueError(
            f"{op}: {name} must have its pages at multiples of 4 bytes, for the scales in them, "
            f"got {cache.storage_offset()} + n * {page}"
        )


def _check_args(q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    op = "mla_decode_fp8"
    check_fp8(op, q_nope, q_pe, cache)
    _check.page_size(op, "cache", cache.shape[1])
    check_requests(op, q_nope, block_table, seq_lens)
    check_numbers(op, softmax_scale, num_splits)
    _check.flag(op, "causal", causal)
    check_schedule(op, q_nope, num_splits, schedule)


def _look(q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    _inspect.table("mla_decode_fp8", block_table, seq_lens, *cache.shape[:2])
    _inspect.schedule("mla_decode_fp8", schedule, seq_lens)


def _reference(q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    rows, requests = rows_of_bytes(cache, q_nope.dtype), (block_table, seq_lens)
    return attend_paged("mla_decode_fp8", rows, cache.shape[1], q_nope, q_pe, *requests, softmax_scale, causal)


def _fake(q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    return results(q_nope)


def _key(q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    _, s_q, heads, _ = q_nope.shape
    return (q_nope.dtype,), (heads, s_q, cache.shape[1], causal)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return unsupported_pages(sizes[2])


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    heads, s_q, page_size, causal = sizes
    tile = _tile(board, dtypes[0], page_size, heads * s_q, causal and s_q > 1)
    return needed(board, "mla_decode_fp8", tile, dtypes[0], LATENT, page_size)


def _tile(board: Board, dtype: torch.dtype, page_size: int, rows: int, causal: bool) -> Tile | None:
    return board.tile("mla_decode_fp8", dtype, rows=rows, page_size=page_size, causal=int(causal))


@functools.lru_cache(maxsize=1024)
def _made(board: Board, dtype: torch.dtype, page_size: int, rows: int, causal: bool) -> Made:
    tile = _tile(board, dtype, page_size, rows, causal)
    block_n = min(tile.blocks["block_n"], page_size)  # a tile of keys lies in one page
    return make(board, "mla_decode_fp8", tile, dtype, LATENT, block_n=block_n, page_size=page_size)


def split_views(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[pages, page_size, 656]` -> as the kernels read it: codes uint8 `[pages, page_size, 512]`, scales float32
    `[pages, page_size, 4]`, and each page's bytes as bfloat16, `[pages, page_size * 328]`.
    """
    pages, page_size, _ = cache.shape
    # Of one page or one slot the stride says nothing, and need not suit the wider element types.
    page = cache.stride(0) if pages > 1 else page_size * TOKEN_BYTES
    rows = cache.view(torch.uint8).as_strided((pages, page_size, TOKEN_BYTES), (page, TOKEN_BYTES, 1))
    scales = rows[..., LATENT : LATENT + 4 * GROUPS].view(torch.float32)
    return rows[..., :LATENT], scales, rows.flatten(1).view(torch.bfloat16)


def _kernel(board: Board, q_nope, q_pe, cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    batch, s_q, heads, _ = q_nope.shape
    page_size, rows = cache.shape[1], s_q * heads
    out, lse = results(q_nope)
    if not out.numel():
        return out, lse
    q_nope, q_pe = (within_int32(q, 1, 2) for q in (q_nope, q_pe))
    causal = causal and s_q > 1
    made = _made(board, q_nope.dtype, page_size, rows, causal)
    splits, least = plan(board, made, batch, rows, block_table.shape[1] * page_size, num_splits)
    part, part_lse = parts(out, splits, schedule)
    planned, given = schedule is not None, block_table if schedule is None else schedule
    # All that the launches depend on; outputs are contiguous, and the parts of the cache hang on the whole.
    key = (
        q_nope.dtype, made.block_n, q_nope.shape, q_nope.stride(), q_pe.stride(), cache.shape, cache.stride(),
        block_table.shape, block_table.stride(), seq_lens.stride(), softmax_scale, least, causal, planned,
        None if part is None else part.shape, schedule.stride() if planned else None,
        q_nope.data_ptr() & 15, q_pe.data_ptr() & 15, cache.data_ptr() & 15, block_table.data_ptr() & 15,
        seq_lens.data_ptr() & 15, given.data_ptr() & 15,
    )  # fmt: skip
    inputs = (q_nope, q_pe, *split_views(cache), block_table, seq_lens, given, softmax_scale, least)
    constants = (causal, planned, made.block_n, made.attend.parameters["hardware"])
    launch(made, (*inputs, *constants), key, seq_lens, given, least, planned, out, lse, part, part_lse)
    return out, lse


def _example(
    device="cpu", dtype=torch.bfloat16, *, tokens=4, heads=16, page_size=64, s_q=1, keys=None, num_splits=None,
    scheduled=False, **_
):  # fmt: skip
    """`keys`: those of the first request, each next one has one less; None: 1, 2, 3, ..."""
    table, lengths = example_requests(tokens, page_size, keys, device)
    return (
        torch.randn(tokens, s_q, heads, LATENT, device=device, dtype=dtype),
        torch.randn(tokens, s_q, heads, ROPE, device=device, dtype=dtype),
        example_cache(table.numel(), page_size, device),
        table,
        lengths,
        (LATENT + ROPE) ** -0.5,
        True,
        num_splits,
        mla_schedule.reference(lengths, s_q * heads, 2 * tokens) if scheduled else None,
    )


def example_cache(pages: int, page_size: int, device, gap: int = 0) -> torch.Tensor:
    """`[pages, page_size, 656]` of small random latents, with `gap` slots between pages."""
    cache = torch.empty(pages, page_size + gap, TOKEN_BYTES, device=device, dtype=torch.uint8)[:, :page_size]
    latent, pe = (torch.randn(pages, page_size, columns, device=device) for columns in (LATENT, ROPE))
    quantize_into(cache, latent / 10, pe / 10)
    return cache


mla_decode_fp8 = register(
    mla_decode_fp8,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor cache, Tensor block_table, Tensor seq_lens, float softmax_scale, "
        "bool causal=True, int? num_splits=None, Tensor? schedule=None) -> (Tensor, Tensor)"
    ),
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
    look=_look,
)
