"""Times the ops and whole layers beside their peers, each path checked against float64 before it is timed.

    python scripts/bench.py [--quick] [--cpu | --nvidia | ...] [--json FILE] [--plots FOLDER]

Rows: decode, combine, prefill, append, norm, rope, the second half of a query projection, whole layers, and the parts
of a decode step; on FlashMLA's shapes, the two scenarios of attention_test.py and R1's layers, on a CPU at small sizes.
Each has its FLOP and bytes by FlashMLA's rules, median and quartiles, and the share of what a copy and a matrix product
reach in the same run. Compare rows of one run with each other, and no time with that of another machine. Exit status 1
where a row differs from float64 or raised, 2 where nothing can be run. `python scripts/performance_report.py` makes
docs/performance.md of the files under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import types

import torch

from attention_test import DTYPES, UsageError, _count, _positive, check_override, is_interpreted
from bench_rows import ceilings, modules, plots, record, runner, table, ways
from bench_rows.cases import KINDS, SIZES, cases
from bench_rows.peers import PEERS
from bench_rows.timing import Clock
from ntops_mla.devices import DeviceNotFoundError, best_device, detect, find_device
from ntops_mla.platform import all_platforms

IMPLEMENTATIONS = (
    ways.OURS,
    ways.SCHEDULED,
    "queries apart",
    "unfused",
    "torch",
    "torch_loop",
    "transformers",
    *(p.name for p in PEERS),
)
# Of each call, and of a case: what a size takes unless told otherwise.
RUNS = {"device": 50, "cpu": 15, "quick": 3}
SECONDS = {"device": 20.0, "cpu": 4.0, "quick": 0.5}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = parser.add_mutually_exclusive_group()
    for platform in all_platforms().values():
        flags = [f"--{name}" for name in (platform.name, *platform.aliases)]
        text = f"run on {platform.title}"
        devices.add_argument(*flags, dest="platform", action="store_const", const=platform.name, help=text)
    parser.add_argument("--quick", action="store_true", help="a case or two of each kind, tiny, some seconds in all")
    parser.add_argument("--ops", nargs="+", choices=KINDS, default=list(KINDS), metavar="OP", help=", ".join(KINDS))
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", help=", ".join(IMPLEMENTATIONS)
    )
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name holds TEXT")
    parser.add_argument("--tiles", action="store_true", help="instead: decode's kernel with many tiles, compiled here")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the result there")
    parser.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="write PNG plots there")
    parser.add_argument("--runs", type=_positive, help=f"of each call (default: {_by_size(RUNS)})")
    parser.add_argument("--seed", type=_count, help="of weights and inputs (default: a fresh one, printed)")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(3), "little")
    if args.tiles:
        args.ops = ["decode"]
    return args


def _by_size(values: dict) -> str:
    return ", ".join(f"{name} {values[name]}" for name in SIZES)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    args = parse(argv)
    try:
        return run(args)
    except (UsageError, DeviceNotFoundError, ValueError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        modules.forget()


def run(args: argparse.Namespace) -> int:
    """All cases, then the tables, the JSON and the plots."""
    detection = best_device() if args.platform is None else detect(find_device(args.platform))
    check_override(detection)
    if is_interpreted(detection.device):
        raise UsageError("Triton's interpreter computes with numpy: its times say nothing (NTOPS_MLA_INTERPRET=1)")
    _check_output(args)
    size = "quick" if args.quick else "cpu" if detection.device.type == "cpu" else "device"
    chosen = [case for case in cases(size, tuple(args.ops)) if args.case is None or args.case in case.name]
    if args.tiles:  # one case of each number of heads
        chosen = [case for case in chosen if set(case.groups) & {"heads", "length" if args.quick else "heads"}]
    if not chosen:
        raise ValueError(f"argument --case: no case of {', '.join(args.ops)} has {args.case!r} in its name")
    runs, seconds = args.runs or RUNS[size], SECONDS[size]
    clock, dtype = Clock(detection.device), DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    found = ceilings.measure(clock, size, dtype, runs, seconds)
    only = None if args.implementations is None else tuple(args.implementations)
    options = runner.Options(detection.device, dtype, args.seed, size, runs, seconds, only, args.tiles)
    data = record.head(detection, clock, args.dtype, size, args.seed, runs, found)
    print_header(data, detection, len(chosen))
    rows, left_out = [], []
    with progress(len(chosen)) as bar:
        for case in chosen:
            bar.set_postfix_str(f"{case.kind} {case.name}")
            more, absent = runner.run_case(case, options, clock, found)
            rows += more
            left_out += absent
            bar.update()
    data.update(rows=rows, left_out=left_out)
    show(data)
    keep(args, data)
    bad = [row for row in rows if row["status"] != "timed"]
    if not rows:
        print("no row was timed")
    for row in bad:
        print(f"{row['status'].upper()}: {row['op']} {row['case']}, {row['implementation']}: {row['reason']}")
    return 1 if bad or not (rows or args.tiles) else 0  # a board without a kernel has no tiles


def _check_output(args: argparse.Namespace) -> None:
    """Before the work, not after it."""
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UsageError(f"argument --json: {str(args.json)!r} is not a file in a folder that exists")
    if args.plots is not None and not args.plots.is_dir():
        raise UsageError(f"argument --plots: folder {str(args.plots)!r} does not exist")


def print_header(data: dict, detection, count: int) -> None:
    """What runs, where, and the ceilings."""
    found, versions = data["ceilings"], data["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    print(f"{data['board']} ({detection.platform.title}, {data['device']}: {detection.reason})")
    print(f"{data['dtype']}, {count} cases of size {data['size']}, {data['runs']} runs, seed {data['seed']}")
    print(f"{said}, threads {data['threads']}, commit {data['commit']}, load {data['load']}")
    if said := record.busy(data):
        print(f"WARNING: {said}")
    print(f"time: {data['clock']}")
    print(
        f"ceilings of this run: a copy {found['copy_tb_per_s']:.3g} TB/s, a matrix product "
        f"{found['matmul_tflop_per_s']:.3g} TFLOP/s; a row whose data lie in a cache may pass the first",
        flush=True,
    )


def show(data: dict) -> None:
    """A table for each op, what was left out, and how we stand to the others."""
    for op in dict.fromkeys(row["op"] for row in data["rows"]):
        print(f"\n{op}")
        print(table.rows_text(row for row in data["rows"] if row["op"] == op))
    if data["left_out"]:
        print(f"\nleft out\n{table.left_out_text(data['left_out'])}")
    ratios = plots.speedups(data["rows"])
    if ratios:
        print("\nntops_mla, whole calls")
        for case, name, ratio in ratios:
            print(f"  {case}: {ratio:.2f} times as fast as {name}")


def keep(args: argparse.Namespace, data: dict) -> None:
    """The files that were asked for."""
    if args.json is not None:
        record.write(args.json, data)
        print(f"result written to {args.json}")
    if args.plots is not None:
        reason = plots.unavailable()
        if reason is not None:
            print(f"plots are left out: {reason}")
            return
        for path in plots.write(data, args.plots):
            print(f"plot written to {path}")


def progress(count: int):
    """A bar where tqdm is installed and standard error is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:  # a convenience; nothing is lost without it
        nothing = types.SimpleNamespace(update=lambda: None, set_postfix_str=lambda text: None)
        return contextlib.nullcontext(nothing)
    return tqdm(total=count, delay=1, disable=None, leave=False)


if __name__ == "__main__":
    sys.exit(main())
