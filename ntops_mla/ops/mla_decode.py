"""mla_decode: absorbed attention of a few new tokens per request over the paged latent cache."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board
from ntops_mla.kernel import within_int32
from ntops_mla.ops import _check, _inspect, _split
from ntops_mla.ops._op import register
from ntops_mla.ops._paged import attend_paged
from ntops_mla.ops._rows import rows_of
from ntops_mla.ops._split import Made, check_schedule, make, needed, parts, plan, refuse_far_slots
from ntops_mla.ops.latent_append import LATENT_SIZES
from ntops_mla.ops.mla_schedule import mla_schedule
from ntops_mla.platform import Platform, Tile

_PAGE_SIZES = (16, 32, 64, 128)


def mla_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    pe_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool = True,
    num_splits: int | None = None,
    schedule: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over each request's cached latents, which are key and value at once, all heads sharing them.

    s[j] = softmax_scale (q_nope . kv_cache[j] + q_pe . pe_cache[j]);  out = softmax(s) kv_cache;  lse = log sum exp(s)

    q_nope: `[B, s_q, H, C]`, already absorbed (C = 512 or 256). q_pe: `[B, s_q, H, R]`. kv_cache:
    `[pages, page_size, C]`, pe_cache: `[pages, page_size, R]`, of any strides; page_size a power of two (kernels: 16 to
    128). block_table: int32 `[B, max_pages]`; entries past a request's pages and slots past its length are never read.
    seq_lens: int32 `[B]`, with the new tokens. Row i of s_q sees the first seq_len - s_q + 1 + i keys (causal), or all
    seq_len. num_splits: parts a request's keys are cut into, None: chosen. schedule: what mla_schedule made for these
    requests, None: all are cut into the same number of parts; it says how the work is shared, not what comes out.

    Returns out `[B, s_q, H, C]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[B, H,
    s_q]`, natural logarithm. A row that sees no key: out 0, lse -inf. Raises TypeError or ValueError that names the
    argument. Source: arXiv 2405.04434, section 2.1.2 and appendix C; deepseek-ai/FlashMLA flash_mla_with_kvcache.
    """
    return torch.ops.ntops_mla.mla_decode(
        q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule
    )


def _check_args(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    op = "mla_decode"
    check_queries(op, q_nope, q_pe)
    check_caches(op, q_nope, q_pe, kv_cache, pe_cache)
    check_requests(op, q_nope, block_table, seq_lens)
    check_numbers(op, softmax_scale, num_splits)
    _check.flag(op, "causal", causal)
    check_schedule(op, q_nope, num_splits, schedule)


def check_queries(op: str, q_nope: object, q_pe: object) -> None:
    """q_nope and q_pe of absorbed attention."""
    _check.tensor(op, "q_nope", q_nope, "[B, s_q, H, C]", 4)
    _check.dtype(op, "q_nope", q_nope)
    _check.tensor(op, "q_pe", q_pe, "[B, s_q, H, R]", 4)
    if q_pe.shape[:3] != q_nope.shape[:3]:
        raise ValueError(f"{op}: q_pe must be [B, s_q, H, R] like q_nope {list(q_nope.shape)}, got {list(q_pe.shape)}")


def check_caches(
    op: str,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: object,
    pe_cache: object,
    *,
    any_page_size: bool = False,
) -> None:
    """The two halves of a paged cache go with the queries and with each other."""
    _check.tensor(op, "kv_cache", kv_cache, "[pages, page_size, C]", 3)
    _check.size(op, "kv_cache", kv_cache, 2, q_nope.shape[3], "[pages, page_size, C]")
    if any_page_size:
        _check.any_page_size(op, "kv_cache", kv_cache)
    else:
        _check.page_size(op, "kv_cache", kv_cache.shape[1])
    _check.tensor(op, "pe_cache", pe_cache, "[pages, page_size, R]", 3)
    _check.size(op, "pe_cache", pe_cache, 2, q_pe.shape[3], "[pages, page_size, R]")
    if pe_cache.shape[:2] != kv_cache.shape[:2]:
        raise ValueError(
            f"{op}: pe_cache must have kv_cache's pages and page size {list(kv_cache.shape[:2])}, "
            f"got {list(pe_cache.shape[:2])}"
        )
    _check.same(op, "q_nope", q_nope, ("q_pe", q_pe), ("kv_cache", kv_cache), ("pe_cache", pe_cache))


def check_requests(op: str, q_nope: torch.Tensor, block_table: object, seq_lens: object) -> None:
    """The pages and the length of each request of q_nope."""
    _check.tensor(op, "block_table", block_table, "[B, max_pages]", 2)
    _check.dtype(op, "block_table", block_table, (torch.int32,))
    _check.size(op, "block_table", block_table, 0, q_nope.shape[0], "[B, max_pages]")
    _check.tensor(op, "seq_lens", seq_lens, "[B]", 1)
    _check.dtype(op, "seq_lens", seq_lens, (torch.int32,))
    _check.size(op, "seq_lens", seq_lens, 0, q_nope.shape[0], "[B]")
    _check.same_device(op, "q_nope", q_nope, ("block_table", block_table), ("seq_lens", seq_lens))


def check_numbers(op: str, softmax_scale: object, num_splits: object) -> None:
    """A scale, and a number of splits or None."""
    _check.number(op, "softmax_scale", softmax_scale)
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, (int, torch.SymInt))):
        raise TypeError(f"{op}: num_splits must be None or an integer, got {num_splits!r}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{op}: num_splits must be None or at least 1, got {num_splits}")


def _look(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    _inspect.table("mla_decode", block_table, seq_lens, *kv_cache.shape[:2])
    _inspect.schedule("mla_decode", schedule, seq_lens)


def _reference(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    cache, requests = rows_of(kv_cache, pe_cache), (block_table, seq_lens)
    return attend_paged("mla_decode", cache, kv_cache.shape[1], q_nope, q_pe, *requests, softmax_scale, causal)


def _fake(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    return results(q_nope)


def results(q_nope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, not yet written."""
    batch, s_q, heads, _ = q_nope.shape
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    return out, torch.empty(batch, heads, s_q, dtype=torch.float32, device=q_nope.device)


def _key(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule):
    _, s_q, heads, latent = q_nope.shape
    return (q_nope.dtype,), (latent, q_pe.shape[3], heads, s_q, kv_cache.shape[1], causal)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    latent, rope, _, _, page_size, _ = sizes
    return unsupported_heads(latent, rope) or unsupported_pages(page_size)


def unsupported_heads(latent: int, rope: int) -> str | None:
    """Why the kernels do not take absorbed heads of this size, None where they do."""
    if (latent, rope) in LATENT_SIZES:
        return None
    allowed = " or ".join(f"{c} + {r}" for c, r in LATENT_SIZES)
    return f"absorbed heads of {latent} + {rope} columns; the kernel takes {allowed}"


def unsupported_pages(page_size: int) -> str | None:
    """Why the kernels that read whole tiles of a page do not take this size, None where they do."""
    if page_size in _PAGE_SIZES:
        return None
    return f"pages of {page_size} slots; the kernel takes {', '.join(map(str, _PAGE_SIZES))}"


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    latent, _, heads, s_q, page_size, causal = sizes
    tile = _tile(board, dtypes[0], latent, page_size, heads * s_q, causal and s_q > 1)
    return needed(board, "mla_decode", tile, dtypes[0], latent, page_size)


def _tile(board: Board, dtype: torch.dtype, latent: int, page_size: int, rows: int, causal: bool) -> Tile | None:
    return board.tile("mla_decode", dtype, rows=rows, latent=latent, page_size=page_size, causal=int(causal))


@functools.lru_cache(maxsize=1024)
def _made(board: Board, dtype: torch.dtype, latent: int, rope: int, page_size: int, rows: int, causal: bool) -> Made:
    return made_of(board, _tile(board, dtype, latent, page_size, rows, causal), dtype, latent, rope, page_size)


def made_of(board: Board, tile: Tile, dtype: torch.dtype, latent: int, rope: int, page_size: int) -> Made:
    """The kernels with a tile, the platform's or another one."""
    # A tile of keys lies in one page, a part of the columns in the latent.
    block_n, block_c = min(tile.blocks["block_n"], page_size), min(tile.blocks["block_c"], latent)
    sizes = {"page_size": page_size, "latent": latent, "rope": rope}
    return make(board, "mla_decode", tile, dtype, latent, block_n=block_n, block_c=block_c, **sizes)


def _kernel(
    board: Board, q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits, schedule
):
    batch, s_q, heads, latent = q_nope.shape
    page_size, rows = kv_cache.shape[1], s_q * heads
    out, lse = results(q_nope)
    if not out.numel():
        return out, lse
    q_nope, q_pe = (within_int32(q, 1, 2) for q in (q_nope, q_pe))
    refuse_far_slots(kv_cache=kv_cache, pe_cache=pe_cache)
    causal = causal and s_q > 1
    made = _made(board, q_nope.dtype, latent, q_pe.shape[3], page_size, rows, causal)
    splits, least = plan(board, made, batch, rows, block_table.shape[1] * page_size, num_splits)
    given = block_table if schedule is None else schedule
    inputs = (q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, given, softmax_scale, least)
    launch(made, inputs, causal, schedule is not None, out, lse, *parts(out, splits, schedule))
    return out, lse


def launch(made: Made, inputs: tuple, causal: bool, planned: bool, out, lse, part, part_lse) -> None:
    """Both launches, into buffers that are there, as `_split.parts` makes them."""
    q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, schedule, softmax_scale, least = inputs
    # All that the launches depend on: to read a shape or a stride costs 0.15 us, and outputs are contiguous.
    key = (
        q_nope.dtype, made.block_n, q_nope.shape, q_nope.stride(), q_pe.stride(), kv_cache.shape, kv_cache.stride(),
        pe_cache.stride(),
        block_table.shape, block_table.stride(), seq_lens.stride(), softmax_scale, least, causal, planned,
        None if part is None else part.shape, schedule.stride() if planned else None,
        q_nope.data_ptr() & 15, q_pe.data_ptr() & 15, kv_cache.data_ptr() & 15, pe_cache.data_ptr() & 15,
        block_table.data_ptr() & 15, seq_lens.data_ptr() & 15, schedule.data_ptr() & 15,
    )  # fmt: skip
    inputs = (*inputs, causal, planned, made.block_n)
    _split.launch(made, inputs, key, seq_lens, schedule, least, planned, out, lse, part, part_lse)


def _example(
    device="cpu",
    dtype=torch.bfloat16,
    *,
    tokens=4,
    heads=16,
    kv_lora_rank=512,
    rope=64,
    page_size=64,
    s_q=1,
    keys=None,
    num_splits=None,
    scheduled=False,
    **_,
):
    """`keys`: those of the first request, each next one has one less; None: 1, 2, 3, ..."""
    table, lengths = example_requests(tokens, page_size, keys, device)
    cache = torch.randn(table.numel(), page_size, kv_lora_rank + rope, device=device, dtype=dtype)
    return (
        torch.randn(tokens, s_q, heads, kv_lora_rank, device=device, dtype=dtype),
        torch.randn(tokens, s_q, heads, rope, device=device, dtype=dtype),
        cache[:, :, :kv_lora_rank],
        cache[:, :, kv_lora_rank:],
        table,
        lengths,
        (kv_lora_rank + rope) ** -0.5,
        True,
        num_splits,
        mla_schedule.reference(lengths, s_q * heads, 2 * tokens) if scheduled else None,
    )


def example_requests(tokens: int, page_size: int, keys: int | None, device) -> tuple[torch.Tensor, torch.Tensor]:
    """block_table and seq_lens of an example, in which no page is anybody's twice."""
    ends = torch.arange(1, tokens + 1) if keys is None else torch.arange(keys, keys - tokens, -1)
    pages = 1 if keys is None else -(-keys // page_size)
    table = torch.arange(tokens * pages, dtype=torch.int32, device=device).view(tokens, pages)
    return table, ends.clamp(1, pages * page_size).to(device=device, dtype=torch.int32)


mla_decode = register(
    mla_decode,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor pe_cache, Tensor block_table, Tensor seq_lens, "
        "float softmax_scale, bool causal=True, int? num_splits=None, Tensor? schedule=None) -> (Tensor, Tensor)"
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
