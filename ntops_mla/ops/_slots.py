"""Slots of a paged cache: page * page_size + offset, -1 for a token that is skipped."""

from __future__ import annotations

import torch


def check(op: str, slots: torch.Tensor, count: int) -> bool:
    """Raise ValueError for a slot outside the `count` that there are; whether some are -1. Waits for the device."""
    low, high = slots.aminmax()
    if high >= count or low < -1:
        raise ValueError(f"{op}: slots must be -1 or below {count} (pages * page_size), got {int(low)} to {int(high)}")
    return bool(low < 0)


def write(op: str, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows `[T, width]` into cache `[pages, page_size, width]`, or nothing where a slot is bad."""
    if not len(slots):
        return
    flat = cache.view(-1, cache.shape[2])
    if check(op, slots, len(flat)):
        kept = slots >= 0
        slots, rows = slots[kept], rows[kept]
    flat.index_copy_(0, slots, rows)
