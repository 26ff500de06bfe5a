"""latent_quantize: write finished latents and RoPE columns into FlashMLA's fp8 cache."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check, _fp8, _inspect, _slots
from ntops_mla.ops._op import register
from ntops_mla.platform import Platform

# A cache's element types: the same bytes. FlashMLA takes it as float8_e4m3fn.
CACHE_DTYPES = (torch.uint8, torch.float8_e4m3fn)


def latent_quantize(latent: torch.Tensor, pe: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Quantise latents that are normalised and RoPE columns that are rotated into their pages and slots, in place.

    cache[slots[t] // page_size, slots[t] % page_size] = [codes, scales, pe[t]];  latent[t, 128 g + i] = scales[g]
    codes[128 g + i], codes rounded to the nearest float8_e4m3fn, scales[g] the least power of two that brings the
    group's largest column to 448 or below, and at least 2^-13

    latent: `[T, 512]`, pe: `[T, 64]`, of any strides and one dtype: bfloat16, float16, float32 (float64: PyTorch).
    slots: int64 `[T]`, page * page_size + offset, -1 skips the token. cache: uint8 or float8_e4m3fn `[pages, page_size,
    656]`, contiguous: 512 codes, four float32 scales, 64 RoPE columns in bfloat16; page_size a power of two. Raises
    TypeError or ValueError that names the argument (slots past the cache too, where PyTorch runs on CPU tensors;
    a kernel skips them). Source: deepseek-ai/FlashMLA, README.md and tests/quant.py.
    """
    torch.ops.ntops_mla.latent_quantize(latent, pe, slots, cache)


def check_cache(op: str, cache: torch.Tensor) -> None:
    """`cache` is one that is written to and read as codes, scales and RoPE columns."""
    shape = f"[pages, page_size, {_fp8.TOKEN_BYTES}]"
    _check.tensor(op, "cache", cache, shape, 3)
    _check.size(op, "cache", cache, 2, _fp8.TOKEN_BYTES, shape)
    _check.dtype(op, "cache", cache, CACHE_DTYPES)
    _check.page_size(op, "cache", cache.shape[1])
    if not cache.is_contiguous():
        raise ValueError(f"{op}: cache must be contiguous, got strides {list(cache.stride())}")
    if cache.storage_offset() % 4:
        raise ValueError(
            f"{op}: cache must begin at a multiple of 4 bytes, for its float32 scales, and begins at byte "
            f"{cache.storage_offset()} of its storage"
        )


def check_slots(op: str, slots: torch.Tensor, tokens: int | None = None) -> None:
    """`slots` is int64 `[T]`."""
    _check.tensor(op, "slots", slots, "[T]", 1)
    _check.dtype(op, "slots", slots, (torch.int64,))
    if tokens is not None:
        _check.size(op, "slots", slots, 0, tokens, "[T]")


def write_quantized(op: str, latent: torch.Tensor, pe: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """The PyTorch reference."""
    rows = torch.empty(len(latent), _fp8.TOKEN_BYTES, dtype=torch.uint8, device=cache.device)
    _fp8.quantize_into(rows, latent, pe)
    _slots.write(op, cache.view(torch.uint8), slots, rows)


def _check_args(latent, pe, slots, cache):
    op = "latent_quantize"
    _check.tensor(op, "latent", latent, f"[T, {_fp8.LATENT}]", 2)
    _check.size(op, "latent", latent, 1, _fp8.LATENT, f"[T, {_fp8.LATENT}]")
    _check.dtype(op, "latent", latent)
    _check.tensor(op, "pe", pe, f"[T, {_fp8.ROPE}]", 2)
    _check.size(op, "pe", pe, 0, latent.shape[0], f"[T, {_fp8.ROPE}]")
    _check.size(op, "pe", pe, 1, _fp8.ROPE, f"[T, {_fp8.ROPE}]")
    _check.same(op, "latent", latent, ("pe", pe))
    check_slots(op, slots, latent.shape[0])
    check_cache(op, cache)
    _check.same_device(op, "latent", latent, ("slots", slots), ("cache", cache))


def _look(latent, pe, slots, cache):
    _inspect.slots("latent_quantize", slots, cache.shape[0] * cache.shape[1])


def _reference(latent, pe, slots, cache):
    write_quantized("latent_quantize", latent, pe, slots, cache)


def _fake(latent, pe, slots, cache):
    return None


def _key(latent, pe, slots, cache):
    return (latent.dtype,), (cache.shape[1],)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return None  # the layout leaves nothing open


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return [Needed("latent_quantize", board.tile("latent_quantize", dtypes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, page_size: int) -> Kernel:
    return board.make("latent_quantize", board.tile("latent_quantize", dtype), page_size=page_size)


def _kernel(board: Board, latent, pe, slots, cache):
    if latent.shape[0]:
        _made(board, latent.dtype, cache.shape[1])(latent, pe, slots, *_fp8.views(cache))


def _through_float32(kernel, board: Board, args: tuple) -> None:
    """The `float32` gate; the cache's RoPE columns stay bfloat16, as its layout has them."""
    latent, pe, slots, cache = args
    kernel(board, latent.float(), pe.float(), slots, cache)


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, page_size=64, **_):
    return (
        torch.randn(tokens, _fp8.LATENT, device=device, dtype=dtype),
        torch.randn(tokens, _fp8.ROPE, device=device, dtype=dtype),
        torch.arange(tokens, device=device) + 1,
        torch.zeros(-(-tokens // page_size) + 1, page_size, _fp8.TOKEN_BYTES, device=device, dtype=torch.uint8),
    )


latent_quantize = register(
    latent_quantize,
    schema="(Tensor latent, Tensor pe, Tensor slots, Tensor(a!) cache) -> ()",
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
