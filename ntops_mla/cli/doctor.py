"""`doctor`: is this board ready, and which kernels work on it; each is tried in a process of its own."""

from __future__ import annotations

import argparse
import math
import pathlib
import signal
import sys
from typing import Any

import torch

from ntops_mla import child, doctor, findings, ops
from ntops_mla import platform as platforms
from ntops_mla.cli import arguments
from ntops_mla.cli.board import chosen_device
from ntops_mla.cli.table import said

HELP = "try every kernel once, each in a process of its own, and say which work"


def configure(parser: argparse.ArgumentParser) -> None:
    """Where to look, how far to go, what to leave behind."""
    parser.add_argument("--platform", type=arguments.platform, help="this platform's device, not the best one found")
    parser.add_argument("--preflight", action="store_true", help="no kernels: detection, Triton, limits, a small sum")
    parser.add_argument(
        "--gates", type=pathlib.Path, metavar="FILE", help=f"write what works here, for {findings.VARIABLE}=FILE"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report here")
    parser.add_argument(
        "--timeout", type=_seconds, default=doctor.TIMEOUT, help="seconds a kernel may take (default: %(default)g)"
    )
    parser.add_argument("--op", choices=ops.names(), help="this op's kernel alone")
    parser.add_argument("--dtype", type=_dtype, help="in this dtype alone; what has none is tried all the same")
    # What a child is called with
    parser.add_argument("--child", choices=("sum", *ops.names()), help=argparse.SUPPRESS)
    parser.add_argument("--device", type=arguments.device, help=argparse.SUPPRESS)


def _dtype(text: str) -> torch.dtype:
    """A floating-point one; a child may be asked for an op of whole numbers."""
    return torch.int32 if text == "int32" else arguments.dtype(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"seconds above zero are needed, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Status 0 where the board is ready and every kernel that is meant to run there works, else 1."""
    if args.child:
        sum_only = args.child == "sum"
        data = doctor.add(args.device) if sum_only else doctor.examine(args.child, args.dtype, args.device)
        child.reply(data)
    arguments.check_files(args, "json", "gates")
    if args.preflight and args.gates:
        raise ValueError("argument --gates: not with --preflight, which tries no kernel")
    if args.dtype not in (None, *doctor.DTYPES, *(ops.get(args.op).dtypes if args.op else ())):
        raise ValueError(f"argument --dtype: no kernel takes {args.dtype}")
    try:
        detection = chosen_device(args.platform)
    except platforms.DeviceNotFoundError as error:
        print(f"{error}")
        return 1
    return _run(args, detection)


def _run(args: argparse.Namespace, detection: platforms.Detection) -> int:
    # Else an end by SIGTERM would leave the child running, on the board, for ever.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    board = doctor.preflight(detection, args.timeout)
    for name in ("platform", "reason", "device", "name", "limits", "triton", "triton_target", "shared_memory"):
        print(f"{name.replace('_', ' '):14}  {said(board[name])}", flush=True)
    for kind in ("notes", "problems"):
        for told in board[kind]:
            print(f"{kind[:-1]:14}  {told}", flush=True)
    if board["triton"] is None and not board["problems"]:
        print(f"{'problem':14}  Triton is not installed: PyTorch runs in place of every kernel")
    kernels = []
    if not args.preflight:
        chosen = [args.op] if args.op else ops.names(), [args.dtype] if args.dtype else doctor.DTYPES
        for row in doctor.examine_all(detection, board, *chosen, args.timeout):
            kernels.append(row)
            state = {True: "works", False: "BROKEN", None: "PyTorch"}[row["works"]]
            told = f"{row['op']:14}  {row['dtype']:9}  {state:8}  {row['seconds']:5.1f} s  {row['reason']}"
            print(told.rstrip(), flush=True)
            _write(args, board, kernels)  # each time: whoever ends this, what was found stays
    _write(args, board, kernels)
    if args.json is not None:
        print(f"report: {args.json}")
    if args.gates is not None:
        print(f"gates: {args.gates}; {findings.VARIABLE}={args.gates} makes the dispatcher read them")
    broken = [row for row in kernels if row["works"] is False]
    if broken:
        print(f"{len(broken)} of {len(kernels)} are broken")
    return 1 if broken or board["problems"] else 0


def _write(args: argparse.Namespace, board: dict[str, Any], kernels: list[dict[str, Any]]) -> None:
    report = doctor.report(board, kernels)
    if args.json is not None:
        findings.write(args.json, report)
    if args.gates is not None:
        findings.write(args.gates, {key: report[key] for key in ("platform", "device", "triton", "date", "kernels")})
