"""latent_append_fp8: norm, rotate and quantise new tokens' latents into FlashMLA's fp8 cache; rotate their queries."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check, _fp8, _inspect
from ntops_mla.ops._op import register
from ntops_mla.ops.latent_quantize import check_cache, check_slots, write_quantized
from ntops_mla.ops.rms_norm import normalise
from ntops_mla.ops.rope import check_cos_sin, check_queries, queries_in_place, rotate_into, rotate_pairs
from ntops_mla.platform import Platform

_WIDTH = _fp8.LATENT + _fp8.ROPE


def latent_append_fp8(
    kv_a: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    eps: float = 1e-6,
    q_pe: torch.Tensor | None = None,
) -> None:
    """Write RMSNorm(latent), quantised, and RoPE(rope columns) of every token into its page and slot, in place.

    cache[slots[t] // page_size, slots[t] % page_size] = quantised [rms_norm(kv_a[t, :512], weight, eps), rope(kv_a[t,
    512:], cos[t], sin[t])], as latent_quantize does it;  q_pe[t, h] = rope(q_pe[t, h], cos[t], sin[t])

    The latent is rounded to bfloat16 before it is quantised, because that is what users of the layout quantise: from
    bfloat16, the bytes are those of latent_append's row given to latent_quantize.

    kv_a: `[T, 576]` of any row stride, the raw output of kv_a_proj_with_mqa; bfloat16, float16, float32 (float64:
    PyTorch). weight: `[512]`, the same dtype. cos, sin: float32 `[T, 32]`. slots: int64 `[T]`, page * page_size +
    offset, -1 skips the token. cache: uint8 or float8_e4m3fn `[pages, page_size, 656]`, ONE layer's storage,
    contiguous: 512 codes, four float32 scales, 64 RoPE columns in bfloat16; page_size a power of two. q_pe: the
    queries' RoPE columns `[T, H, 64]` of any strides, kv_a's dtype, rotated in place in the same launch (skipped
    tokens' too), or None. Raises TypeError or ValueError that names the argument (slots past the cache too, where
    PyTorch runs on CPU tensors; a kernel skips them). Source: arXiv 2405.04434, section 2.1; deepseek-ai/FlashMLA,
    README.md and tests/quant.py.
    """
    torch.ops.ntops_mla.latent_append_fp8(kv_a, weight, cos, sin, slots, cache, eps, q_pe)


def _check_args(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    op = "latent_append_fp8"
    _check.tensor(op, "kv_a", kv_a, f"[T, {_WIDTH}]", 2)
    _check.size(op, "kv_a", kv_a, 1, _WIDTH, f"[T, {_WIDTH}]")
    _check.dtype(op, "kv_a", kv_a)
    _check.tensor(op, "weight", weight, f"[{_fp8.LATENT}]", 1)
    _check.size(op, "weight", weight, 0, _fp8.LATENT, f"[{_fp8.LATENT}]")
    check_cos_sin(op, cos, sin, kv_a.shape[0], _fp8.ROPE)
    check_slots(op, slots, kv_a.shape[0])
    check_cache(op, cache)
    _check.same(op, "kv_a", kv_a, ("weight", weight))
    _check.same_device(op, "kv_a", kv_a, ("cos", cos), ("sin", sin), ("slots", slots), ("cache", cache))
    _check.number(op, "eps", eps)
    check_queries(op, q_pe, kv_a, _fp8.ROPE)


def _look(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    _inspect.slots("latent_append_fp8", slots, cache.shape[0] * cache.shape[1])


def _reference(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    # float32 at least, so that what is rounded to bfloat16 was not rounded before
    wide = torch.promote_types(kv_a.dtype, torch.float32)
    latent = normalise(kv_a[:, : _fp8.LATENT].to(wide), weight.to(wide), eps).to(torch.bfloat16)
    write_quantized("latent_append_fp8", latent, rotate_pairs(kv_a[:, _fp8.LATENT :], cos, sin), slots, cache)
    if q_pe is not None:
        rotate_into(q_pe, q_pe, cos, sin)


def _fake(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    return None


def _key(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    return (kv_a.dtype,), (cache.shape[1], q_pe is not None)


def _kernel_name(sizes: tuple) -> str:
    return "latent_append_fp8_rope" if sizes[1] else "latent_append_fp8"


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return None  # the layout leaves nothing open


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    name = _kernel_name(sizes)
    return [Needed(name, board.tile(name, dtypes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, sizes: tuple) -> Kernel:
    name = _kernel_name(sizes)
    return board.make(name, board.tile(name, dtype), page_size=sizes[0])


def _kernel(board: Board, kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    if not kv_a.shape[0]:
        return
    queries = queries_in_place(q_pe)
    made = _made(board, kv_a.dtype, (cache.shape[1], bool(queries)))
    made(kv_a, kv_a, weight, cos, sin, slots, eps, *_fp8.views(cache), *queries)


def _through_float32(kernel, board: Board, args: tuple) -> None:
    """The `float32` gate; the cache's RoPE columns stay bfloat16, as its layout has them."""
    kv_a, weight, *rest, q_pe = args
    wide_q = None if q_pe is None else q_pe.float()
    kernel(board, kv_a.float(), weight.float(), *rest, wide_q)
    if q_pe is not None:
        q_pe.copy_(wide_q)


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, page_size=64, q_heads=None, **_):
    angles = torch.rand(tokens, _fp8.ROPE // 2, device=device)
    return (
        torch.randn(tokens, _WIDTH, device=device, dtype=dtype),
        torch.ones(_fp8.LATENT, device=device, dtype=dtype),
        angles.cos(),
        angles.sin(),
        torch.arange(tokens, device=device) + 1,
        torch.zeros(-(-tokens // page_size) + 1, page_size, _fp8.TOKEN_BYTES, device=device, dtype=torch.uint8),
        1e-6,
        None if q_heads is None else torch.randn(tokens, q_heads, _fp8.ROPE, device=device, dtype=dtype),
    )


latent_append_fp8 = register(
    latent_append_fp8,
    schema=(
        "(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) cache, float eps=1e-6, "
        "Tensor(b!)? q_pe=None) -> ()"
    ),
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
