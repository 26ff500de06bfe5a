"""latent_dequantize: rows of FlashMLA's fp8 cache, gathered by slot and made whole."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check, _fp8, _inspect, _slots
from ntops_mla.ops._op import FLOATS, register
from ntops_mla.ops.latent_quantize import check_cache, check_slots
from ntops_mla.platform import Platform

_WIDTH = _fp8.LATENT + _fp8.ROPE


def latent_dequantize(cache: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Gather rows of an fp8 cache by slot: latents in columns 0 to 511, RoPE columns behind them.

    out[t, 128 g + i] = scales[g] codes[128 g + i], out[t, 512 + r] = pe[r], of the token in slots[t]; zeros for slot -1

    cache: uint8 or float8_e4m3fn `[pages, page_size, 656]`, ONE layer's storage, contiguous: 512 codes of
    float8_e4m3fn, four float32 scales of any value, 64 RoPE columns in bfloat16; page_size a power of two. slots: int64
    `[T]`, page * page_size + offset. dtype: of the result, bfloat16 (None), float16, float32 (float64: PyTorch); the
    product is float32 and rounded once, exact in bfloat16 where the scales are the powers of two that latent_quantize
    writes. Returns `[T, 576]`. Raises TypeError or ValueError that names the argument (slots past the cache too, where
    PyTorch runs on CPU tensors; a kernel reads zeros there). Source: deepseek-ai/FlashMLA, README.md and
    tests/quant.py.
    """
    return torch.ops.ntops_mla.latent_dequantize(cache, slots, dtype)


def _check_args(cache, slots, dtype):
    op = "latent_dequantize"
    check_cache(op, cache)
    check_slots(op, slots)
    _check.same_device(op, "cache", cache, ("slots", slots))
    if dtype is not None and dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"{op}: dtype must be None or one of {names}, got {dtype!r}")


def _look(cache, slots, dtype):
    _inspect.slots("latent_dequantize", slots, cache.shape[0] * cache.shape[1])


def _reference(cache, slots, dtype):
    flat = cache.view(torch.uint8).view(-1, _fp8.TOKEN_BYTES)
    if not len(slots) or not _slots.check("latent_dequantize", slots, len(flat)):
        return _fp8.dequantize(flat.index_select(0, slots), dtype or torch.bfloat16)
    out = torch.zeros(len(slots), _WIDTH, dtype=dtype or torch.bfloat16, device=cache.device)
    kept = slots >= 0
    out[kept] = _fp8.dequantize(flat.index_select(0, slots[kept]), out.dtype)
    return out


def _fake(cache, slots, dtype):
    return torch.empty(slots.shape[0], _WIDTH, dtype=dtype or torch.bfloat16, device=cache.device)


def _key(cache, slots, dtype):
    return (dtype or torch.bfloat16,), (cache.shape[1],)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return None  # the layout leaves nothing open


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return [Needed("latent_dequantize", board.tile("latent_dequantize", dtypes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, page_size: int) -> Kernel:
    return board.make("latent_dequantize", board.tile("latent_dequantize", dtype), page_size=page_size)


def _kernel(board: Board, cache, slots, dtype):
    out = _fake(cache, slots, dtype)
    if out.shape[0]:
        _made(board, out.dtype, cache.shape[1])(*_fp8.views(cache), slots, out, out)
    return out


def _through_float32(kernel, board: Board, args: tuple) -> torch.Tensor:
    """The `float32` gate; the cache's RoPE columns are bfloat16 all the same, as its layout has them."""
    cache, slots, dtype = args
    return kernel(board, cache, slots, torch.float32).to(dtype or torch.bfloat16)


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, page_size=64, **_):
    pages = -(-tokens // page_size) + 1
    cache = torch.zeros(pages, page_size, _fp8.TOKEN_BYTES, device=device, dtype=torch.uint8)
    rows = torch.randn(pages, page_size, _WIDTH, device=device)
    _fp8.quantize_into(cache, *rows.split([_fp8.LATENT, _fp8.ROPE], -1))
    return cache, torch.arange(tokens, device=device) + 1, dtype


latent_dequantize = register(
    latent_dequantize,
    schema="(Tensor cache, Tensor slots, ScalarType? dtype=None) -> Tensor",
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
    through_float32=_through_float32,
    look=_look,
)
