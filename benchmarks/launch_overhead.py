"""What launching mla_decode and mla_combine costs in Python, with a driver that launches nothing.

    python benchmarks/launch_overhead.py [--rounds N] [--json FILE]

Counted: from the op's kernel function being handed preallocated buffers to the driver's launch call. Not counted:
dispatch (benchmarks/dispatch_overhead.py), the driver's call itself, and torch.empty for the results. Compiled for
sm_90; no device is needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import statistics
import sys
import time

import torch

from ntops_mla import interpreter
from ntops_mla.board import Board
from ntops_mla.platform import get_platform

interpreter.install_driver()

import triton  # noqa: E402

mla_decode = importlib.import_module("ntops_mla.ops.mla_decode")  # ntops_mla.ops.mla_decode is the op


class _Launcher:
    """Stands where Triton's compiled launcher would."""

    launches = 0

    def __init__(self, *args: object) -> None: ...

    def __call__(self, *args: object) -> None:
        _Launcher.launches += 1


def _load_binary(*args: object) -> tuple:
    return 0, 0, 0, 0, 1024


def measure(rounds: int) -> dict[str, float]:
    """Microseconds: `cached`, decode + combine through the launch cache; `generated`, through NineToothed's launch."""
    driver = triton.runtime.driver.active
    driver.launcher_cls = _Launcher
    driver.utils.load_binary = _load_binary
    platform = get_platform("nvidia")
    board = Board(platform, platform.limits_for((9, 0)), None, 132)
    batch, heads, pages = 16, 16, 64
    cache = torch.zeros(pages, 64, 576, dtype=torch.bfloat16)
    q = torch.zeros(batch, 1, heads, 576, dtype=torch.bfloat16)
    args = (
        q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], torch.zeros(batch, 32, dtype=torch.int32),
        torch.ones(batch, dtype=torch.int32), 0.1,
    )  # fmt: skip
    made = mla_decode._made(board, torch.bfloat16, 512, 64, 64, heads, False)
    splits = 4
    inputs = (*args[:-1], args[4], args[-1], 1)
    out, lse = torch.zeros(batch, 1, heads, 512, dtype=torch.bfloat16), torch.zeros(batch, heads, 1)
    part, part_lse = torch.zeros(batch, splits, heads, 512), torch.zeros(batch, splits, 1, heads)

    def cached() -> None:
        mla_decode.launch(made, inputs, False, False, out, lse, part, part_lse)

    def generated() -> None:
        made.attend._launch(*inputs, False, False, made.block_n, part, part_lse, out.flatten(1, 2))
        made.combine._launch(part, part_lse, args[5], args[4], 1, False, made.block_n, out, lse.transpose(1, 2))

    times: dict[str, list[float]] = {"cached": [], "generated": []}
    for run in (cached, generated):  # compiles
        run()
    before = _Launcher.launches
    for _ in range(rounds):  # by turns, so that a noisy machine is noisy for both
        for run in (cached, generated):
            start = time.perf_counter()
            for _ in range(100):
                run()
            times[run.__name__].append((time.perf_counter() - start) / 100 * 1e6)
    assert _Launcher.launches == before + rounds * 400
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    figures = measure(args.rounds)
    print(f"Triton {triton.__version__}, decode + combine, microseconds of Python:")
    for name, value in figures.items():
        print(f"  {name:<10} {value:6.1f}")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, **figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
