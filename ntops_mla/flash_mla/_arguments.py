"""What the functions here ask of their arguments, and how they pass on an op's complaint."""

from __future__ import annotations

import numbers

import torch

from ntops_mla.ops import _check
from ntops_mla.ops._fp8 import LATENT, ROPE, TOKEN_BYTES
from ntops_mla.ops.mla_decode_fp8 import check_bytes

# Element types that an fp8 cache may come in: its bytes are what counts.
_BYTES = (torch.float8_e4m3fn, torch.uint8, torch.int8)
_MODEL1 = (
    "heads of 512 columns, 448 + 64, and their cache of 584 bytes a token are not implemented: 576 columns, 512 + 64, "
    "and 656 bytes are"
)


def lengths(op: str, cache_seqlens: object) -> None:
    """cache_seqlens is int32 `[B]`."""
    _check.tensor(op, "cache_seqlens", cache_seqlens, "[B]", 1)
    _check.dtype(op, "cache_seqlens", cache_seqlens, (torch.int32,))


def scale(op: str, softmax_scale: float | None, q: torch.Tensor) -> float:
    """softmax_scale, None: 1 / sqrt of q's columns."""
    return max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else number(op, "softmax_scale", softmax_scale)


def number(op: str, name: str, value: object) -> float:
    """`value` is a number."""
    # What is a number and no Python one, numpy's say, becomes one
    value = float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)) else value
    _check.number(op, name, value)
    return value


def columns(op: str, q: torch.Tensor, name: str, value: object, *, fp8: bool = False) -> None:
    """`value`, the columns of the value, fit q; FlashMLA's other layout is refused by its name."""
    _check.count(op, name, value, 1)
    if q.shape[-1] == 512:
        raise NotImplementedError(f"{op}: q: {_MODEL1}")
    if fp8:
        for argument, found, expected in (("q", q.shape[-1], LATENT + ROPE), (name, value, LATENT)):
            if found != expected:
                raise ValueError(f"{op}: {argument} must be of {expected} columns over an fp8 cache, got {found}")
    if value >= q.shape[-1]:
        raise ValueError(
            f"{op}: {name} must be below the {q.shape[-1]} columns of q and the keys (512 of 576, 256 of 288), "
            f"got {value}"
        )


def cache(op: str, name: str, value: object, q: torch.Tensor, fp8: bool) -> torch.Tensor:
    """The latents `[pages, page_size, 576]` of a cache `[pages, page_size, 1, 576]`, or the bytes of an fp8 one."""
    width = TOKEN_BYTES if fp8 else q.shape[-1]
    shape = f"[pages, page_size, 1, {width}]"
    _check.tensor(op, name, value, shape, 4)
    if value.shape[2] != 1:
        raise ValueError(
            f"{op}: {name} must be {shape}, one latent that all heads share (h_kv 1), got h_kv {value.shape[2]} in "
            f"shape {list(value.shape)}"
        )
    _check.any_page_size(op, name, value)
    if not fp8:
        _check.size(op, name, value, 3, width, shape)
        _check.same(op, "q", q, (name, value))
        return value[:, :, 0]
    _check.dtype(op, name, value, _BYTES)
    if value.shape[3] == 584:
        raise NotImplementedError(f"{op}: {name}: {_MODEL1}")
    _check.size(op, name, value, 3, width, shape)
    _check.same_device(op, "q", q, (name, value))
    found = value.view(torch.uint8)[:, :, 0]
    # With a page's tokens adjacent, as FlashMLA wants them. While a call is traced nobody knows an offset: the op asks.
    if not torch.compiler.is_compiling():
        check_bytes(op, name, found)
    return found


def indices(
    op: str, q: torch.Tensor, given: tuple[str, object], counts: tuple[str, object], shape: tuple, text: str
) -> None:
    """(name, indices) int32 of `shape`, whose last size is free, and (name, their counts or None) int32."""
    name, value = given
    _check.tensor(op, name, value, text, 3)
    _check.dtype(op, name, value, (torch.int32,))
    for dim, expected in enumerate(shape):
        _check.size(op, name, value, dim, expected, text)
    _check.same_device(op, "q", q, given)
    name, value = counts
    if value is not None:
        rows = f"[{text.strip('[]').split(', ')[0]}]"
        _check.tensor(op, name, value, rows, 1)
        _check.dtype(op, name, value, (torch.int32,))
        _check.size(op, name, value, 0, shape[0], rows)
        _check.same_device(op, "q", q, counts)


def sink(op: str, q: torch.Tensor, heads: int, value: object) -> None:
    """attn_sink is None or float32 `[H]`."""
    if value is None:
        return
    _check.tensor(op, "attn_sink", value, "[H]", 1)
    _check.dtype(op, "attn_sink", value, (torch.float32,))
    _check.size(op, "attn_sink", value, 0, heads, "[H]")
    _check.same_device(op, "q", q, ("attn_sink", value))


def renamed(error: ValueError, inner: str, op: str, names: dict[str, str]) -> ValueError:
    """The op's complaint about a value, with FlashMLA's names of the arguments."""
    text = str(error).replace(f"{inner}: ", f"{op}: ")
    for name, ours in names.items():
        text = text.replace(name, ours)
    return ValueError(text)
