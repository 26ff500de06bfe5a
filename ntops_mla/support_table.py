"""README's support table, made from the platforms' files and the evidence. A cell says what was proven and no more."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from ntops_mla import ops
from ntops_mla.board import Board
from ntops_mla.platform import Platform, all_platforms, dtype_name

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def written(readme: str, table: str) -> str:
    """README's text with the table between its two marks."""
    for mark in (BEGIN, END):
        if readme.count(mark) != 1:
            raise ValueError(f"README.md: the mark {mark} must stand there once, found {readme.count(mark)} times")
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:start]}\n{table}\n{readme[end:]}"


def toolchains(root: pathlib.Path) -> list[dict[str, Any]]:
    """What scripts/evidence.py left, a file each Triton, oldest first."""
    found = [_read(path) for path in (root / "benchmarks" / "evidence").glob("triton-*.json")]
    return sorted(found, key=lambda one: [int(part) for part in one["triton"].split("+")[0].split(".")])


def checks(root: pathlib.Path) -> list[dict[str, Any]]:
    """What scripts/gpu_check.sh left, a file each board: `platform`, `board` and its `parts`."""
    return [_read(path) for path in sorted((root / "benchmarks" / "results").glob("*/check.json"))]


def lanes(root: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
    """What `evidence add` stored of scripts/ci.sh's runs on boards, by its place."""
    return {path: _read(path) for path in sorted((root / "benchmarks" / "results").glob("*/evidence.json"))}


def fingerprints(root: pathlib.Path) -> dict[str, str]:
    """What evidence is of, each with a hash: the kernels' files, and each platform's limits and tiles."""
    held = {f"kernels/{path.name}": path.read_bytes() for path in sorted((root / "kernels").glob("*.py"))}
    for platform in all_platforms().values():
        held[f"tiles of {platform.name}"] = repr((platform.limits, platform.tiles)).encode()
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in held.items()}


def changed(root: pathlib.Path, found: Sequence[dict]) -> list[str]:
    """What is not as it was when a Triton's evidence was collected; no evidence of a new one is no change."""
    now = fingerprints(root)
    return sorted({name for one in found for name, seen in one["sources"].items() if now.get(name) != seen})


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def table(found: Sequence[dict], boards: Sequence[dict], runs: Sequence[dict], since: Sequence[str] = ()) -> str:
    """The table and what its words mean; since: what was `changed` after it was tried."""
    lines = ["| platform | op | bfloat16 | float16 | float32 |", "|---|---|---|---|---|"]
    for platform in all_platforms().values():
        if not platform.limits:
            continue
        for name in ops.names():
            cells = [cell(platform, name, dtype, found, boards, runs) for dtype in DTYPES]
            own = ops.get(name).tried_in(DTYPES)
            label = f"`{name}`" if set(own) <= set(DTYPES) else f"`{name}` ({', '.join(map(dtype_name, own))})"
            lines.append(f"| {platform.title} | {label} | {' | '.join(cells)} |")
    interpreters = ", ".join(one["triton"] for one in found) or "none"
    lines += [
        "",
        f"*numerics*: against float64 in Triton's interpreter, the same for all platforms (Triton {interpreters}). "
        "*compiled*: for the platform's architectures that this Triton knows and that have a tile, no spills, within "
        "the limits. "
        "*stand-in*: compiled for the nearest public target (gfx90a, gfx942; sm_80 for the S5000), because this one's "
        "compiler is not public. *PyTorch*: the platform's gate says so. *after `doctor`*: PyTorch runs until "
        "`python -m ntops_mla doctor` has seen the kernel work there, because it may end the process in the compiler. "
        + ("" if boards or runs else "No kernel has been run on hardware yet.")
        + (f" Changed since numerics and compilation were tried: {', '.join(since)}." if since else ""),
    ]  # fmt: skip
    return "\n".join(lines)


# Of tests/interpreted, which has a file for each op, but for these.
_TRIED_IN = dict.fromkeys(("latent_append_fp8", "latent_quantize", "latent_dequantize"), "latent_fp8")


def cell(
    platform: Platform,
    op: str,
    dtype: torch.dtype,
    found: Sequence[dict],
    boards: Sequence[dict],
    runs: Sequence[dict],
) -> str:
    """What was proven of an op in a dtype on a platform."""
    dtype = ops.get(op).tried_in((dtype,))[0]
    gate = platform.gate(op, dtype)
    if gate.mode == "reference":
        return "PyTorch"
    kind = dtype_name(dtype)
    said = []
    counts = [one["interpreted"].get(_TRIED_IN.get(op, op), {"passed": 0, "failed": 1}) for one in found]
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
    said += [claim for run in runs if run["platform"] == platform.name and (claim := on_board(run, op, kind))]
    if waits(platform, op, dtype):
        said.append("after `doctor`")
    return "; ".join(said) or "nothing yet"


def waits(platform: Platform, name: str, dtype: torch.dtype) -> bool:
    """Whether the op's kernel is refused on some board of the platform until somebody has tried it there."""
    spec = ops.get(name).spec
    key = spec.key(*ops.get(name).example(torch.device("meta"), dtype))
    return any(
        min(needed.products, default=limits.least_product.value) < limits.least_product.value
        for limits in platform.limits
        if limits.least_product is not None
        for needed in spec.tiles(Board(platform, limits), *key)
    )


def on_board(run: dict[str, Any], op: str, dtype: str) -> str | None:
    """What a lane's run on a board shows of a kernel: that it works only where no test of the run failed either."""
    works = next((row["works"] for row in run["kernels"] if (row["op"], row["dtype"]) == (op, dtype)), None)
    where = f"{run['board']} {run['date'][:10]}"
    if works is False:
        return f"broken on {where}"
    tests = run["tests"]
    passed = tests is not None and tests["tests"] > tests["skipped"] and not (tests["failures"] or tests["errors"])
    return where if works and passed else None
