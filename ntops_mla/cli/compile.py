"""`compile`: every kernel with every platform's tiles, compiled without a device and held against the limits."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from ntops_mla import interpreter, ops
from ntops_mla import platform as platforms
from ntops_mla.cli import arguments

HELP = "compile the kernels for the platforms' targets, and show registers, spills and shared memory"

_COLUMNS = (
    ("kernel", 13), ("platform", 9), ("arch", 10), ("target", 12), ("dtype", 22), ("tile", 46), ("registers", 9),
    ("spill", 6), ("shared", 7), ("programs", 8), ("products", 8), ("async", 6), ("copies", 6),
)  # fmt: skip
# What a compiled kernel hangs on: of others it is the same one again.
_IDENTITY = (
    "kernel", "arch", "platform", "target", "dtype", "split", "causal", "flat", "planned", "want_max", "tile",
)  # fmt: skip
_SHORT = {"block_h": "h", "block_m": "m", "block_n": "n", "block_c": "c", "page_size": "page", "qk_width": "qk"}


def configure(parser: argparse.ArgumentParser) -> None:
    """What to compile, and where to leave it."""
    parser.add_argument("--platform", type=arguments.platform, help="one platform (name or alias); without it, all")
    parser.add_argument("--op", help="one op; without it, all")
    parser.add_argument("--all", action="store_true", help="all dtypes, page sizes and head counts")
    parser.add_argument(
        "--keep", type=pathlib.Path, metavar="DIR", help="write generated source, TTGIR, PTX or ISA here"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows here")


def run(args: argparse.Namespace) -> int:
    """Prints a line a kernel; status 1 where a tile must not be shipped."""
    if args.op is not None and args.op not in ops.names():
        raise ValueError(f"argument --op: no op {args.op!r}; there are {', '.join(ops.names())}")
    for name in ("json", "keep"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"argument --{name}: there is no folder {path.parent}")
    if interpreter.enabled():
        raise ValueError(f"{interpreter.VARIABLE}=1: nothing is compiled in a process that interprets")
    try:
        interpreter.install_driver()
    except ImportError as error:
        raise ValueError(f"nothing can be compiled: {error}") from error
    from ntops_mla.compile_matrix import cases, compile_case

    chosen = [platforms.get_platform(args.platform)] if args.platform else list(platforms.all_platforms().values())
    print("  ".join(title.ljust(width) for title, width in _COLUMNS))
    rows, seen = [], set()
    for case in cases(chosen, [args.op] if args.op else list(ops.names()), args.all):
        for row, compiled, source in compile_case(case):
            identity = json.dumps([row[key] for key in _IDENTITY])
            if identity in seen:
                continue
            seen.add(identity)
            rows.append(row)
            print(line(row), flush=True)
            if args.keep is not None:
                _keep(args.keep, row, compiled, source)
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    bad = sum(bool(row["problems"]) for row in rows)
    print(
        f"{len(rows)} kernels, {bad} with problems. * = a stand-in: the nearest target that public Triton compiles for."
    )
    return 1 if bad else 0


def line(row: dict[str, Any]) -> str:
    """One row as text, its problems behind it."""
    tile = row["tile"]
    blocks = [
        f"{_SHORT.get(name, name)}{tile[name]}" for name in tile if name not in ("num_warps", "num_stages", "rope")
    ]
    cells = (
        row["kernel"],
        row["platform"],
        row["arch"],
        row["target"] + "*" * row["stand_in"],
        row["dtype"] + "".join(f" {form}" for form in ("split", "causal", "planned") if row[form]),
        f"{' '.join(blocks)} {tile['num_warps']} warps, {tile['num_stages']} stages",
        *(row.get(key) for key in (
            "registers", "spill_bytes", "shared_bytes", "programs", "products", "asynchronous", "async_copies",
        )),
    )  # fmt: skip
    text = "  ".join(str("?" if cell is None else cell).ljust(width) for cell, (_, width) in zip(cells, _COLUMNS))
    return text.rstrip() + "".join(f"\n    {problem}" for problem in row["problems"])


def _keep(folder: pathlib.Path, row: dict[str, Any], compiled: Any, source: str) -> None:
    blocks = "_".join(f"{_SHORT.get(name, name)}{value}" for name, value in row["tile"].items())
    stem = f"{row['kernel']}_{row['platform']}_{row['arch']}_{row['target']}_{row['dtype']}_{blocks}"
    stem = "".join(c if c.isalnum() or c in "_-." else "_" for c in stem)
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.py").write_text(source, encoding="utf-8")
    for kind in ("ttgir", "ptx", "amdgcn") if compiled is not None else ():
        if kind in compiled.assembly:
            (folder / f"{stem}.{kind}").write_text(compiled.assembly[kind], encoding="utf-8")
