"""Argument checks shared by the ops: each names the argument, what came and what is allowed."""

from __future__ import annotations

import numbers

import torch

from ntops_mla.ops._op import FLOATS


def tensor(op: str, name: str, value: object, shape: str, dims: int) -> None:
    """`value` is a tensor of rank `dims`; `shape` is the text of what is expected."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got one of layout {value.layout}")
    if value.dim() != dims:
        raise ValueError(f"{op}: {name} must be {shape}, got shape {list(value.shape)}")


def size(op: str, name: str, value: torch.Tensor, dim: int, expected: int, shape: str) -> None:
    """Dimension `dim` of `value` is `expected`."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{op}: {name} must be {shape} with {expected} in dimension {dim}, got shape {list(value.shape)}"
        )


def dtype(op: str, name: str, value: torch.Tensor, allowed: tuple[torch.dtype, ...] = FLOATS) -> None:
    """`value` has one of the allowed element types."""
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be of {names}, got {value.dtype}")


def same(op: str, first: str, a: torch.Tensor, *others: tuple[str, torch.Tensor]) -> None:
    """All are on one device and of one element type."""
    for name, b in others:
        if b.dtype != a.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first}, {a.dtype}, got {b.dtype}")
    same_device(op, first, a, *others)


def same_device(op: str, first: str, a: torch.Tensor, *others: tuple[str, torch.Tensor]) -> None:
    """All are on one device."""
    for name, b in others:
        if b.device != a.device:
            raise ValueError(f"{op}: {name} must be on the device of {first}, {a.device}, got {b.device}")


def number(op: str, name: str, value: object, *, positive: bool = False) -> None:
    """`value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if positive and not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")


def count(op: str, name: str, value: object, least: int) -> None:
    """`value` is an integer, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def flag(op: str, name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def cu_seqlens(op: str, q: torch.Tensor, queries: tuple[str, object], keys: tuple[str, object]) -> None:
    """Both (name, value) pairs are int32 `[B + 1]` of one B, on q's device."""
    for name, value in (queries, keys):
        tensor(op, name, value, "[B + 1]", 1)
        dtype(op, name, value, (torch.int32,))
    if queries[1].shape != keys[1].shape or queries[1].shape[0] < 1:
        raise ValueError(
            f"{op}: {queries[0]} and {keys[0]} must both be [B + 1], got {list(queries[1].shape)} and "
            f"{list(keys[1].shape)}"
        )
    same_device(op, "q", q, queries, keys)


def any_page_size(op: str, name: str, cache: torch.Tensor) -> None:
    """`cache` `[pages, page_size, ...]` has slots in a page."""
    if cache.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have a page size of at least 1, got shape {list(cache.shape)}")


def page_size(op: str, name: str, value: int) -> None:
    """`value` slots in a page: a power of two."""
    if value <= 0 or value & (value - 1):
        raise ValueError(f"{op}: {name} must have a page size that is a power of two, got {value}")
