"""What dispatch adds to one call, in microseconds: `python benchmarks/dispatch_overhead.py [--json FILE]`.

Each op's smallest arguments go to an implementation that does nothing: by itself, through dispatch.call (the look-up
of the choice), and behind the argument checks as well; the differences are what the layers add. Beside them the whole
public call and the PyTorch reference alone. Medians of many rounds in which the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from ntops_mla import dispatch, ops


def ways(name: str) -> dict:
    """Callables of no arguments, from nothing to the public function."""
    op = ops.get(name)
    args = op.example("cpu", torch.float32, tokens=1, heads=1)
    spec, check, device = op.spec, op._check, args[0].device
    nothing = dispatch.OpSpec(spec.name, spec.key, lambda *_: None, spec.supports)

    def checked():
        check(*args)
        return dispatch.call(nothing, device, args)

    return {
        "nothing": lambda: nothing.reference(*args),
        "dispatch": lambda: dispatch.call(nothing, device, args),
        "checks": checked,
        "public": lambda: op.function(*args),
        "PyTorch": lambda: spec.reference(*args),
    }


def measure(calls: dict, rounds: int, inner: int) -> dict[str, float]:
    """Median microseconds a call of each, taking turns."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(inner):
                call()
            times[name].append((time.perf_counter() - begin) / inner * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--inner", type=int, default=50)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'op':14s} {'dispatch':>9s} {'checks':>9s} {'whole call':>22s} {'PyTorch':>10s}   (us a call)")
    with torch.inference_mode():
        for name in ops.names():
            us = measure(ways(name), args.rounds, args.inner)
            row = {
                "op": name,
                "dispatch_us": us["dispatch"] - us["nothing"],
                "checks_us": us["checks"] - us["dispatch"],
                "whole_us": us["public"],
                "reference_us": us["PyTorch"],
            }
            rows.append(row)
            print(
                f"{name:14s} {row['dispatch_us']:9.2f} {row['checks_us']:9.2f} {row['whole_us']:22.2f} "
                f"{row['reference_us']:10.2f}"
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"torch": torch.__version__, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
