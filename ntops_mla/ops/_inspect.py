"""Looks at the values of arguments, which costs a wait for the device: under NTOPS_MLA_CHECK=1 alone.

Each raises ValueError that names the argument, the request and the position of the first wrong value.
"""

from __future__ import annotations

import torch


def table(op: str, block_table: torch.Tensor, seq_lens: torch.Tensor, pages: int, page_size: int) -> None:
    """seq_lens `[B]` lie within block_table `[B, max_pages]`, whose used entries are pages of the cache."""
    columns = block_table.shape[1]
    most = columns * page_size
    request = _first((seq_lens < 0) | (seq_lens > most))
    if request is not None:
        raise ValueError(
            f"{op}: seq_lens must be from 0 to {most}, the slots of block_table's {columns} pages, got "
            f"{int(seq_lens[request])} for request {request[0]}"
        )
    used = torch.arange(columns, device=block_table.device) * page_size < seq_lens[:, None]
    place = _first(used & ((block_table < 0) | (block_table >= pages)))
    if place is not None:
        raise ValueError(
            f"{op}: block_table must hold pages from 0 to {pages - 1}, got {int(block_table[place])} for request "
            f"{place[0]}, position {place[1]}"
        )


def schedule(op: str, value: torch.Tensor | None, seq_lens: torch.Tensor) -> None:
    """A schedule, where there is one, is mla_schedule's of these lengths."""
    if value is None:
        return
    batch = seq_lens.shape[0]
    fair = torch.ops.ntops_mla.mla_schedule(seq_lens, 1, value.shape[0] - batch)
    # How many splits each request has, then where they lie.
    splits, fair_splits = (s[: batch + 1, 3].diff() for s in (value, fair))
    request, row = _first(splits != fair_splits), _first(value != fair)
    if request is not None:
        place = request[0]
        said = f"request {place} has {int(splits[place])} splits in it, and {int(fair_splits[place])} by its length"
    elif row is not None:
        said = f"row {row[0]}, column {row[1]} is {int(value[row])}, and {int(fair[row])} by the lengths"
    else:
        return
    raise ValueError(f"{op}: schedule must be made of these seq_lens, and was made of others: {said}")


def indices(op: str, name: str, value: torch.Tensor, slots: int, counts: torch.Tensor | None = None) -> None:
    """Indices `[B, s_q, topk]` are -1 or slots of the cache, the first `counts` `[B, s_q]` of them."""
    wrong = (value < -1) | (value >= slots)
    if counts is not None:
        wrong &= torch.arange(value.shape[2], device=value.device) < counts[..., None]
    place = _first(wrong)
    if place is not None:
        raise ValueError(
            f"{op}: {name} must be -1 or from 0 to {slots - 1}, a slot of the cache, got {int(value[place])} for "
            f"request {place[0]}, token {place[1]}, position {place[2]}"
        )


def slots(op: str, value: torch.Tensor, count: int) -> None:
    """slots `[T]` are -1 or slots of the cache."""
    place = _first((value < -1) | (value >= count))
    if place is not None:
        raise ValueError(
            f"{op}: slots must be -1 or from 0 to {count - 1}, a slot of the cache, got {int(value[place])} for token "
            f"{place[0]}"
        )


def _first(wrong: torch.Tensor) -> tuple[int, ...] | None:
    """Where the first True is."""
    return tuple(wrong.nonzero()[0].tolist()) if wrong.any() else None
