"""`explain`: which backend an op would run for example arguments, and why."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ntops_mla import ops
from ntops_mla import platform as platforms
from ntops_mla.cli import arguments
from ntops_mla.cli.table import table

HELP = "which backend runs an op, here or on a platform, and why"

_SIZES = {
    "heads": "query heads",
    "page_size": "cache rows in a page",
    "tokens": "new tokens",
    "kv_lora_rank": "width of a latent",
    "rope": "width of the rotated part",
    "nope": "width of a head without the rotated part",
    "v": "width of a value head",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The op, where it is to run, and the sizes of the example arguments."""
    parser.add_argument("op", nargs="?", help="an op's name; without one, all of them")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--platform", type=arguments.platform, help="pretend to be on this platform (name or alias)")
    place.add_argument("--device", type=arguments.device, help="a device here; without one, the best that works")
    parser.add_argument("--dtype", type=arguments.dtype, default=torch.bfloat16, help="bfloat16 by default")
    for name, meaning in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=arguments.positive, help=meaning)


def report(args: argparse.Namespace) -> list[dict[str, str]]:
    """One dictionary an op: op, platform, backend, reason."""
    if args.op is not None and args.op not in ops.names():
        raise ValueError(f"argument op: no op {args.op!r}; there are {', '.join(ops.names())}")
    platform = platforms.get_platform(args.platform) if args.platform else None
    if platform:
        device = torch.device("meta")  # shapes are enough to choose by
    else:
        device = args.device or platforms.best_device().device
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    return [ask(ops.get(name), device, args.dtype, sizes, platform) for name in ([args.op] if args.op else ops.names())]


def ask(
    op: Any, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], platform: platforms.Platform | None
) -> dict[str, str]:
    """The choice for example arguments, as plain data. A choice that is an error has the backend "error"."""
    try:
        example = op.example(device, dtype, **sizes)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch built without it
        raise ValueError(
            f"no example arguments of {op.name} on {device}: {str(error).strip().splitlines()[0]}"
        ) from None
    try:
        choice = op.explain(*example, platform=platform)
    except RuntimeError as error:  # strict mode, or a backend asked for that cannot run
        name = platform.name if platform else str(device)
        return {"op": op.name, "platform": name, "backend": "error", "reason": f"{type(error).__name__}: {error}"}
    return {"op": choice.op, "platform": choice.platform, "backend": choice.backend, "reason": choice.reason}


def text(data: list[dict[str, str]]) -> str:
    """A table."""
    head = ("op", "platform", "backend", "reason")
    return table(head, [tuple(row[name] for name in head) for row in data])
