"""rms_norm: root mean square normalisation of whole rows."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check
from ntops_mla.ops._op import register
from ntops_mla.platform import Platform

_MAX_ROW = 16384  # a kernel holds a whole row


def rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalise each row by its root mean square.

    out = input / sqrt(mean(input^2) + eps) * weight, computed in float32 and rounded once.

    input: `[..., D]`, bfloat16, float16, float32 (float64: PyTorch). weight: `[D]`, the same dtype. Returns `[..., D]`.
    Raises TypeError or ValueError that names the argument. Source: arXiv 1910.07467; arXiv 2405.04434, section 2.1.
    """
    return torch.ops.ntops_mla.rms_norm(input, weight, eps)


def _check_args(input, weight, eps):
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"rms_norm: input must be a tensor [..., D], got {type(input).__name__}")
    if input.dim() < 1:
        raise ValueError(f"rms_norm: input must be [..., D], got shape {list(input.shape)}")
    _check.dtype("rms_norm", "input", input)
    _check.tensor("rms_norm", "weight", weight, "[D]", 1)
    _check.size("rms_norm", "weight", weight, 0, input.shape[-1], "[D]")
    _check.same("rms_norm", "input", input, ("weight", weight))
    _check.number("rms_norm", "eps", eps)


def normalise(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The PyTorch reference."""
    if input.dtype == torch.float64:
        return F.rms_norm(input, weight.shape, weight, eps).contiguous()
    return F.rms_norm(input.float(), weight.shape, weight.float(), eps).to(input.dtype).contiguous()


def _fake(input, weight, eps):
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _key(input, weight, eps):
    return (input.dtype,), (input.shape[-1],)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    if sizes[0] > _MAX_ROW:
        return f"rows of {sizes[0]} elements; the kernel holds whole rows of at most {_MAX_ROW}"
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return [Needed("rms_norm", board.tile("rms_norm", dtypes[0], width=sizes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, width: int) -> Kernel:
    tile = board.tile("rms_norm", dtype, width=width)
    return board.make("rms_norm", tile, width=width)


def _kernel(board: Board, input, weight, eps):
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if out.numel():
        width = weight.shape[0]
        _made(board, input.dtype, width)(input.reshape(-1, width), weight, eps, out.view(-1, width))
    return out


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, kv_lora_rank=512, **_):
    return (
        torch.randn(tokens, kv_lora_rank, device=device, dtype=dtype),
        torch.ones(kv_lora_rank, device=device, dtype=dtype),
        1e-6,
    )


rms_norm = register(
    rms_norm,
    schema="(Tensor input, Tensor weight, float eps=1e-6) -> Tensor",
    check=_check_args,
    fake=_fake,
    reference=normalise,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
)
