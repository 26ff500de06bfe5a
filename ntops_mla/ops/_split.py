"""Attention whose keys are cut into splits that mla_combine joins: what the ops that do so share on a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ntops_mla.board import Board, Needed
from ntops_mla.kernel import Kernel, OutOfReach
from ntops_mla.ops import _check
from ntops_mla.platform import Tile

# Keys that a split has at least, unless the caller says how many splits there are: fewer cost more in the second launch
# and in float32 parts than they bring. And the most splits of a request where all have as many: mla_combine reads them
# one after the other. (A schedule may cut a request that is longer than all others together into more.)
SPLIT_KEYS = 256
_MAX_SPLITS = 64


class Made(NamedTuple):
    """Both kernels, and the rows and keys of a tile."""

    attend: Kernel
    combine: Kernel
    block_h: int
    block_n: int


def make(board: Board, kernel: str, tile: Tile, dtype: torch.dtype, latent: int, /, **sizes: int) -> Made:
    """`kernel` with this tile, where `sizes` do not say otherwise, and its combine."""
    attend = board.make(kernel, tile, **sizes)
    combine = board.make("mla_combine", board.tile("mla_combine", dtype, latent=latent), latent=latent)
    return Made(attend, combine, attend.parameters["block_h"], attend.parameters["block_n"])


def needed(
    board: Board, kernel: str, tile: Tile | None, dtype: torch.dtype, latent: int, page_size: int | None = None
) -> list[Needed]:
    """Both kernels of a call, as dispatch asks for them. page_size: what a tile of keys lies within, None: nothing."""
    products = ()
    if tile is not None:
        keys = tile.blocks["block_n"]
        products = tile.blocks["block_h"], keys if page_size is None else min(keys, page_size)
    return [
        Needed(kernel, tile, products),
        Needed("mla_combine", board.tile("mla_combine", dtype, latent=latent)),
    ]


def split(programs: int, keys: int, processors: int, least: int = SPLIT_KEYS) -> int:
    """How many splits fill `processors` (two programs on each) when one split takes `programs`, of at most `keys` keys
    and of `least` at least.

    Known without reading a length, so that the grid is static and a CUDA graph can be replayed with other lengths; how
    many of them a request uses is decided on the device.
    """
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, -(-keys // least), _MAX_SPLITS))


def plan(
    board: Board, made: Made, batch: int, rows: int, keys: int, num_splits: int | None, least: int = SPLIT_KEYS
) -> tuple[int, int]:
    """How many splits the `keys` at most of each of `batch` are cut into, and the blocks of keys that one has at least:
    those of `least` keys, unless num_splits says how many splits there are."""
    if num_splits is not None:
        return num_splits, 1
    splits = split(batch * -(-rows // made.block_h), keys, board.processors, least)
    return splits, max(1, least // made.block_n)


def refuse_far_slots(**caches: torch.Tensor) -> None:
    """Raise OutOfReach for a cache whose slots within a page int32 offsets do not reach."""
    for name, cache in caches.items():
        if (cache.shape[1] - 1) * cache.stride(1) >= 2**31:
            raise OutOfReach(f"{name}: slots {cache.stride(1)} elements apart, which int32 offsets do not reach")


def parts(
    out: torch.Tensor, splits: int, schedule: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for the splits' results, where there are several: `[B, splits, s_q * H, C]`, `[B, splits, s_q, H]`; those of
    a schedule: `[n, 1, s_q * H, C]`, `[n, 1, s_q, H]`."""
    batch, s_q, heads, latent = out.shape
    if schedule is not None:
        batch, splits = schedule.shape[0], 1
    elif splits == 1:
        return None, None
    part = torch.empty(batch, splits, s_q * heads, latent, dtype=torch.float32, device=out.device)
    return part, torch.empty(batch, splits, s_q, heads, dtype=torch.float32, device=out.device)


def check_schedule(op: str, q_nope: torch.Tensor, num_splits: int | None, schedule: object) -> None:
    """schedule is None, or goes with the requests of q_nope."""
    if schedule is None:
        return
    _check.tensor(op, "schedule", schedule, "[n, 4]", 2)
    _check.dtype(op, "schedule", schedule, (torch.int32,))
    _check.size(op, "schedule", schedule, 1, 4, "[n, 4]")
    if schedule.shape[0] <= q_nope.shape[0]:
        raise ValueError(
            f"{op}: schedule must be one for {q_nope.shape[0]} requests, with more rows than that, got shape "
            f"{list(schedule.shape)}"
        )
    _check.same_device(op, "q_nope", q_nope, ("schedule", schedule))
    if num_splits is not None:
        raise ValueError(f"{op}: num_splits must be None with a schedule, got {num_splits}")


def launch(
    made: Made, inputs: tuple, key: tuple, seq_lens, schedule, least: int, planned: bool, out, lse, part, part_lse
) -> None:
    """`made.attend(*inputs, ...)` into out and lse, or into parts and `made.combine` of them. schedule: where `planned`
    is False, any int32 `[., .]`, which nobody looks at."""
    # [B, s_q, H]
    lse_rows = lse.transpose(1, 2)
    if part is None:
        rows = out.flatten(1, 2)
        made.attend(*inputs, rows[:, None], lse_rows[:, None], rows, key=key)
        return
    made.attend(*inputs, part, part_lse, out.flatten(1, 2), key=key)
    made.combine(part, part_lse, seq_lens, schedule, least, planned, made.block_n, out, lse_rows, key=key)
