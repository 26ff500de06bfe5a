"""mla_decode: absorbed attention of a few new tokens per request over the paged latent cache."""

from __future__ import annotations

import itertools

import torch

from ntops_mla.ops import _check
from ntops_mla.ops._attention import GATHER_BYTES, attend, joined, merge
from ntops_mla.ops._op import register
from ntops_mla.ops.latent_append import LATENT_SIZES
from ntops_mla.platform import Platform

_PAGE_SIZES = (16, 32, 64, 128)
_NO_KEY = float("-inf")


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
    _check.tensor(op, "q_nope", q_nope, "[B, s_q, H, C]", 4)
    _check.dtype(op, "q_nope", q_nope)
    _check.tensor(op, "q_pe", q_pe, "[B, s_q, H, R]", 4)
    if q_pe.shape[:3] != q_nope.shape[:3]:
        raise ValueError(f"{op}: q_pe must be [B, s_q, H, R] like q_nope {list(q_nope.shape)}, got {list(q_pe.shape)}")
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
    _check.tensor(op, "block_table", block_table, "[B, max_pages]", 2)
    _check.dtype(op, "block_table", block_table, (torch.int32,))
    _check.size(op, "block_table", block_table, 0, q_nope.shape[0], "[B, max_pages]")
    _check.tensor(op, "seq_lens", seq_lens, "[B]", 1)
    _check.dtype(op, "seq_lens", seq_lens, (torch.int32,))
    _check.size(op, "seq_lens", seq_lens, 0, q_nope.shape[0], "[B]")
    _check.same(op, "q_nope", q_nope, ("q_pe", q_pe), ("kv_cache", kv_cache), ("pe_cache", pe_cache))
    _check.same_device(op, "q_nope", q_nope, ("block_table", block_table), ("seq_lens", seq_lens))
    _check.number(op, "softmax_scale", softmax_scale)
    _check.flag(op, "causal", causal)
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, (int, torch.SymInt))):
        raise TypeError(f"{op}: num_splits must be None or an integer, got {num_splits!r}")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{op}: num_splits must be None or at least 1, got {num_splits}")


def _reference(q_nope, q_pe, kv_cache, pe_cache, block_table, seq_lens, softmax_scale, causal, num_splits):
    batch, s_q, heads, latent = q_nope.shape
    out = torch.zeros(batch, s_q, heads, latent, dtype=q_nope.dtype, device=q_nope.device)
    lse = torch.full((batch, heads, s_q), _NO_KEY, dtype=torch.float32, device=q_nope.device)
    page_size = kv_cache.shape[1]
    lengths = seq_lens.tolist()
    if batch == 0 or s_q == 0 or heads == 0:
        return out, lse
    if min(lengths) < 0:
        raise ValueError(f"mla_decode: seq_lens must not be negative, got {min(lengths)}")
    most = -(-max(lengths) // page_size)
    if most > block_table.shape[1]:
        raise ValueError(
            f"mla_decode: seq_lens reach {max(lengths)} tokens, {most} pages, "
            f"but block_table has {block_table.shape[1]} columns"
        )
    # [B, s_q, H, C + R]
    q = joined(q_nope, q_pe)
    q = torch.cat([q_nope, q_pe], -1) if q is None else q
    cache = joined(kv_cache, pe_cache)
    caches = (kv_cache, pe_cache) if cache is None else (cache,)

    # Requests with the same number of pages go together: no padded page is gathered, and there is one call per group.
    pages = [-(-length // page_size) for length in lengths]
    order = sorted(range(batch), key=pages.__getitem__)
    in_order = order == list(range(batch))
    if not in_order:
        index = torch.tensor(order, device=q.device)
        q, block_table, seq_lens = (x.index_select(0, index) for x in (q, block_table, seq_lens))
    group_out, group_lse = (out, lse) if in_order else (torch.zeros_like(out), torch.full_like(lse, _NO_KEY))
    view = _View(seq_lens, s_q, causal, max(pages), page_size, q.dtype)
    page_bytes = page_size * q.shape[3] * q.element_size()
    first = 0
    for count, members in itertools.groupby(pages[i] for i in order):
        last = first + len(list(members))
        together = max(1, GATHER_BYTES // (count * page_bytes)) if count else batch
        for start in range(first, last, together) if count else ():
            rows = slice(start, min(start + together, last))
            part, part_lse = _attend_pages(q[rows], caches, block_table[rows, :count], view, rows, softmax_scale)
            group_out[rows] = part[..., :latent]
            group_lse[rows] = part_lse.transpose(1, 2)
        first = last
    if not in_order:
        out[index], lse[index] = group_out, group_lse
    return out, lse


class _View:
    """Which keys each row of a batch sees, and which slots of a last page hold nothing; made once for all groups."""

    def __init__(self, seq_lens, s_q, causal, pages, page_size, dtype) -> None:
        device = seq_lens.device
        # keys each row sees: [B, s_q or 1]
        self.limit = seq_lens[:, None]
        if causal and s_q > 1:
            self.limit = self.limit - s_q + 1 + torch.arange(s_q, device=device)
        hidden = torch.arange(pages * page_size, device=device) >= self.limit[..., None]
        # additive, [B, s_q or 1, 1, keys]; the heads are attend's rows, so that one mask row serves them all
        self.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, _NO_KEY)[:, :, None]
        # [B, page_size, 1]
        used = (seq_lens - 1) % page_size + 1
        self.unused = (torch.arange(page_size, device=device) >= used[:, None])[..., None]
        self.rows = s_q


def _attend_pages(q, caches, table, view, rows, scale):
    """Equal page counts: q `[G, s_q, H, D]`, table `[G, pages]` -> out `[G, s_q, H, D]`, lse `[G, s_q, H]`."""
    pages = table.shape[1]
    page_size = caches[0].shape[1]
    at_once = max(1, GATHER_BYTES // (len(table) * page_size * q.shape[3] * q.element_size()))
    if pages <= at_once:
        return _attend_span(q, caches, table, view, rows, scale, 0, True)
    out, lse = None, None
    for first in range(0, pages, at_once):
        span = table[:, first : first + at_once]
        part, part_lse = _attend_span(q, caches, span, view, rows, scale, first, first + at_once >= pages)
        wide = part if part.dtype == torch.float64 else part.float()
        out, lse = (wide, part_lse) if out is None else merge(out, lse, wide, part_lse)
    return out.to(q.dtype), lse


def _attend_span(q, caches, table, view, rows, scale, first_page, has_last):
    """The keys of `table`'s pages, the requests' pages from `first_page` on; `rows`: where they are in view."""
    group, pages = table.shape
    page_size = caches[0].shape[1]
    # [G, pages * page_size, D]: latent and rope columns side by side, gathered once
    k = _gather(caches, table.reshape(-1)).view(group, pages * page_size, -1)
    if has_last:
        # The last page's slots past the length hold anything, NaN too, and 0 x NaN is NaN: zero them in the copy.
        k.view(group, pages, page_size, -1)[:, -1].masked_fill_(view.unused[rows], 0)
    start = first_page * page_size
    kv = k[:, None].expand(-1, view.rows, -1, -1)
    out, lse = attend(q, kv, kv, scale, view.mask[rows, ..., start : start + pages * page_size])
    if view.rows > 1:
        blind = (view.limit[rows] <= start)[..., None].expand(-1, view.rows, 1)  # sees no key of this span
        out = out.masked_fill(blind[..., None], 0)
        lse = lse.masked_fill(blind, _NO_KEY)
    return out, lse


def _gather(caches, pages):
    try:
        parts = [cache.index_select(0, pages) for cache in caches]
    except IndexError as error:
        raise ValueError(
            f"mla_decode: block_table must hold pages below {caches[0].shape[0]}, "
            f"got {int(pages.min())} to {int(pages.max())}"
        ) from error
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


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


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, heads=16, kv_lora_rank=512, rope=64, page_size=64, **_):
    cache = torch.randn(tokens, page_size, kv_lora_rank + rope, device=device, dtype=dtype)
    return (
        torch.randn(tokens, 1, heads, kv_lora_rank, device=device, dtype=dtype),
        torch.randn(tokens, 1, heads, rope, device=device, dtype=dtype),
        cache[:, :, :kv_lora_rank],
        cache[:, :, kv_lora_rank:],
        torch.arange(tokens, dtype=torch.int32, device=device)[:, None],
        torch.arange(1, tokens + 1, dtype=torch.int32, device=device).clamp(max=page_size),
        (kv_lora_rank + rope) ** -0.5,
        True,
        None,
    )


mla_decode = register(
    mla_decode,
    schema=(
        "(Tensor q_nope, Tensor q_pe, Tensor kv_cache, Tensor pe_cache, Tensor block_table, Tensor seq_lens, "
        "float softmax_scale, bool causal=True, int? num_splits=None) -> (Tensor, Tensor)"
    ),
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
)
