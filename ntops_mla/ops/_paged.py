"""Attention over a paged cache in PyTorch, whatever its pages hold: mla_decode's reference, and mla_decode_fp8's."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ntops_mla.ops._attention import attend, is_small, lse_in_float32, may_be_inexact, merge
from ntops_mla.ops._rows import Rows, at_once, joined

_NO_KEY = float("-inf")
# Above it, and below any lse: what a difference of two -inf would be NaN without.
_LEAST = -1e30

# Keys in whole tiles: PyTorch's CPU kernel takes a third longer for 500 keys than for 512.
_KEY_TILE = 32
# Requests go together whose lengths in this unit are alike: the same up to 8, then within a quarter. What is more to
# multiply costs less than calls of few requests, which leave threads idle.
_LENGTH_UNIT = 128
# Rows of a request that PyTorch's CPU kernel gives to one thread, and keys that are worth a thread of their own.
_THREAD_ROWS = 32
_THREAD_KEYS = 512
# Keys of a span for each row of its requests, at least, and where that ends: fewer cost more in merging than the caches
# bring.
_KEYS_PER_ROW = 8
_SPAN_KEYS = 1 << 17
# Tokens of a causal run that share one call, and elements of one mask. Fewer tokens gather less work
# above the diagonal, more give longer products.
_CAUSAL_TOKENS = 128
_MASK_ELEMENTS = 8 << 20
# Slots and masks of all requests that are made together: that takes fewer calls than one for each group.
_SHARED_ELEMENTS = 1 << 20


def attend_paged(
    op: str,
    cache: Rows,
    page_size: int,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mla_decode in PyTorch, over any cache of rows, for the op of that name."""
    batch, s_q, heads, latent = q_nope.shape
    if batch == 0 or s_q == 0 or heads == 0:
        return torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device), _empty_lse(q_nope)
    lengths = seq_lens.tolist()
    if min(lengths) < 0:
        raise ValueError(f"{op}: seq_lens must not be negative, got {min(lengths)}")
    most = -(-max(lengths) // page_size)
    if most > block_table.shape[1]:
        raise ValueError(
            f"{op}: seq_lens reach {max(lengths)} tokens, {most} pages, "
            f"but block_table has {block_table.shape[1]} columns"
        )
    if most and not cache.count:
        raise ValueError(f"{op}: seq_lens must be 0 for a cache without pages, got {max(lengths)}")
    order = sorted(range(batch), key=lengths.__getitem__)
    in_order = order == list(range(batch))
    q = joined(q_nope, q_pe)
    # [B, 1, s_q H, C + R]
    q = (torch.cat([q_nope, q_pe], -1) if q is None else q).flatten(1, 2)[:, None]
    if not in_order:
        index = torch.tensor(order, device=q.device)
        q, block_table, seq_lens = (x.index_select(0, index) for x in (q, block_table, seq_lens))
        lengths = [lengths[i] for i in order]
    requests = _Requests(op, cache, page_size, block_table, seq_lens, lengths, s_q, causal, q.dtype)
    calls = list(_calls(q, lengths))
    # [B, 1, s_q H, C], [B, 1, s_q H]. Written call by call: results that stayed between two calls would keep the C
    # library from using the room of the first ones again.
    sorted_out = torch.empty(*q.shape[:3], latent, dtype=q.dtype, device=q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    sorted_lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for rows, cut in calls:
        part, sorted_lse[rows] = _attend_requests(q[rows], requests, rows, heads, softmax_scale, cut)
        sorted_out[rows] = part[..., :latent]
        del part
    if may_be_inexact(sorted_lse, q):
        for rows, cut in calls:
            if not requests.sharp(cut):
                _sharpen(sorted_lse[rows], q[rows], requests, rows, heads, softmax_scale, cut)
    if not in_order:
        inverse = torch.tensor(sorted(range(batch), key=order.__getitem__), device=q.device)
        sorted_out, sorted_lse = sorted_out.index_select(0, inverse), sorted_lse.index_select(0, inverse)
    lse = _empty_lse(q_nope).copy_(sorted_lse.view(batch, s_q, heads).transpose(1, 2))
    return sorted_out.view(q_nope.shape), lse


def _empty_lse(q_nope):
    batch, s_q, heads, _ = q_nope.shape
    return torch.empty(batch, heads, s_q, dtype=torch.float32, device=q_nope.device)


def _calls(q, lengths):
    """Which of the requests, sorted by their lengths, go together, and how their keys are cut."""
    rows, room, threads = q.shape[2], at_once(q, q.shape[3]), 1
    if q.device.type == "cpu":  # those that the rows of one request do not fill
        threads = -(-torch.get_num_threads() // -(-rows // _THREAD_ROWS))
    first = 0
    for _, members in itertools.groupby(lengths, _alike):
        last = first + len(list(members))
        together = max(room // max(lengths[last - 1], 1), threads)
        for start in range(first, last, together):
            stop = min(start + together, last)
            yield slice(start, stop), _Cut.of(lengths[stop - 1], stop - start, rows, room, threads)
        first = last


def _alike(length):
    """The same number for lengths that go together, 0 for none."""
    units = -(-length // _LENGTH_UNIT)
    step = 1 << max(units.bit_length() - 3, 0)
    return -(-units // step) * step


class _Cut(NamedTuple):
    """How the keys of some requests are cut: `spans` one after the other, each in `splits` for threads."""

    spans: list[tuple[int, int]]
    splits: int
    tile: int  # what the keys of a call are a multiple of

    @property
    def whole(self) -> bool:
        """All keys at once."""
        return len(self.spans) == self.splits == 1

    @classmethod
    def of(cls, longest: int, requests: int, rows: int, room: int, threads: int) -> _Cut:
        """For requests of up to `longest` keys and `rows` each: at most `room` keys at once, if they are not few."""
        count = max(1, -(-longest // max(room // requests, min(_KEYS_PER_ROW * rows, _SPAN_KEYS))))
        splits = max(1, min(threads // requests, longest // count // _THREAD_KEYS))
        tile = _KEY_TILE * splits
        span = max(1, -(-longest // count // tile)) * tile
        spans = [(start, min(start + span, -(-longest // tile) * tile)) for start in range(0, longest, span)]
        return cls(spans, splits, tile)


class _Requests:
    """Requests in the order of their lengths: which slots their keys are in, and which of them each row sees."""

    def __init__(self, op, cache, page_size, block_table, seq_lens, lengths, s_q, causal, dtype) -> None:
        self._lengths = lengths  # seq_lens on the host
        self._s_q, self._causal = s_q, causal and s_q > 1
        self._op, self._cache, self._page_size = op, cache, page_size
        self._table, self._seq_lens, self._dtype = block_table, seq_lens[:, None], dtype
        self._covered, self._first, self._slots, self._mask = slice(0, 0), 0, None, None

    def sharp(self, cut):
        """Whether the lse of a call is exact as it comes: that of a causal run, of which few rows are small, where all
        its keys are at hand."""
        return self._causal and cut.whole

    def cover(self, rows, start, stop):
        """Have the slots of these requests' keys from `start` to `stop` at hand; while they are few, those of all keys,
        and of all requests that follow."""
        covered, first = self._covered, self._first
        if covered.start <= rows.start and rows.stop <= covered.stop and first <= start:
            if stop <= first + self._slots.shape[1]:
                return
        rest = slice(rows.start, len(self._lengths))
        longest = max(stop, -(-self._lengths[-1] // _KEY_TILE) * _KEY_TILE)
        if (rest.stop - rest.start) * longest <= _SHARED_ELEMENTS:
            rows, start, stop = rest, 0, longest
        lengths, shift = self._seq_lens[rows], self._page_size.bit_length() - 1
        key = torch.arange(start, stop, device=lengths.device)
        # Behind a request's last key comes the last key again: what the cache holds there may be NaN, and 0 x NaN is
        # NaN, and the table's entry may be no page. (Shifts: a quotient of integers takes PyTorch six times as long.)
        position = torch.minimum(key, lengths - 1)
        page = self._table[rows].long().gather(1, position >> shift)
        self._slots = (page << shift) + (position & (self._page_size - 1))
        self._mask = None if self._causal else self._hide(key >= lengths)[:, None, None]
        self._covered, self._first = rows, start

    def keys(self, rows, start, stop):
        """`[G, stop - start, C + R]`."""
        self.cover(rows, start, stop)
        slots = self._slots[self._within(rows), start - self._first : stop - self._first]
        try:
            return self._cache.gather(slots.reshape(-1)).view(*slots.shape, -1)
        except IndexError as error:
            size = self._page_size
            low, high = (int(slot) // size for slot in slots.aminmax())
            raise ValueError(
                f"{self._op}: block_table must hold pages below {self._cache.count // size}, got {low} to {high}"
            ) from error

    def blocks(self, rows, start, stop, heads, tile):
        """What the rows of a request see of these keys: slice of rows, how many keys, additive mask `[G, 1, 1 or rows,
        keys]`, and how many the row that sees fewest does; rows that see none are left out.

        A block of a causal run at a time, over the keys it sees: so the masks are linear in the keys, and about half of
        a long run's scores is never computed.
        """
        shortest, longest = self._lengths[rows.start], self._lengths[rows.stop - 1]
        if not self._causal:
            self.cover(rows, start, stop)
            mask = self._mask[self._within(rows), ..., start - self._first : stop - self._first]
            yield slice(None), stop - start, mask, shortest - start
            return
        room = _MASK_ELEMENTS // ((rows.stop - rows.start) * heads * (stop - start))
        some = max(1, min(_CAUSAL_TOKENS, room))
        for first in range(0, self._s_q, some):
            last = min(first + some, self._s_q)
            # Token i of s_q sees a request's keys but for the last s_q - 1 - i.
            count = longest - self._s_q + last - start
            if count > 0:
                seen = min(-(-count // tile) * tile, stop - start)
                key = torch.arange(start, start + seen, device=self._seq_lens.device)
                ends = self._seq_lens[rows] - self._s_q + torch.arange(first + 1, last + 1, device=key.device)
                hidden = self._hide(key >= ends[..., None])
                mask = hidden[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)[:, None]
                yield slice(first * heads, last * heads), seen, mask, shortest - self._s_q + first + 1 - start

    def _within(self, rows):
        first = self._covered.start
        return slice(rows.start - first, rows.stop - first)

    def _hide(self, hidden):
        return torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, _NO_KEY)


def _attend_requests(q, requests, rows, heads, scale, cut):
    """Requests of similar length: q `[G, 1, s_q H, D]` -> out `[G, 1, s_q H, D]` of q's dtype, lse `[G, 1, s_q H]`."""
    if not cut.spans:
        return torch.zeros_like(q), torch.full(q.shape[:3], _NO_KEY, dtype=torch.float32, device=q.device)
    out = lse = None
    for start, stop in cut.spans:
        part, part_lse = _attend_span(q, requests, rows, heads, scale, start, stop, cut)
        out, lse = (part, part_lse) if out is None else merge(out, lse, part, part_lse)
    return out.to(q.dtype), lse


def _attend_span(q, requests, rows, heads, scale, start, stop, cut):
    """The same over the keys from `start` to `stop` alone."""
    k = requests.keys(rows, start, stop)
    out = lse = None
    for some, seen, mask, fewest in requests.blocks(rows, start, stop, heads, cut.tile):
        some_q, sharp = q[:, :, some], requests.sharp(cut)
        part, part_lse = _attend_keys(some_q, k[:, :seen], scale, mask, fewest, cut.splits, sharp)
        if part.shape == q.shape:
            return part, part_lse
        if out is None:
            out = torch.zeros(q.shape, dtype=part.dtype, device=q.device)
            lse = torch.full(q.shape[:3], _NO_KEY, dtype=part_lse.dtype, device=q.device)
        out[:, :, some], lse[:, :, some] = part, part_lse
    return out, lse


def _attend_keys(q, k, scale, mask, fewest, splits, sharp):
    """q `[G, 1, rows, D]`, k `[G, keys, D]`, mask `[G, 1, 1 or rows, keys]` -> out `[G, 1, rows, D]`, lse `[G, 1,
    rows]`, where it is small exact only if `sharp`. Each row sees at least `fewest` keys, the first ones."""
    # The splits are attend's heads, and the heads and s_q's tokens its rows: one row of the mask may serve them all.
    if splits == 1:
        k = k[:, None]
    else:
        q, k = q.expand(-1, splits, -1, -1), k.unflatten(1, (splits, -1))
        mask = mask.unflatten(3, (splits, -1)).squeeze(1).transpose(1, 2)
    out, lse = attend(q, k, k, scale, mask, exact_lse=sharp)
    if fewest <= (splits - 1) * k.shape[2]:
        blind = mask.amax(-1) == _NO_KEY
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, _NO_KEY)
    if splits == 1:
        return out, lse
    total = lse.logsumexp(1, keepdim=True)
    weight = (lse - total.clamp(min=_LEAST)).exp()
    return (out * weight[..., None]).sum(1, keepdim=True), total


def _sharpen(lse, q, requests, rows, heads, scale, cut):
    """Compute the small ones of lse `[G, 1, s_q H]` anew, in place, by products in float32."""
    small = is_small(lse)
    concerned = small.flatten(1).any(1).nonzero()[:, 0]
    if not len(concerned):
        return
    exact = torch.full_like(lse, _NO_KEY)
    for start, stop in cut.spans:
        k = None
        for some, seen, mask, _ in requests.blocks(rows, start, stop, heads, cut.tile):
            if small[:, :, some].any():
                k = requests.keys(rows, start, stop)[concerned, None] if k is None else k
                part = lse_in_float32(q[:, :, some][concerned], k[:, :, :seen], scale, mask[concerned])
                exact[concerned, :, some] = torch.logaddexp(exact[concerned, :, some], part)
    lse.copy_(torch.where(small, exact, lse))
