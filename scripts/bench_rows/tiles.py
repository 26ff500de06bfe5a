"""The sweep over tiles of mla_decode: what a platform's table could hold instead. Each is compiled here and now."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bench_rows import ways
from ntops_mla import ops
from ntops_mla.board import board_of, first_line
from ntops_mla.devices import detect
from ntops_mla.platform import Tile

BLOCK_H, BLOCK_N, BLOCK_C, WARPS, STAGES = (16, 32, 64), (32, 64), (256, 512), (4, 8), (1, 2, 3)


def sweep(problem) -> Iterator[ways.Way | ways.Absent]:
    """A way for each tile that may run here. Products that are too small for the board's compiler are left out: it may
    end the process."""
    choice = ops.mla_decode.explain(*problem.args)
    if choice.backend != "kernel":
        yield ways.Absent(ways.OURS, f"{ways.KERNEL}, tiles", choice.reason)
        return
    limits = board_of(detect(problem.device)).limits
    least = limits.least_product.value if limits is not None and limits.least_product is not None else 0
    most = (limits.max_warps.value if limits is not None else None) or max(WARPS)
    for block_h, block_n, block_c, warps, stages in itertools.product(BLOCK_H, BLOCK_N, BLOCK_C, WARPS, STAGES):
        if warps > most or min(block_h, block_n) < least:
            continue
        blocks = {"block_h": block_h, "block_n": block_n, "block_c": block_c}
        tile = Tile("mla_decode", blocks, warps, stages, source="a sweep of scripts/bench.py")
        try:
            yield from ways.kernels(problem, tile)
        except Exception as error:
            numbers = f"{block_h} x {block_n} x {block_c}, {warps} warps, {stages} stages"
            yield ways.Absent(ways.OURS, ways.KERNEL, f"{numbers}: {type(error).__name__}: {first_line(error)}")
