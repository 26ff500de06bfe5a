"""Writes README's support table from the platforms' files and the evidence: `scripts/support_table.py [--check]`.

A cell says what was proven and no more. --check: status 1 where README is not up to date, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import torch

from ntops_mla import ops
from ntops_mla.platform import Platform, all_platforms

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> int:
    """Replaces what stands between the two marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = f"{text[:start]}\n{table(evidence(), results())}\n{text[end:]}"
    if args.check:
        return 0 if new == text else 1
    readme.write_text(new, encoding="utf-8")
    return 0


def evidence() -> list[dict]:
    """What scripts/evidence.py left, oldest Triton first."""
    files = (ROOT / "benchmarks" / "evidence").glob("triton-*.json")
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return sorted(found, key=lambda one: [int(part) for part in one["triton"].split("+")[0].split(".")])


def results() -> list[dict]:
    """What scripts/gpu_check.sh left: a file check.json a board, with `platform`, `board` and its `parts`."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*/check.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def table(found: list[dict], boards: list[dict]) -> str:
    """The table and what its words mean."""
    lines = ["| platform | op | bfloat16 | float16 | float32 |", "|---|---|---|---|---|"]
    for platform in all_platforms().values():
        if not platform.limits:
            continue
        for name in ops.names():
            cells = [cell(platform, name, dtype, found, boards) for dtype in DTYPES]
            lines.append(f"| {platform.title} | `{name}` | {' | '.join(cells)} |")
    interpreters = ", ".join(one["triton"] for one in found) or "none"
    lines += [
        "",
        f"*numerics*: against float64 in Triton's interpreter, the same for all platforms (Triton {interpreters}). "
        "*compiled*: for all of the platform's architectures that this Triton knows, no spills, within the limits. "
        "*stand-in*: compiled for the nearest public target (gfx90a, gfx942; sm_80 for the S5000), because this one's "
        "compiler is not public. *PyTorch*: the platform's gate says so. "
        + ("" if boards else "No kernel has been run on hardware yet."),
    ]  # fmt: skip
    return "\n".join(lines)


def cell(platform: Platform, op: str, dtype: torch.dtype, found: list[dict], boards: list[dict]) -> str:
    """What was proven of an op in a dtype on a platform."""
    gate = platform.gate(op, dtype)
    if gate.mode == "reference":
        return "PyTorch"
    kind = str(dtype).removeprefix("torch.")
    said = []
    counts = [one["interpreted"].get(op, {"passed": 0, "failed": 1}) for one in found]
    if counts and all(one["passed"] and not one["failed"] for one in counts):
        said.append("numerics")
    versions: dict[str, list[str]] = {}
    for one in found:
        rows = [r for r in one["compiled"] if (r["platform"], r["op"], r["dtype"]) == (platform.name, op, kind)]
        if rows and not any(row["problems"] for row in rows):
            word = "stand-in" if all(row["stand_in"] for row in rows) else "compiled"
            versions.setdefault(word, []).append(".".join(one["triton"].split(".")[:2]))
    said += [f"{word} {', '.join(numbers)}" for word, numbers in versions.items()]
    for board in boards:
        tests = board["parts"].get("tests", {})
        if board["platform"] == platform.name and tests.get("result") == "passed":
            said.append(f"{board['board']} {tests['date']}")
    return "; ".join(said) or "nothing yet"


if __name__ == "__main__":
    sys.exit(main())
