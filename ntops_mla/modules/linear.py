"""x W^T as the device at hand does it best."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

# Tokens whose product with a weight PyTorch does faster with the operands swapped, in bfloat16 on a CPU with AMX: the
# weight is then read as it lies, and what is packed for the matrix unit is the few tokens. Measured on two cores: 2 to
# 64 tokens 1.3 to 1.7 times, 128 tokens 1.15, 256 tokens 0.85; weights of 512 columns, float16 and float32: not faster.
# Without AMX a few tokens take up to seven times as long.
_FEW = range(2, 129)
_LEAST_COLUMNS = 1024


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` or None -> `[T, out]`, contiguous."""
    if bias is not None or not _swapped(x, weight):
        return F.linear(x, weight, bias)
    return torch.mm(weight, x.t()).t().contiguous()


def _swapped(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    return len(x) in _FEW and weight.shape[1] >= _LEAST_COLUMNS and _has_amx()


@functools.lru_cache(maxsize=1)
def _has_amx() -> bool:
    # Not public, and not there before PyTorch 2.6
    asks = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asks is not None and asks()


def linear_with_room(x: torch.Tensor, weight: torch.Tensor, room: int) -> torch.Tensor:
    """`x W^T` `[T, out]`, on a CPU with `room` elements of anything behind its last one, for a view that reaches past
    it; not where a gradient is recorded."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return F.linear(x, weight)
    size = len(x) * len(weight)
    return torch.mm(x, weight.t(), out=x.new_empty(size + room)[:size].view(len(x), len(weight)))
