"""mla_decode: absorbed attention of a few new tokens per request over the paged latent cache."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel, within_int32
from ntops_mla.ops import _check, _inspect
from ntops_mla.ops._attention import GATHER_BYTES, attend, joined, merge
from ntops_mla.ops._op import register
from ntops_mla.ops.latent_append import LATENT_SIZES
from ntops_mla.platform import Platform, Tile

_PAGE_SIZES = (16, 32, 64, 128)
_NO_KEY = float("-inf")

# Keys that a split has at least, unless the caller says how many splits there are: fewer cost more in the second launch
# and in float32 parts than they bring. And the most splits of a request, which mla_combine reads one after the other.
_SPLIT_KEYS = 256
_MAX_SPLITS = 64

# Of the reference: tokens of a causal run that share one call, and elements of one mask. Fewer tokens gather less work
# above the diagonal, more give longer products.
_CAUSAL_TOKENS = 128
_MASK_ELEMENTS = 8 << 20
_KEY_TILE = 32


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over each request's cached latents, which are key and value at once, all heads sharing them.

    s[j] = softmax_scale (q_nope . kv_cache[j] + q_pe . pe_cache[j]);  out = softmax(s) kv_cache;  lse = log sum exp(s)

    q_nope: `[B, s_q, H, C]`, already absorbed (C = 512 or 256). q_pe: `[B, s_q, H, R]`. kv_cache: `[pages, page_size,
    C]`, pe_cache: `[pages, page_size, R]`, of any strides. block_table: int32 `[B, max_pages]`; entries past a
    request's pages and slots past its length are never read. seq_lens: int32 `[B]`, with the new tokens. Row i of s_q
    sees the first seq_len - s_q + 1 + i keys (causal), or all seq_len. num_splits: parts a request's keys are cut into,
    None: chosen.

    Returns out `[B, s_q, H, C]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[B, H,
    s_q]`, natural logarithm. A row that sees no key: out 0, lse -inf. Raises TypeError or ValueError that names the
    argument. Source: arXiv 2405.04434, section 2.1.2 and appendix C; deepseek-ai/FlashMLA flash_mla_with_kvcache.
    """
    return torch.ops.ntops_mla.mla_decode(
        q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits
    )


def _check_args(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    op = "mla_decode"
    check_queries(op, q_nope, q_pe)
    _check.tensor(op, "kv_cache", kv_cache, "[pages, page_size, C]", 3)
    _check.size(op, "kv_cache", kv_cache, 2, q_nope.shape[3], "[pages, page_size, C]")
    _check.page_size(op, "kv_cache", kv_cache.shape[1])
    _check.tensor(op, "pe_cache", pe_cache, "[pages, page_size, R]", 3)
    _check.size(op, "pe_cache", pe_cache, 2, q_pe.shape[3], "[pages, page_size, R]")
    if pe_cache.shape[:2] != kv_cache.shape[:2]:
        raise ValueError(
            f"{op}: pe_cache must have kv_cache's pages and page size {list(kv_cache.shape[:2])}, "
            f"got {list(pe_cache.shape[:2])}"
        )
    _check.same(op, "q_nope", q_nope, ("q_pe", q_pe), ("kv_cache", kv_cache), ("pe_cache", pe_cache))
    check_requests(op, q_nope, block_table, seq_lens)
    check_numbers(op, softmax_scale, num_splits)
    _check.flag(op, "causal", causal)


def check_queries(op: str, q_nope: object, q_pe: object) -> None:
    """q_nope and q_pe of absorbed attention."""
    _check.tensor(op, "q_nope", q_nope, "[B, s_q, H, C]", 4)
    _check.dtype(op, "q_nope", q_nope)
    _check.tensor(op, "q_pe", q_pe, "[B, s_q, H, R]", 4)
    if q_pe.shape[:3] != q_nope.shape[:3]:
        raise ValueError(f"{op}: q_pe must be [B, s_q, H, R] like q_nope {list(q_nope.shape)}, got {list(q_pe.shape)}")


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


def _look(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    _inspect.table("mla_decode", block_table, seq_lens, *kv_cache.shape[:2])


def _reference(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    cache = joined(kv_cache, pe_cache)
    caches = (kv_cache, pe_cache) if cache is None else (cache,)

    # Latent and rope columns side by side, gathered once
    def gather(pages):
        parts = [cache.index_select(0, pages) for cache in caches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    paged = Paged("mla_decode", gather, *kv_cache.shape[:2])
    return attend_paged(paged, q_nope, q_pe, block_table, seq_lens, softmax_scale, causal)


class Paged(NamedTuple):
    """A cache as references read it, for the op of that name.

    gather: a tensor of pages `[n]` -> their rows `[n, page_size, C + R]` in q's dtype, a copy; IndexError for a page
    that is not there.
    """

    op: str
    gather: Callable[[torch.Tensor], torch.Tensor]
    pages: int
    page_size: int


def attend_paged(
    paged: Paged,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mla_decode in PyTorch, over any cache of pages."""
    batch, s_q, heads, latent = q_nope.shape
    out = torch.zeros(batch, s_q, heads, latent, dtype=q_nope.dtype, device=q_nope.device)
    lse = torch.full((batch, heads, s_q), _NO_KEY, dtype=torch.float32, device=q_nope.device)
    page_size = paged.page_size
    lengths = seq_lens.tolist()
    if batch == 0 or s_q == 0 or heads == 0:
        return out, lse
    if min(lengths) < 0:
        raise ValueError(f"{paged.op}: seq_lens must not be negative, got {min(lengths)}")
    most = -(-max(lengths) // page_size)
    if most > block_table.shape[1]:
        raise ValueError(
            f"{paged.op}: seq_lens reach {max(lengths)} tokens, {most} pages, "
            f"but block_table has {block_table.shape[1]} columns"
        )
    # [B, s_q, H, C + R]
    q = joined(q_nope, q_pe)
    q = torch.cat([q_nope, q_pe], -1) if q is None else q

    # Requests with the same number of pages go together: no padded page is gathered, and there is one call per group.
    pages = [-(-length // page_size) for length in lengths]
    order = sorted(range(batch), key=pages.__getitem__)
    in_order = order == list(range(batch))
    if not in_order:
        index = torch.tensor(order, device=q.device)
        q, block_table, seq_lens = (x.index_select(0, index) for x in (q, block_table, seq_lens))
    group_out, group_lse = (out, lse) if in_order else (torch.zeros_like(out), torch.full_like(lse, _NO_KEY))
    view = _View(seq_lens, [lengths[i] for i in order], s_q, causal, page_size, q.dtype)
    page_bytes = page_size * q.shape[3] * q.element_size()
    first = 0
    for count, members in itertools.groupby(pages[i] for i in order):
        last = first + len(list(members))
        together = max(1, GATHER_BYTES // (count * page_bytes)) if count else batch
        for start in range(first, last, together) if count else ():
            rows = slice(start, min(start + together, last))
            part, part_lse = _attend_pages(q[rows], paged, block_table[rows, :count], view, rows, softmax_scale)
            group_out[rows] = part[..., :latent]
            group_lse[rows] = part_lse.transpose(1, 2)
        first = last
    if not in_order:
        out[index], lse[index] = group_out, group_lse
    return out, lse


class _View:
    """Which keys each row of a batch, in order of its pages, sees; which slots of a last page hold nothing."""

    def __init__(self, seq_lens, lengths, s_q, causal, page_size, dtype) -> None:
        device = seq_lens.device
        self.lengths = lengths  # seq_lens on the host
        self.causal = causal and s_q > 1
        # keys each row sees: [B, s_q] (causal), else [B, 1]
        self.limit = seq_lens[:, None]
        if self.causal:
            self.limit = self.limit - s_q + 1 + torch.arange(s_q, device=device)
        # [B, page_size, 1]
        used = (seq_lens - 1) % page_size + 1
        self.unused = (torch.arange(page_size, device=device) >= used[:, None])[..., None]
        self._page_size = page_size
        self._dtype = dtype
        self._shared, self._covered = None, slice(0, 0)

    def mask(self, rows, start, stop):
        """Additive `[G, 1, 1, stop - start]`: all s_q rows of a request see the same keys."""
        if rows.start < self._covered.start or rows.stop > self._covered.stop:
            # One mask for all requests that follow takes fewer calls than one for each group. But it is as wide as the
            # longest of them: only while that is small.
            rest = slice(rows.start, len(self.lengths))
            small = (rest.stop - rest.start) * self._slots(rest.stop - 1) <= _MASK_ELEMENTS
            self._covered = rest if small else rows
            self._shared = self._hide(self.limit[self._covered], 0, self._slots(self._covered.stop - 1))[:, :, None]
        first = self._covered.start
        return self._shared[rows.start - first : rows.stop - first, ..., start:stop]

    def causal_mask(self, rows, tokens, start, stop, heads):
        """Additive `[G, 1, tokens * heads or 1, stop - start]`: each of s_q's `tokens` sees its own keys."""
        hidden = self._hide(self.limit[rows, tokens], start, stop)
        if hidden.shape[1] == 1:
            return hidden[:, None]
        return hidden[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)[:, None]

    def _slots(self, index):
        return -(-self.lengths[index] // self._page_size) * self._page_size

    def _hide(self, limit, start, stop):
        hidden = torch.arange(start, stop, device=limit.device) >= limit[..., None]
        return torch.zeros(hidden.shape, dtype=self._dtype, device=limit.device).masked_fill_(hidden, _NO_KEY)


def _attend_pages(q, paged, table, view, rows, scale):
    """Equal page counts: q `[G, s_q, H, D]`, table `[G, pages]` -> out `[G, s_q, H, D]`, lse `[G, s_q, H]`."""
    pages = table.shape[1]
    page_size = paged.page_size
    at_once = max(1, GATHER_BYTES // (len(table) * page_size * q.shape[3] * q.element_size()))
    if pages <= at_once:
        return _attend_span(q, paged, table, view, rows, scale, 0, True)
    out, lse = None, None
    for first in range(0, pages, at_once):
        span = table[:, first : first + at_once]
        part, part_lse = _attend_span(q, paged, span, view, rows, scale, first, first + at_once >= pages)
        wide = part if part.dtype == torch.float64 else part.float()
        out, lse = (wide, part_lse) if out is None else merge(out, lse, wide, part_lse)
    return out.to(q.dtype), lse


def _attend_span(q, paged, table, view, rows, scale, first_page, has_last):
    """The keys of `table`'s pages, the requests' pages from `first_page` on; `rows`: where they are in view."""
    group, pages = table.shape
    page_size = paged.page_size
    # [G, pages * page_size, D]
    k = _gather(paged, table.reshape(-1)).view(group, pages * page_size, -1)
    if has_last:
        # The last page's slots past the length hold anything, NaN too, and 0 x NaN is NaN: zero them in the copy.
        k.view(group, pages, page_size, -1)[:, -1].masked_fill_(view.unused[rows], 0)
    start = first_page * page_size
    k = k[:, None]
    if not view.causal:
        # The heads, and s_q's rows, are attend's rows: one mask row serves them all.
        out, lse = attend(q.flatten(1, 2)[:, None], k, k, scale, view.mask(rows, start, start + k.shape[2]))
        return out[:, 0].unflatten(1, q.shape[1:3]), lse[:, 0].unflatten(1, q.shape[1:3])
    return _attend_causal(q, k, view, rows, scale, start)


def _attend_causal(q, k, view, rows, scale, start):
    """k `[G, 1, keys, D]`, the requests' keys from `start` on: a block of tokens at a time, over the keys it sees.

    So the masks are linear in the keys, and about half of a long run's scores is never computed.
    """
    group, s_q, heads, _ = q.shape
    lengths = view.lengths[rows]
    shortest, longest = min(lengths), max(lengths)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((group, s_q, heads), _NO_KEY, dtype=torch.float32, device=q.device)
    at_once = max(1, min(_CAUSAL_TOKENS, _MASK_ELEMENTS // (group * heads * k.shape[2])))
    for first in range(0, s_q, at_once):
        tokens = slice(first, min(first + at_once, s_q))
        count = longest - s_q + tokens.stop - start
        if count <= 0:
            continue
        # In whole tiles: PyTorch's CPU kernel takes a third longer for 500 keys than for 512.
        seen = k[:, :, : -(-count // _KEY_TILE) * _KEY_TILE]
        mask = view.causal_mask(rows, tokens, start, start + seen.shape[2], heads)
        part, part_lse = attend(q[:, tokens].flatten(1, 2)[:, None], seen, seen, scale, mask)
        shape = (tokens.stop - first, heads)
        part, part_lse = part[:, 0].unflatten(1, shape), part_lse[:, 0].unflatten(1, shape)
        if shortest - s_q + 1 + first <= start:
            blind = (view.limit[rows, tokens] <= start)[..., None]  # sees no key of this span
            part, part_lse = part.masked_fill(blind[..., None], 0), part_lse.masked_fill(blind, _NO_KEY)
        out[:, tokens], lse[:, tokens] = part, part_lse
    return out, lse


def _gather(paged, pages):
    try:
        return paged.gather(pages)
    except IndexError as error:
        raise ValueError(
            f"{paged.op}: block_table must hold pages below {paged.pages}, got {int(pages.min())} to {int(pages.max())}"
        ) from error


def _fake(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    batch, s_q, heads, _ = q_nope.shape
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    return out, torch.empty(batch, heads, s_q, dtype=torch.float32, device=q_nope.device)


def _key(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    _, s_q, heads, latent = q_nope.shape
    return (q_nope.dtype,), (latent, q_pe.shape[3], heads, s_q, kv_cache.shape[1], causal)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    latent, rope, _, _, page_size, _ = sizes
    if (latent, rope) not in LATENT_SIZES:
        allowed = " or ".join(f"{c} + {r}" for c, r in LATENT_SIZES)
        return f"absorbed heads of {latent} + {rope} columns; the kernel takes {allowed}"
    if page_size not in _PAGE_SIZES:
        return f"pages of {page_size} slots; the kernel takes {', '.join(map(str, _PAGE_SIZES))}"
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    latent, _, heads, s_q, page_size, causal = sizes
    tile = _tile(board, dtypes[0], latent, page_size, heads * s_q, causal and s_q > 1)
    products = (tile.blocks["block_h"], min(tile.blocks["block_n"], page_size)) if tile else ()
    return [
        Needed("mla_decode", tile, products),
        Needed("mla_combine", board.tile("mla_combine", dtypes[0], latent=latent)),
    ]


def _tile(board: Board, dtype: torch.dtype, latent: int, page_size: int, rows: int, causal: bool) -> Tile | None:
    return board.tile("mla_decode", dtype, rows=rows, latent=latent, page_size=page_size, causal=int(causal))


class Made(NamedTuple):
    """Both kernels, and the rows and keys of a tile."""

    decode: Kernel
    combine: Kernel
    block_h: int
    block_n: int


@functools.lru_cache(maxsize=1024)
def _made(board: Board, dtype: torch.dtype, latent: int, rope: int, page_size: int, rows: int, causal: bool) -> Made:
    tile = _tile(board, dtype, latent, page_size, rows, causal)
    # A tile of keys lies in one page, a part of the columns in the latent.
    block_n, block_c = min(tile.blocks["block_n"], page_size), min(tile.blocks["block_c"], latent)
    sizes = {"page_size": page_size, "latent": latent, "rope": rope}
    decode = board.make("mla_decode", tile, block_n=block_n, block_c=block_c, **sizes)
    combine = board.make("mla_combine", board.tile("mla_combine", dtype, latent=latent), latent=latent)
    return Made(decode, combine, tile.blocks["block_h"], block_n)


def split(programs: int, keys: int, processors: int, least: int = _SPLIT_KEYS) -> int:
    """How many splits fill `processors` (two programs on each) when one split takes `programs`, of at most `keys` keys
    and of `least` at least.

    Known without reading a length, so that the grid is static and a CUDA graph can be replayed with other lengths; how
    many of them a request uses is decided on the device.
    """
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, -(-keys // least), _MAX_SPLITS))


def plan(board: Board, made: Made, batch: int, rows: int, keys: int, num_splits: int | None) -> tuple[int, int]:
    """How many splits each request's `keys` at most are cut into, and the blocks of keys that one has at least."""
    if num_splits is not None:
        return num_splits, 1
    return split(batch * -(-rows // made.block_h), keys, board.processors), max(1, _SPLIT_KEYS // made.block_n)


def _kernel(board: Board, q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    batch, s_q, heads, latent = q_nope.shape
    page_size, rows = kv_cache.shape[1], s_q * heads
    device = q_nope.device
    out = torch.empty(batch, s_q, heads, latent, dtype=q_nope.dtype, device=device)
    lse = torch.empty(batch, heads, s_q, dtype=torch.float32, device=device)
    if not out.numel():
        return out, lse
    q_nope, q_pe = (within_int32(q, 1, 2) for q in (q_nope, q_pe))
    for name, cache in (("kv_cache", kv_cache), ("pe_cache", pe_cache)):
        if within_int32(cache, 1) is not cache:
            raise NotImplementedError(
                f"{name}: slots {cache.stride(1)} elements apart, which int32 offsets do not reach"
            )
    causal = causal and s_q > 1
    made = _made(board, q_nope.dtype, latent, q_pe.shape[3], page_size, rows, causal)
    splits, least = plan(board, made, batch, rows, block_table.shape[1] * page_size, num_splits)
    inputs = (q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, least)
    launch(made, inputs, causal, splits, out, lse, *parts(out, splits))
    return out, lse


def parts(out: torch.Tensor, splits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the splits' results, where there are several: `[B, splits, s_q * H, C]`, `[B, splits, s_q, H]`."""
    if splits == 1:
        return None, None
    batch, s_q, heads, latent = out.shape
    part = torch.empty(batch, splits, s_q * heads, latent, dtype=torch.float32, device=out.device)
    return part, torch.empty(batch, splits, s_q, heads, dtype=torch.float32, device=out.device)


def launch(made: Made, inputs: tuple, causal: bool, splits: int, out, lse, part, part_lse) -> None:
    """Both launches, into buffers that are there; part: `[B, splits, s_q * H, C]`, part_lse: `[B, splits, s_q, H]`."""
    q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, least = inputs
    # All that the launches depend on: to read a shape or a stride costs 0.15 us, and outputs are contiguous.
    key = (
        q_nope.dtype, made.block_n, q_nope.shape, q_nope.stride(), q_pe.stride(), kv_cache.shape, kv_cache.stride(),
        pe_cache.stride(),
        block_table.shape, block_table.stride(), seq_lens.stride(), softmax_scale, least, causal, splits,
        q_nope.data_ptr() & 15, q_pe.data_ptr() & 15, kv_cache.data_ptr() & 15, pe_cache.data_ptr() & 15,
        block_table.data_ptr() & 15, seq_lens.data_ptr() & 15,
    )  # fmt: skip
    launch_split(made, (*inputs, causal, made.block_n), key, seq_lens, least, splits, out, lse, part, part_lse)


def launch_split(
    made: Made, inputs: tuple, key: tuple, seq_lens, least: int, splits: int, out, lse, part, part_lse
) -> None:
    """`made.decode(*inputs, out, lse)`, and with several splits `made.combine` of them."""
    # [B, s_q, H]
    lse_rows = lse.transpose(1, 2)
    if splits == 1:
        made.decode(*inputs, out.flatten(1, 2)[:, None], lse_rows[:, None], key=key)
        return
    made.decode(*inputs, part, part_lse, key=key)
    made.combine(part, part_lse, seq_lens, least, made.block_n, out, lse_rows, key=key)


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
    **_,
):
    """`keys`: those of the first request, each next one has one less; None: 1, 2, 3, ..."""
    ends = torch.arange(1, tokens + 1) if keys is None else torch.arange(keys, keys - tokens, -1)
    pages = 1 if keys is None else -(-keys // page_size)
    cache = torch.randn(tokens * pages, page_size, kv_lora_rank + rope, device=device, dtype=dtype)
    return (
        torch.randn(tokens, s_q, heads, kv_lora_rank, device=device, dtype=dtype),
        torch.randn(tokens, s_q, heads, rope, device=device, dtype=dtype),
        cache[:, :, :kv_lora_rank],
        cache[:, :, kv_lora_rank:],
        torch.arange(tokens * pages, dtype=torch.int32, device=device).view(tokens, pages),
        ends.clamp(1, pages * page_size).to(device=device, dtype=torch.int32),
        (kv_lora_rank + rope) ** -0.5,
        True,
        num_splits,
    )


mla_decode = register(
    mla_decode,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor pe_cache, Tensor block_table, Tensor seq_lens, "
        "float softmax_scale, bool causal=True, int? num_splits=None) -> (Tensor, Tensor)"
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
