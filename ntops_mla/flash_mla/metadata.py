"""FlashMLASchedMeta and get_mla_metadata: what callers of FlashMLA pass along."""

from __future__ import annotations

import dataclasses
import weakref

import torch

from ntops_mla.devices import capturing
from ntops_mla.flash_mla import _arguments
from ntops_mla.ops import _check
from ntops_mla.ops.mla_schedule import decode_schedule


@dataclasses.dataclass
class FlashMLASchedMeta:
    """What `get_mla_metadata` returns and callers pass along: how the keys of ragged requests are shared out.

    The first dense call makes the schedule, on the device, and the calls of other layers use it; a call with another
    tensor of lengths, or with one that was written to since, makes it anew. Where writes are not counted (lengths made
    in inference mode) and in a compiled graph each call makes its own. A call of other sizes is refused, as FlashMLA
    refuses it.
    """

    @dataclasses.dataclass
    class Config:
        """The sizes of the first call."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool = False
        topk: int | None = None
        extra_page_block_size: int | None = None
        extra_topk: int | None = None

    have_initialized: bool = False
    config: Config | None = None
    # mla_schedule's int32 `[n, 4]`, and of it the int32 `[B + 1]` that says where each request's splits begin; None
    # where nothing was scheduled or kept: see `schedule` below and ops/mla_schedule.py.
    tile_scheduler_metadata: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    num_splits: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    # What the schedule was made of.
    _mark: tuple | None = dataclasses.field(default=None, repr=False, compare=False)
    # What the old form of get_mla_metadata was told; None: nothing.
    _batch: int | None = dataclasses.field(default=None, repr=False)
    _rows_per_head_k: int | None = dataclasses.field(default=None, repr=False)
    _heads_q: int | None = dataclasses.field(default=None, repr=False)
    _fp8: bool = dataclasses.field(default=False, repr=False)
    _topk: int | None = dataclasses.field(default=None, repr=False)

    def __getstate__(self) -> dict:
        """Without what names a tensor of this process."""
        return {**vars(self), "_mark": None}


def schedule(meta: FlashMLASchedMeta, seq_lens: torch.Tensor, rows: int, keys: int) -> tuple:
    """(schedule or None, what it was made of) for lengths `[B]`, of s_q H = `rows` rows and at most `keys` keys."""
    # A traced call has no identity, and lengths of inference mode count no writes.
    if torch.compiler.is_compiling() or seq_lens.is_inference():
        return decode_schedule(seq_lens, rows, keys), None
    # A graph's schedule exists only once it is replayed: what was made while one is captured is for that one.
    mark = weakref.ref(seq_lens), (seq_lens._version, rows, keys, capturing(seq_lens.device))
    if meta._mark is not None and meta._mark[0]() is seq_lens and meta._mark[1] == mark[1]:
        return meta.tile_scheduler_metadata, meta._mark
    return decode_schedule(seq_lens, rows, keys), mark


def keep(meta: FlashMLASchedMeta, config: FlashMLASchedMeta.Config, made: tuple) -> None:
    """A call of these sizes has run, with what `schedule` gave."""
    meta.config, meta.have_initialized = config, True
    schedule, mark = made
    if mark is not None and mark is not meta._mark:
        meta.tile_scheduler_metadata, meta._mark = schedule, mark
        meta.num_splits = None if schedule is None else schedule[: config.b + 1, 3]


# The arguments that decide what a FlashMLASchedMeta serves, by the names of Config.
_MEANING = {
    "b": "the batch size",
    "s_q": "the query tokens of a request",
    "h_q": "the query heads",
    "page_block_size": "the page size of k_cache",
    "h_k": "the heads of k_cache",
    "causal": "causal",
    "is_fp8_kvcache": "is_fp8_kvcache",
    "topk": "the last dimension of indices",
    "extra_page_block_size": "the page size of extra_k_cache",
    "extra_topk": "the last dimension of extra_indices_in_kvcache",
}


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *args: object,
    num_q_tokens_per_head_k: int | None = None,
    **kwargs: object,
) -> tuple[FlashMLASchedMeta, None]:
    """Make the two objects that `flash_mla_with_kvcache` wants as tile_scheduler_metadata and num_splits.

    No argument is needed. The old forms' are taken and checked against the call that follows: cache_seqlens int32
    `[B]`; num_heads_per_head_k (later num_q_tokens_per_head_k) = s_q * H // num_heads_k; num_heads_k = 1; num_heads_q =
    H; is_fp8_kvcache True and topk, where given, as the call has them. Whatever else is given is not looked at, as in
    FlashMLA. Nothing is computed and no length is read.

    Returns (FlashMLASchedMeta, None). Raises TypeError or ValueError that names the argument. Source:
    deepseek-ai/FlashMLA, flash_mla_interface.py, and its first releases.
    """
    op = "get_mla_metadata"
    _check.flag(op, "is_fp8_kvcache", is_fp8_kvcache)
    meta = FlashMLASchedMeta(_fp8=is_fp8_kvcache)
    if cache_seqlens is not None:
        _arguments.lengths(op, cache_seqlens)
        meta._batch = cache_seqlens.shape[0]
    if num_heads_per_head_k is not None and num_q_tokens_per_head_k is not None:
        raise ValueError(f"{op}: num_heads_per_head_k and num_q_tokens_per_head_k are one argument, got both")
    for name, value in (
        ("num_heads_per_head_k", num_heads_per_head_k),
        ("num_q_tokens_per_head_k", num_q_tokens_per_head_k),
        ("num_heads_k", num_heads_k),
        ("num_heads_q", num_heads_q),
        ("topk", topk),
    ):
        if value is not None:
            _check.count(op, name, value, 1)
    if num_heads_k is not None and num_heads_k != 1:
        raise ValueError(f"{op}: num_heads_k must be 1, the latent that all heads share, got {num_heads_k}")
    meta._rows_per_head_k = num_heads_per_head_k if num_heads_per_head_k is not None else num_q_tokens_per_head_k
    meta._heads_q = num_heads_q
    meta._topk = topk
    return meta, None


def check(op: str, meta: object, num_splits: object, config: FlashMLASchedMeta.Config) -> None:
    """`meta` comes from here and belongs to a call of these sizes."""
    fresh = "get_mla_metadata() makes a new one"
    if not isinstance(meta, FlashMLASchedMeta):
        raise TypeError(
            f"{op}: tile_scheduler_metadata must be what ntops_mla.flash_mla.get_mla_metadata returned, a "
            f"FlashMLASchedMeta, got {type(meta).__module__}.{type(meta).__qualname__}"
        )
    if num_splits is not None:
        raise TypeError(
            f"{op}: num_splits must be None, as ntops_mla.flash_mla.get_mla_metadata returned it, got "
            f"{type(num_splits).__name__}"
        )
    made = f"{op}: tile_scheduler_metadata was made for"
    if meta._batch is not None and meta._batch != config.b:
        raise ValueError(f"{made} cache_seqlens of {meta._batch} requests, got {config.b}; {fresh}")
    if meta._heads_q is not None and meta._heads_q != config.h_q:
        raise ValueError(f"{made} num_heads_q {meta._heads_q}, got q of {config.h_q} heads; {fresh}")
    if meta._rows_per_head_k is not None and meta._rows_per_head_k != config.s_q * config.h_q:
        raise ValueError(
            f"{made} {meta._rows_per_head_k} query rows per head of k_cache, got s_q {config.s_q} times {config.h_q} "
            f"heads; {fresh}"
        )
    if meta._fp8 and not config.is_fp8_kvcache:
        raise ValueError(f"{made} is_fp8_kvcache True, got False; {fresh}")
    if meta._topk is not None and meta._topk != config.topk:
        raise ValueError(f"{made} topk {meta._topk}, got {config.topk} (the last dimension of indices); {fresh}")
    if meta.config is None or meta.config == config:
        return
    for name, meaning in _MEANING.items():
        before, now = getattr(meta.config, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"{op}: tile_scheduler_metadata was used with another size before: {meaning} was {before}, got {now}; "
                f"{fresh}"
            )
