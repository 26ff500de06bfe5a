"""`tune`: tiles timed on the board at hand, as a table that the dispatcher prefers to the platform's tiles."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import re
import sys
from typing import Any

from ntops_mla import checkout, child, dispatch, interpreter, tile_table, tuning, tuning_trial
from ntops_mla import platform as platforms
from ntops_mla.board import Board, board_of
from ntops_mla.cli import arguments
from ntops_mla.cli.board import chosen_device
from ntops_mla.platform import Tile, version_pair

HELP = "time tiles on the board at hand, and write a table of those that are better than the platform's"


def configure(parser: argparse.ArgumentParser) -> None:
    """Where, what, for how much work, and what to leave behind."""
    load = tuning_trial.Load()
    parser.add_argument("--platform", type=arguments.platform, help="this platform's device, not the best one found")
    parser.add_argument(
        "--op", action="append", choices=tuning.op_names(), help="this op's kernels; may be given repeatedly"
    )
    parser.add_argument("--dtype", action="append", type=arguments.dtype, help="in this dtype; may be given repeatedly")
    parser.add_argument("--batch", type=arguments.positive, default=load.batch, help="requests (default: %(default)s)")
    parser.add_argument(
        "--keys", type=arguments.positive, default=load.keys, help="cached tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=arguments.positive, default=load.tokens, help="new tokens in prefill (default: %(default)s)"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="the table (default: named by the device)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every candidate and its times here")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, and why others are left out")
    parser.add_argument("--arch", help="with --dry-run and --platform: this architecture, without a device")
    # What a child is called with
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Status 0 where a table was written, 1 where there is nothing to tune, 130 where it was stopped."""
    if args.child:
        child.reply(tuning_trial.examine(args.child))
    _check(args)
    if args.arch:
        return _list(args, _pretended(args.platform, args.arch), None)
    try:
        detection = chosen_device(args.platform)
    except platforms.DeviceNotFoundError as error:
        print(f"{error}" + ("; --arch NAME lists candidates without it" if args.dry_run else ""))
        return 1
    device = detection.device
    if not detection.platform.limits:
        print(f"nothing to tune on {detection.platform.title}: {detection.platform.gate('*', None).reason}")
        return 1
    board = board_of(detection)
    if board.problem is not None or board.device is None:
        print(f"nothing to tune: {board.problem or f'{device} has no name that a table could bear'}")
        return 1
    print(f"{board}, {board.device}", flush=True)
    shared_memory = platforms.probe(device).shared_memory
    if args.dry_run:
        return _list(args, board, shared_memory)
    try:
        return _tune(args, board, device, shared_memory)
    except KeyboardInterrupt:
        print("stopped: nothing was written")
        return 130


def _check(args: argparse.Namespace) -> None:
    if interpreter.enabled():
        raise ValueError(f"{interpreter.VARIABLE}=1: an interpreter's times say nothing of a board")
    for dtype in args.dtype or ():
        if dtype not in tuning.DTYPES:
            raise ValueError(f"argument --dtype: no kernel takes {dtype}")
    if args.arch and not (args.dry_run and args.platform):
        raise ValueError("argument --arch: with --dry-run and --platform only: tiles are timed on a device")
    arguments.check_files(args, "json", "output")
    if args.output is not None and args.dry_run:
        raise ValueError("argument --output: not with --dry-run, which times nothing")


def _pretended(name: str, arch: str) -> Board:
    """A board of an architecture that is not here, with the Triton that is."""
    platform = platforms.get_platform(name)
    limits = next((limits for limits in platform.limits if limits.arch == arch), None)
    if limits is None:
        known = " or ".join(repr(limits.arch) for limits in platform.limits) or "none"
        raise ValueError(f"argument --arch: {platform.name} has {known}, got {arch!r}")
    try:
        triton = version_pair(importlib.import_module("triton").__version__)
    except Exception:  # without one, or with a vendor's that raises: any version
        triton = None
    return Board(platform, limits, triton)


def _plans(args: argparse.Namespace, board: Board, shared_memory: int | None) -> list[tuning.Plan]:
    found = dispatch.settings().findings
    cases = tuning.cases(args.dtype or tuning.DTYPES, args.op)
    return [tuning.plan(board, case, found, shared_memory) for case in cases]


def _list(args: argparse.Namespace, board: Board, shared_memory: int | None) -> int:
    plans = _plans(args, board, shared_memory)
    for plan in plans:
        print(f"{plan.case}" + (f": left out: {plan.problem}" if plan.problem else ""))
        for tile in plan.tiles:
            print(f"    {_said(tile)}" + (", the platform's" if tile is plan.own else ""))
        for tile, reason in plan.left_out:
            print(f"  - {_said(tile)}: {reason}")
    count = sum(len(plan.tiles) for plan in plans)
    print(f"{board}: {count} candidates, {sum(len(plan.left_out) for plan in plans)} left out; nothing was timed")
    if args.json is not None:
        rows = [_plan_data(plan) for plan in plans]
        checkout.write({args.json: json.dumps({"board": str(board), "cases": rows}, indent=1) + "\n"})
    return 0 if count else 1


def _tune(args: argparse.Namespace, board: Board, device: Any, shared_memory: int | None) -> int:
    output = args.output or _default(board)
    if output.exists():  # hours of somebody's board
        raise ValueError(f"argument --output: {output} is there already: name another file")
    load = tuning_trial.Load(args.batch, args.keys, args.tokens)
    plans = _plans(args, board, shared_memory)
    for plan in plans:
        if plan.problem:
            print(f"{plan.case}: left out: {plan.problem}", flush=True)
    results = []
    with _Progress(sum(len(plan.tiles) for plan in plans)) as progress:
        for plan in plans:
            if plan.tiles:
                results.append(tuning.tune(board, device, plan, load, step=progress.step))
                progress.say(_outcome(results[-1]))
    if not any(candidate.times for result in results for candidate in result.candidates):
        print("nothing could be timed against another tile: no table is written")
        return 1
    table = tuning.table(board, results, load)
    tuning.write(output, table)
    if args.json is not None:
        report = {"table": table, "cases": [_result_data(result) for result in results]}
        checkout.write({args.json: json.dumps(report, indent=1) + "\n"})
    print(f"{output}: {len(table['rows'])} of {len(results)} tiles are better than the platform's")
    print(f"{tile_table.VARIABLE}={output} makes the dispatcher take them; docs/tuning.md says how to send them")
    return 0


def _default(board: Board) -> pathlib.Path:
    major, minor = version_pair(board.triton_version)
    name = re.sub(r"[^a-z0-9]+", "_", board.device.lower()).strip("_")
    return pathlib.Path(f"{name}_triton{major}.{minor}.json")


class _Progress:
    """tqdm's bar on stderr where it is installed and somebody looks; lines on stdout in any case."""

    def __init__(self, total: int) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
            print(f"{total} tiles to try; with tqdm installed there is a bar", file=sys.stderr)
        else:
            self._bar = tqdm(total=total, unit="tile", disable=None)  # None: where stderr is no terminal

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)


def _said(tile: Tile) -> str:
    blocks = "".join(f"{name} {value}, " for name, value in tile.blocks.items())
    return f"{blocks}{tile.num_warps} warps, {tile.num_stages} stages"


def _outcome(result: tuning.Result) -> str:
    """A case's result: the platform's tile, what takes its place, and what was dropped."""
    lines = [str(result.plan.case)]
    for title, candidate in (("platform's", result.before), ("better", result.best)):
        if candidate is not None:
            times = candidate.times
            took = (
                f": {times.median:.1f} us, quartiles {times.low:.1f} and {times.high:.1f}" if times else ": not timed"
            )
            lines.append(f"    {title:10}  {_said(candidate.tile)}{took}")
    if result.best is None:
        lines.append("    the platform's tile stays" if result.before else "    no tile works")
    for candidate in result.candidates:
        if not candidate.works:
            lines.append(f"    dropped     {_said(candidate.tile)}: {candidate.reason}")
    return "\n".join(lines)


def _plan_data(plan: tuning.Plan) -> dict[str, Any]:
    return {
        "case": plan.case.data(),
        "problem": plan.problem,
        "candidates": [tuning.tile_data(tile) for tile in plan.tiles],
        "left_out": [{**tuning.tile_data(tile), "reason": reason} for tile, reason in plan.left_out],
    }


def _result_data(result: tuning.Result) -> dict[str, Any]:
    candidates = [
        {
            **tuning.tile_data(candidate.tile),
            "platforms": candidate is result.before,
            "works": candidate.works,
            "reason": candidate.reason,
            "spills": candidate.spills,
            "times": candidate.times and candidate.times._asdict(),
        }
        for candidate in result.candidates
    ]
    return {**_plan_data(result.plan), "candidates": candidates}
