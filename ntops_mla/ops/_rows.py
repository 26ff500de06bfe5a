"""A paged cache as the references read it: one list of rows, the latent and the RoPE columns side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ntops_mla.ops._fp8 import dequantize

# Bytes of rows that a reference gathers at once; on a CPU so many for each thread. What is gathered and its scores
# stay in the caches then, and are no new pages of memory each time, which cost more than the products.
_GATHER_BYTES = 256 << 20
_CPU_GATHER_BYTES = 5 << 20


class Rows(NamedTuple):
    """gather: index int64 `[n]`, page * page_size + slot, each from 0 and below `count` -> rows `[n, C + R]` in q's
    dtype, a copy; IndexError for one that is not there.
    """

    gather: Callable[[torch.Tensor], torch.Tensor]
    count: int


def at_once(like: torch.Tensor, columns: int) -> int:
    """How many rows of `columns` of like's dtype are gathered at once on its device."""
    room = _CPU_GATHER_BYTES * torch.get_num_threads() if like.device.type == "cpu" else _GATHER_BYTES
    return max(1, room // (columns * like.element_size()))


def rows_of(kv_cache: torch.Tensor, pe_cache: torch.Tensor) -> Rows:
    """The rows of `[pages, page_size, C]` and `[pages, page_size, R]`, read once where they lie in one storage."""
    pages, page_size, _ = kv_cache.shape
    both = joined(kv_cache, pe_cache)
    halves = (kv_cache, pe_cache) if both is None else (both,)

    def gather(index: torch.Tensor) -> torch.Tensor:
        parts = [read_rows(half, index) for half in halves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    return Rows(gather, pages * page_size)


def rows_of_bytes(cache: torch.Tensor, dtype: torch.dtype) -> Rows:
    """The rows of `[pages, page_size, 656]`, dequantised to `dtype`."""
    tokens = cache.view(torch.uint8)
    return Rows(lambda index: dequantize(read_rows(tokens, index), dtype), cache.shape[0] * cache.shape[1])


def read_rows(cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """cache `[pages, page_size, D]`, rows by index int64 `[n]`, page * page_size + slot: `[n, D]`, a copy; on a CPU
    IndexError for one that is not there."""
    pages, page_size, width = cache.shape
    page_stride, slot_stride, column_stride = cache.stride()
    if page_size == 1:
        return cache[:, 0].index_select(0, index)
    if pages == 1:
        return cache[0].index_select(0, index)
    if page_stride != page_size * slot_stride and index.device.type == "cpu" and len(index):
        # Where pages lie otherwise than one behind the other, what is none may be another page's slot.
        low, high = index.aminmax()
        if low < 0 or high >= pages * page_size:
            raise IndexError(f"index must be below {pages * page_size}, got {int(low)} to {int(high)}")
    # One list of rows that begin every `unit` elements: index_select is four times as fast as an index of two parts.
    unit = math.gcd(page_stride, slot_stride)
    if not unit:
        return cache[index // page_size, index % page_size]
    count = ((pages - 1) * page_stride + (page_size - 1) * slot_stride) // unit + 1
    if page_stride != page_size * slot_stride:
        index = index // page_size * (page_stride // unit) + index % page_size * (slot_stride // unit)
    return cache.as_strided((count, width), (unit, column_stride)).index_select(0, index)


def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """`[..., Da + Db]` as a view where `b`'s columns follow `a`'s in one storage, else None."""
    width = a.shape[-1]
    if (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.shape[:-1] == b.shape[:-1]
        and a.stride() == b.stride()
        and a.stride(-1) == 1
        and b.storage_offset() == a.storage_offset() + width
    ):
        return a.as_strided((*a.shape[:-1], width + b.shape[-1]), a.stride(), a.storage_offset())
    return None
