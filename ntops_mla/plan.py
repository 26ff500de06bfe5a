"""Plan: which requests of a step run absorbed and which expanded, and how expansion is cut to bounded memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ntops_mla.config import MLAConfig
from ntops_mla.ops.mla_schedule import decode_schedule
from ntops_mla.platform import detect

if TYPE_CHECKING:
    from ntops_mla.cache import Step

FORMS = (None, "absorbed", "expanded")

# Bytes of expanded keys and values alive at once: a longer past is expanded in chunks and merged by the lse.
EXPANSION_BYTES = 256 << 20
# On a CPU a few heads are expanded at a time: the C library maps large buffers anew at every allocation, and the page
# faults cost more than the products (measured: R1's kv_b_proj over 1472 tokens takes 54 ms into a new buffer, 23 into
# an old one; of 8, 16 and 24 MB, 8 was the fastest). All heads of a layer at once save a copy of their results, which
# is worth twice that (12 MB of 16 heads over 1472 tokens: 4 % of the step).
CPU_BUFFER_BYTES = 8 << 20

# Bytes of a block table with a row per token.
ROW_TABLE_BYTES = 64 << 20


@dataclass(frozen=True)
class AbsorbedGroup:
    """One mla_decode call: requests with the same number of new tokens, s_q, or tokens by themselves, s_q 1.

    tokens: where they are in the pack (a slice, or int64 `[B * s_q]`); block_table int32 `[B, max_pages]`, seq_lens
    int32 `[B]`.
    """

    s_q: int
    tokens: slice | torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    _schedules: dict[int, torch.Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def schedule(self, heads: int, page_size: int) -> torch.Tensor | None:
        """How the calls of all layers with so many heads share out their keys, made once."""
        if heads not in self._schedules:
            keys = self.block_table.shape[1] * page_size
            self._schedules[heads] = decode_schedule(self.seq_lens, self.s_q * heads, keys)
        return self._schedules[heads]


@dataclass(frozen=True)
class Segment:
    """One mla_prefill call over keys expanded together: `rows` of the expanded tokens, packed bounds, causal."""

    rows: slice
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    causal: bool


@dataclass(frozen=True)
class Chunk:
    """Cache slots int64 `[Tk]` expanded together, `heads` at a time; the calls that read them; merge by lse or not."""

    slots: torch.Tensor
    segments: tuple[Segment, ...]
    merged: bool
    heads: int

    def one_call(self, heads: int) -> bool:
        """Whether one mla_prefill is all that a chunk of `heads` heads takes."""
        return len(self.segments) == 1 and self.heads == heads


@dataclass(frozen=True)
class Plan:
    """A step's work: absorbed groups, then chunks for the expanded tokens (a slice, int64 `[Te]`, or None: none)."""

    absorbed: tuple[AbsorbedGroup, ...]
    expanded: slice | torch.Tensor | None
    chunks: tuple[Chunk, ...]


def prefers_expanded(cfg: MLAConfig, new: int, past: int, attention_flop_cost: float = 1.0) -> bool:
    """Whether `new` tokens on a `past` cost less in expanded than in absorbed form.

    Per head and (query, key) pair expanded attention takes 2 (Dqk + Dv) FLOP and absorbed 2 (2 C + R); expanding a past
    token takes 2 C (Dnope + Dv) per head. (Absorbing the new tokens' queries and values costs what expanding their own
    keys and values does.) A single token stays absorbed even without a past, where the two are level: a decode step
    then has one form, whatever its lengths.
    """
    if new == 1:
        return False
    pairs = new * past + new * (new + 1) // 2
    saved = (2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim) - (cfg.qk_head_dim + cfg.v_head_dim)
    return attention_flop_cost * pairs * saved > past * cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)


def check_form(form: object) -> None:
    """Raise TypeError or ValueError unless `form` is one of FORMS."""
    allowed = ", ".join(map(repr, FORMS))
    if form is not None and not isinstance(form, str):
        raise TypeError(f"form must be one of {allowed}, got {form!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {allowed}, got {form!r}")


def make_plan(step: Step, form: str | None) -> Plan:
    """Sort a step's requests into forms; `form` "absorbed" or "expanded" forces one for all."""
    cfg = step.cache.cfg
    if form is None:
        cost = _attention_flop_cost(step)
        pairs = zip(step.lengths, step.past_lengths, strict=True)
        expanded = [prefers_expanded(cfg, new, past, cost) for new, past in pairs]
    else:
        expanded = [form == "expanded"] * len(step.lengths)
    groups: dict[int, list[int]] = {}
    for index, (new, is_expanded) in enumerate(zip(step.lengths, expanded, strict=True)):
        if not is_expanded:
            groups.setdefault(new, []).append(index)
    chosen = [index for index, is_expanded in enumerate(expanded) if is_expanded]
    starts = [0]
    for new in step.lengths:
        starts.append(starts[-1] + new)
    if len(groups) > 1 and _goes_by_row(step, sum(s_q * len(members) for s_q, members in groups.items())):
        absorbed = (_by_row(step, starts, sorted(itertools.chain(*groups.values()))),)
    else:
        absorbed = tuple(_group(step, starts, s_q, members) for s_q, members in groups.items())
    if not chosen:
        return Plan(absorbed, None, ())
    return Plan(absorbed, _tokens(step, starts, chosen), tuple(_chunks(step, chosen)))


def _attention_flop_cost(step: Step) -> float:
    platform = detect(step.cache.device).platform
    return 1.0 if platform is None else platform.attention_flop_cost.value


def _tokens(step: Step, starts: list[int], members: list[int]) -> slice | torch.Tensor:
    """Where the members' tokens are in the pack: a slice where they follow each other, which costs no copy."""
    if members[-1] - members[0] == len(members) - 1:
        return slice(starts[members[0]], starts[members[-1] + 1])
    return torch.cat([torch.arange(starts[i], starts[i + 1], device="cpu") for i in members]).to(step.cache.device)


def _group(step: Step, starts: list[int], s_q: int, members: list[int]) -> AbsorbedGroup:
    tokens = _tokens(step, starts, members)
    if len(members) == len(step.lengths):
        return AbsorbedGroup(s_q, tokens, step.block_table, step.seq_lens)
    index = torch.tensor(members, device="cpu").to(step.cache.device)
    return AbsorbedGroup(s_q, tokens, step.block_table.index_select(0, index), step.seq_lens.index_select(0, index))


def _goes_by_row(step: Step, tokens: int) -> bool:
    """Whether requests with unequal numbers of new tokens, `tokens` in all, go in one call, a row per token.

    Not on a CPU, where the tokens of a request share its gathered keys and longer products (16 requests of 500 tokens,
    16 heads, bfloat16: 1 to 16 new ones take 26 ms by length and 61 by row, 1 or 2 new ones 6.1 and 7.5). And not where
    the rows' block table would grow with the square of a long run.
    """
    return step.cache.device.type != "cpu" and tokens * step.block_table.shape[1] * 4 <= ROW_TABLE_BYTES


def _by_row(step: Step, starts: list[int], members: list[int]) -> AbsorbedGroup:
    """A row per token: its request's row of the block table, and the keys up to itself."""
    tokens = _tokens(step, starts, members)
    owners = [index for index in members for _ in range(step.lengths[index])]
    table = step.block_table.index_select(0, torch.tensor(owners, device="cpu").to(step.cache.device))
    return AbsorbedGroup(1, tokens, table, (step.positions[tokens] + 1).to(torch.int32))


def _chunks(step: Step, members: list[int]):
    """Cut the members' keys into chunks of at most EXPANSION_BYTES: whole requests together, long ones in pieces."""
    cfg = step.cache.cfg
    # kv_b_proj's output and the keys built from it, all heads
    columns = cfg.qk_nope_head_dim + cfg.v_head_dim + cfg.qk_head_dim
    limit = max(1, EXPANSION_BYTES // (cfg.num_heads * columns * step.cache.dtype.itemsize))
    row, pending, pending_keys = 0, [], 0
    for index in members:
        new, past = step.lengths[index], step.past_lengths[index]
        keys = past + new
        if pending and pending_keys + keys > limit:
            yield _whole(step, pending, row - sum(step.lengths[i] for i in pending))
            pending, pending_keys = [], 0
        if keys > limit:
            yield from _pieces(step, index, row, limit)
        else:
            pending.append(index)
            pending_keys += keys
        row += new
    if pending:
        yield _whole(step, pending, row - sum(step.lengths[i] for i in pending))


def _whole(step: Step, members: list[int], row: int) -> Chunk:
    """Whole requests, whose tokens are rows from `row` on: one causal call."""
    bounds, key_bounds, slots = [0], [0], []
    for index in members:
        new, keys = step.lengths[index], step.past_lengths[index] + step.lengths[index]
        bounds.append(bounds[-1] + new)
        key_bounds.append(key_bounds[-1] + keys)
        slots.append(_slots(step, index, 0, keys))
    segment = Segment(slice(row, row + bounds[-1]), _bounds(step, bounds), _bounds(step, key_bounds), True)
    slots = slots[0] if len(slots) == 1 else torch.cat(slots)
    return Chunk(slots, (segment,), False, _heads_at_once(step, len(slots)))


def _pieces(step: Step, index: int, row: int, limit: int):
    """One long request by key ranges: rows whose position lies in a range meet its diagonal, later rows see all."""
    new, past = step.lengths[index], step.past_lengths[index]
    for first in range(0, past + new, limit):
        last = min(first + limit, past + new)
        keys = _bounds(step, [0, last - first])
        segments = []
        begin, meet = max(first - past, 0), max(last - past, 0)
        if begin < meet:
            segments.append(Segment(slice(row + begin, row + meet), _bounds(step, [0, meet - begin]), keys, True))
        if meet < new:
            segments.append(Segment(slice(row + meet, row + new), _bounds(step, [0, new - meet]), keys, False))
        yield Chunk(_slots(step, index, first, last), tuple(segments), True, _heads_at_once(step, last - first))


def _heads_at_once(step: Step, keys: int) -> int:
    cfg = step.cache.cfg
    if step.cache.device.type != "cpu":
        return cfg.num_heads
    per_head = keys * (cfg.qk_nope_head_dim + cfg.v_head_dim) * step.cache.dtype.itemsize
    if cfg.num_heads * per_head <= 2 * CPU_BUFFER_BYTES:
        return cfg.num_heads
    return max(1, CPU_BUFFER_BYTES // per_head)


def _bounds(step: Step, bounds: list[int]) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device="cpu").to(step.cache.device)


def _slots(step: Step, index: int, first: int, last: int) -> torch.Tensor:
    """Cache slots int64 of a request's tokens `first` to `last`."""
    position = torch.arange(first, last, device=step.cache.device)
    size = step.cache.page_size
    return step.block_table[index].index_select(0, position // size).long() * size + position % size
