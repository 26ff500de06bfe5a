"""Attention over a paged cache in PyTorch, whatever its pages hold: mla_decode's reference, and mla_decode_fp8's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ntops_mla.ops._attention import GATHER_BYTES, attend, joined, merge

_NO_KEY = float("-inf")

# Tokens of a causal run that share one call, and elements of one mask. Fewer tokens gather less work
# above the diagonal, more give longer products.
_CAUSAL_TOKENS = 128
_MASK_ELEMENTS = 8 << 20
_KEY_TILE = 32


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
    """Which keys each row of a batch, in order of its pages, sees."""

    def __init__(self, seq_lens, lengths, s_q, causal, page_size, dtype) -> None:
        device = seq_lens.device
        self.lengths = lengths  # seq_lens on the host
        self.causal = causal and s_q > 1
        # keys each row sees: [B, s_q] (causal), else [B, 1]
        self.limit = seq_lens[:, None]
        if self.causal:
            self.limit = self.limit - s_q + 1 + torch.arange(s_q, device=device)
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
    start = first_page * page_size
    # [G, pages * page_size, D]
    k = _gather(paged, table.reshape(-1)).view(group, pages * page_size, -1)
    if has_last:
        # The last page's slots past the length hold anything, NaN too, and 0 x NaN is NaN: zero them in the copy.
        if k.device.type == "cpu":
            _zero_slices(k, [length - start for length in view.lengths[rows]])
        else:
            _zero_masked(k, view.limit[rows, -1:] - start, page_size)
    k = k[:, None]
    if not view.causal:
        # The heads, and s_q's rows, are attend's rows: one mask row serves them all.
        out, lse = attend(q.flatten(1, 2)[:, None], k, k, scale, view.mask(rows, start, start + k.shape[2]))
        return out[:, 0].unflatten(1, q.shape[1:3]), lse[:, 0].unflatten(1, q.shape[1:3])
    return _attend_causal(q, k, view, rows, scale, start)


def _zero_slices(k, used):
    """k `[G, keys, D]` from `used` keys on, a list: on a CPU four times as fast as the mask."""
    for index, count in enumerate(used):
        if count < k.shape[1]:
            k[index, count:].zero_()


def _zero_masked(k, used, page_size):
    """k `[G, keys, D]` from `used` keys `[G, 1]` on, which lie in the last page: in one launch."""
    first = k.shape[1] - page_size
    slot = torch.arange(first, k.shape[1], device=k.device)
    k[:, first:].masked_fill_((slot >= used)[..., None], 0)


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
