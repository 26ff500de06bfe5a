"""rope: rotary position embedding of interleaved pairs."""

from __future__ import annotations

import functools

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel, OutOfReach, within_int32
from ntops_mla.ops import _check
from ntops_mla.ops._op import register
from ntops_mla.platform import Platform

_WIDTHS = (32, 64)
_ELEMENTS_AT_ONCE = 1 << 18


def rope(q_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs of the RoPE columns of every head.

    out[2i] = q[2i] cos[i] - q[2i+1] sin[i];  out[2i+1] = q[2i] sin[i] + q[2i+1] cos[i], in float32, rounded once.

    q_pe: `[T, H, R]` of any strides, bfloat16, float16, float32 (float64: PyTorch). cos, sin: float32 `[T, R / 2]`, one
    row per token, YaRN's factor in them. Returns a new `[T, H, R]`. Raises TypeError or ValueError that names the
    argument. Source: arXiv 2104.09864, section 3.4.2; deepseek-ai/DeepSeek-V3 inference/model.py apply_rotary_emb.
    """
    return torch.ops.ntops_mla.rope(q_pe, cos, sin)


def check_cos_sin(op: str, cos: torch.Tensor, sin: torch.Tensor, tokens: int, width: int) -> None:
    """cos and sin are float32 `[tokens, width / 2]`."""
    for name, value in (("cos", cos), ("sin", sin)):
        _check.tensor(op, name, value, "[T, R / 2]", 2)
        _check.dtype(op, name, value, (torch.float32,))
        _check.size(op, name, value, 0, tokens, "[T, R / 2]")
        _check.size(op, name, value, 1, width // 2, "[T, R / 2]")


def check_queries(op: str, q_pe: torch.Tensor | None, kv_a: torch.Tensor, width: int) -> None:
    """q_pe, which is rotated in place beside kv_a's rows, is `[T, H, width]` of kv_a's dtype and device, or None."""
    if q_pe is None:
        return
    _check.tensor(op, "q_pe", q_pe, "[T, H, R]", 3)
    _check.size(op, "q_pe", q_pe, 0, kv_a.shape[0], "[T, H, R]")
    _check.size(op, "q_pe", q_pe, 2, width, "[T, H, R]")
    _check.same(op, "kv_a", kv_a, ("q_pe", q_pe))
    if any(size > 1 and stride == 0 for size, stride in zip(q_pe.shape, q_pe.stride())):
        raise ValueError(f"{op}: q_pe is written to and must not be expanded, got strides {list(q_pe.stride())}")


def queries_in_place(q_pe: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What a kernel takes to rotate q_pe where it is: twice q_pe, or nothing where there are no queries."""
    if q_pe is None or not q_pe.numel():
        return ()
    if within_int32(q_pe, 1, 2) is not q_pe:
        raise OutOfReach("q_pe: heads so far apart that int32 offsets do not reach them")
    return q_pe, q_pe


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` `[..., R]` rotated by `cos`, `sin` `[..., R / 2]` (broadcast), in float32 or float64, not yet rounded."""
    wide = (x if x.dtype == torch.float64 else x.float()).contiguous()  # a pair must be adjacent to be a complex number
    if wide.storage_offset() % 2:  # and start at an even place
        wide = wide.clone()
    # One complex product instead of four real ones and an interleave.
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    turns = torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))
    return torch.view_as_real(pairs * turns).flatten(-2)


def _check_args(q_pe, cos, sin):
    _check.tensor("rope", "q_pe", q_pe, "[T, H, R]", 3)
    _check.dtype("rope", "q_pe", q_pe)
    if q_pe.shape[2] % 2:
        raise ValueError(f"rope: q_pe must have an even number of columns, got {q_pe.shape[2]}")
    check_cos_sin("rope", cos, sin, q_pe.shape[0], q_pe.shape[2])
    _check.same_device("rope", "q_pe", q_pe, ("cos", cos), ("sin", sin))


def rotate_into(out: torch.Tensor, q_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`q_pe` `[T, H, R]` rotated into `out`, which may be q_pe itself."""
    cos, sin = cos[:, None], sin[:, None]
    # [tokens, H, R] by [tokens, 1, R / 2], some tokens at a time: the float32 intermediates then stay in the cache.
    step = max(1, _ELEMENTS_AT_ONCE // max(1, q_pe.shape[1] * q_pe.shape[2])) if q_pe.device.type == "cpu" else len(out)
    for start in range(0, len(out), max(1, step)):
        rows = slice(start, start + step)
        out[rows] = rotate_pairs(q_pe[rows], cos[rows], sin[rows])


def _reference(q_pe, cos, sin):
    out = torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)
    rotate_into(out, q_pe, cos, sin)
    return out


def _fake(q_pe, cos, sin):
    return torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)


def _key(q_pe, cos, sin):
    return (q_pe.dtype,), (q_pe.shape[2],)


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    if sizes[0] not in _WIDTHS:
        return f"{sizes[0]} RoPE columns; the kernel takes {' or '.join(map(str, _WIDTHS))}"
    return None


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return [Needed("rope", board.tile("rope", dtypes[0], width=sizes[0]))]


@functools.lru_cache(maxsize=256)
def _made(board: Board, dtype: torch.dtype, width: int) -> Kernel:
    tile = board.tile("rope", dtype, width=width)
    return board.make("rope", tile, width=width)


def _kernel(board: Board, q_pe, cos, sin):
    out = torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)
    if out.numel():
        _made(board, q_pe.dtype, q_pe.shape[2])(within_int32(q_pe, 1, 2), cos, sin, out)
    return out


def _example(device="cpu", dtype=torch.bfloat16, *, tokens=4, heads=16, rope=64, **_):
    angles = torch.rand(tokens, rope // 2, device=device)
    return torch.randn(tokens, heads, rope, device=device, dtype=dtype), angles.cos(), angles.sin()


rope = register(
    rope,
    schema="(Tensor q_pe, Tensor cos, Tensor sin) -> Tensor",
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
)
