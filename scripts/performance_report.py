"""Writes docs/performance.md out of benchmarks/results/*/bench*.json, and of models' numbers by arithmetic.

    python scripts/performance_report.py [--check] [--results FOLDER] [--output FILE]

--check: status 1 where the report is not current, and nothing is written. A file that is no run of scripts/bench.py, or
one of a pretended board, is status 2: nothing of hardware was shown by it.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from bench_rows import plots, record, report
from ntops_mla import checkout

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "performance.md", metavar="FILE")
    args = parser.parse_args(argv)
    try:
        text = report.page(runs(args.results, args.output.parent))
    except ValueError as error:
        print(f"performance_report.py: error: {error}", file=sys.stderr)
        return 2
    if args.check:
        current = args.output.is_file() and args.output.read_text(encoding="utf-8") == text
        if not current:
            print(f"{args.output} is not current: run python scripts/performance_report.py", file=sys.stderr)
        return 0 if current else 1
    checkout.write({args.output: text})
    print(f"written to {args.output}")
    return 0


def runs(results: pathlib.Path, beside: pathlib.Path) -> list[report.Run]:
    """All runs under `results`, by folder; `beside`: the folder of the report, which the plots' paths begin at."""
    found = []
    for path in sorted(results.glob("*/bench*.json")):
        data = record.read(path)
        if data.get("simulated") or data["interpreted"]:
            raise ValueError(f"{path}: made on a pretended board or in Triton's interpreter: no figure of hardware")
        shown = []
        if path.name == "bench.json":  # the plots beside it are of this one
            for name in plots.NAMES:
                plot = path.with_name(name)
                if plot.is_file():
                    shown.append((f"{name.removesuffix('.png')}, {data['board']}", _relative(plot, beside)))
        found.append(report.Run(data, tuple(shown), path.relative_to(results).as_posix()))
    return found


def _relative(path: pathlib.Path, start: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path, start)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
