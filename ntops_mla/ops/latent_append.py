"""latent_append: norm, rotate and write the new tokens' latents into the paged cache; rotate their queries."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check, _inspect, _slots
from ntops_mla.ops._op import register
from ntops_mla.ops.rms_norm import normalise
from ntops_mla.ops.rope import check_cos_sin, check_queries, queries_in_place, rotate_into, rotate_pairs
from ntops_mla.platform import Platform

# (kv_lora_rank, RoPE columns) that the kernel is written for.
LATENT_SIZES = ((512, 64), (256, 32))


def latent_append(
    kv_a: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    eps: float = 1e-6,
    q_pe: torch.Tensor | None = None,
) -> None:
    """Write RMSNorm(latent) and RoPE(rope columns) of every token into its page and slot, in place.

    cache[slots[t] // page_size, slots[t] % page_size] = [rms_norm(kv_a[t, :C], weight, eps), rope(kv_a[t, C:], cos[t],
    sin[t])];  q_pe[t, h] = rope(q_pe[t, h], cos[t], sin[t])

    kv_a: `[T, C + R]` of any row stride, the raw output of kv_a_proj_with_mqa; bfloat16, float16, float32 (float64:
    PyTorch). weight: `[C]`, the same dtype. cos, sin: float32 `[T, R / 2]`. slots: int64 `[T]`, page * page_size +
    offset, -1 skips the token. cache: `[pages, page_size, C + R]`, ONE layer's storage, contiguous, the same dtype;
    page_size a power of two. q_pe: the queries' RoPE columns `[T, H, R]` of any strides, the same dtype, rotated in
    place in the same launch (skipped tokens' too), or None. Raises TypeError or ValueError that names the argument
    (slots past the cache too, where PyTorch runs on CPU tensors; a kernel skips them). Source: arXiv 2405.04434,
    section 2.1.
    """
    torch.ops.ntops_mla.latent_append(kv_a, weight, cos, sin, slots, cache, eps, q_pe)


def _check_args(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    op = "latent_append"
    _check.tensor(op, "kv_a", kv_a, "[T, C + R]", 2)
    _check.dtype(op, "kv_a", kv_a)
    _check.tensor(op, "weight", weight, "[C]", 1)
    tokens, width = kv_a.shape
    rope = width - weight.shape[0]
    if rope <= 0 or rope % 2:
        raise ValueError(
            f"{op}: kv_a must hold weight's {weight.shape[0]} latent columns and an even number of RoPE columns, "
            f"got {width} columns"
        )
    check_cos_sin(op, cos, sin, tokens, rope)
    _check.tensor(op, "slots", slots, "[T]", 1)
    _check.dtype(op, "slots", slots, (torch.int64,))
    _check.size(op, "slots", slots, 0, tokens, "[T]")
    _check.tensor(op, "cache", cache, "[pages, page_size, C + R]", 3)
    _check.size(op, "cache", cache, 2, width, "[pages, page_size, C + R]")
    _check.page_size(op, "cache", cache.shape[1])
    if not cache.is_contiguous():
        raise ValueError(f"{op}: cache must be contiguous, got strides {list(cache.stride())}")
    _check.same(op, "kv_a", kv_a, ("weight", weight), ("cache", cache))
    _check.same_device(op, "kv_a", kv_a, ("cos", cos), ("sin", sin), ("slots", slots))
    _check.number(op, "eps", eps)
    check_queries(op, q_pe, kv_a, rope)


def _look(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    _inspect.slots("latent_append", slots, cache.shape[0] * cache.shape[1])


def _reference(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    if not kv_a.shape[0]:
        return
    latent = weight.shape[0]
    rows = torch.empty(kv_a.shape, dtype=cache.dtype, device=cache.device)
    rows[:, :latent] = normalise(kv_a[:, :latent], weight, eps)
    rows[:, latent:] = rotate_pairs(kv_a[:, latent:], cos, sin)
    _slots.write("latent_append", cache, slots, rows)
    if q_pe is not None:
        rotate_into(q_pe, q_pe, cos, sin)


def _fake(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    return None


def _key(kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    return (kv_a.dtype,), (weight.shape[0], kv_a.shape[1] - weight.shape[0], cache.shape[1], q_pe is not None)


def _kernel_name(sizes: tuple) -> str:
    return "latent_append_rope" if sizes[3] else "latent_append"


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    if sizes[:2] not in LATENT_SIZES:
        allowed = " or ".join(f"{c} + {r}" for c, r in LATENT_SIZES)
        return f"latents of {sizes[0]} + {sizes[1]} columns; the kernel takes {allowed}"
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    name = _kernel_name(sizes)
    return [Needed(name, board.tile(name, dtypes[0], latent=sizes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, sizes: tuple) -> Kernel:
    latent, rope, page_size, _ = sizes
    name = _kernel_name(sizes)
    tile = board.tile(name, dtype, latent=latent)
    return board.make(name, tile, page_size=page_size, latent=latent, rope=rope)


def _kernel(board: Board, kv_a, weight, cos, sin, slots, cache, eps, q_pe):
    if not kv_a.shape[0]:
        return
    queries = queries_in_place(q_pe)
    latent = weight.shape[0]
    sizes = latent, kv_a.shape[1] - latent, cache.shape[1], bool(queries)
    _made(board, kv_a.dtype, sizes)(kv_a, kv_a, weight, cos, sin, slots, eps, cache, cache, *queries)


def _example(
    device="cpu", dtype=torch.bfloat16, *, tokens=4, kv_lora_rank=512, rope=64, page_size=64, q_heads=None, **_
):
    angles = torch.rand(tokens, rope // 2, device=device)
    pages = -(-tokens // page_size) + 1
    return (
        torch.randn(tokens, kv_lora_rank + rope, device=device, dtype=dtype),
        torch.ones(kv_lora_rank, device=device, dtype=dtype),
        angles.cos(),
        angles.sin(),
        torch.arange(tokens, device=device) + 1,
        torch.zeros(pages, page_size, kv_lora_rank + rope, device=device, dtype=dtype),
        1e-6,
        None if q_heads is None else torch.randn(tokens, q_heads, rope, device=device, dtype=dtype),
    )


def _through_float32(kernel, board: Board, args: tuple) -> None:
    """The `float32` gate: the kernel writes into a small float32 cache, whose rows are rounded into the real one."""
    kv_a, weight, cos, sin, slots, cache, eps, q_pe = args
    tokens, width = kv_a.shape
    page = cache.shape[1]
    scratch = torch.empty(-(-tokens // page), page, width, dtype=torch.float32, device=cache.device)
    own_slots = torch.arange(tokens, device=slots.device)
    wide_q = None if q_pe is None else q_pe.float()
    kernel(board, kv_a.float(), weight.float(), cos, sin, own_slots, scratch, eps, wide_q)
    rows = scratch.view(-1, width)[:tokens].to(cache.dtype)
    kept = slots >= 0
    cache.view(-1, width).index_copy_(0, slots[kept], rows[kept])
    if q_pe is not None:
        q_pe.copy_(wide_q)


latent_append = register(
    latent_append,
    schema=(
        "(Tensor kv_a, Tensor weight, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) cache, float eps=1e-6, "
        "Tensor(b!)? q_pe=None) -> ()"
    ),
    check=_check_args,
    look=_look,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
    through_float32=_through_float32,
)
