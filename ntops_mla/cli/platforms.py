"""`platforms`: what is supported, with the limits known, and what of it is here; `--ci`: the CI files made of it."""

from __future__ import annotations

import argparse
from typing import Any

from ntops_mla import checkout, ci_matrix
from ntops_mla import platform as platforms
from ntops_mla.cli.table import said, table

HELP = "the platforms, their limits, and which of them is here"


def configure(parser: argparse.ArgumentParser) -> None:
    """The CI files, shown, written or checked."""
    parser.add_argument("--ci", action="store_true", help="the CI files that follow from the platforms")
    then = parser.add_mutually_exclusive_group()
    then.add_argument("--write", action="store_true", help="with --ci: write them in this checkout")
    then.add_argument("--check", action="store_true", help="with --ci: exit status 1 where this checkout's are others")


def report(args: argparse.Namespace) -> list[dict[str, Any]] | dict[str, str]:
    """One dictionary a platform; with --ci the text of each file, by its path."""
    if args.ci:
        return _ci_files(args)
    for name in ("write", "check"):
        if getattr(args, name):
            raise ValueError(f"argument --{name}: needs --ci")
    return [_describe(platform) for platform in platforms.all_platforms().values()]


def _ci_files(args: argparse.Namespace) -> dict[str, str]:
    files = ci_matrix.files()
    if args.write:
        checkout.write({checkout.root() / path: text for path, text in files.items()})
    if args.check:
        root = checkout.root()
        stale = [
            str(path)
            for path, text in files.items()
            if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
        ]
        if stale:
            raise SystemExit(
                f"not current: {', '.join(stale)}; python -m ntops_mla platforms --ci --write writes it anew"
            )
    return {str(path): text for path, text in files.items()}


def _describe(platform: platforms.Platform) -> dict[str, Any]:
    presence = platforms.look_for(platform.name)
    return {
        "name": platform.name,
        "title": platform.title,
        "aliases": list(platform.aliases),
        "device_type": platform.markers.device_type,
        "detected": presence.device is not None,
        "works": presence.works,
        "device": None if presence.device is None else str(presence.device),
        "reason": presence.reason,
        "limits": [limits_data(limits) for limits in platform.limits],
    }


def limits_data(limits: platforms.Limits) -> dict[str, Any]:
    """Limits as plain data, each number with its source."""
    capability = limits.min_capability
    numbers = {name: getattr(limits, name) for name in ("shared_memory", "max_warps", "lanes", "triton_target")}
    return {
        "arch": limits.arch,
        "min_capability": None if capability is None else list(capability),
        **{
            name: None if fact is None else {"value": fact.value, "source": fact.source}
            for name, fact in numbers.items()
        },
    }


def text(data: list[dict[str, Any]] | dict[str, str]) -> str:
    """Two tables: the platforms, then their limits. Or the CI files, one behind the other."""
    if isinstance(data, dict):
        return "\n".join(f"# {path}\n{content}" for path, content in data.items()).rstrip()
    here = [(row["name"], ", ".join(row["aliases"]), row["device_type"], _state(row), row["reason"]) for row in data]
    return "\n\n".join(
        [
            table(("platform", "aliases", "device type", "here", "why"), here),
            table(LIMIT_HEAD, [limit_row(row["name"], limits) for row in data for limits in row["limits"]]),
            "? = not known, the driver is asked. Sources: --json. No number here was measured by this project.",
        ]
    )


LIMIT_HEAD = ("platform", "architecture", "capability from", "shared memory", "warps", "lanes")


def limit_row(name: str, limits: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of limits."""
    capability = limits["min_capability"]
    numbers = [said(limits[key]["value"]) for key in ("shared_memory", "max_warps", "lanes")]
    return name, limits["arch"], "any" if capability is None else ".".join(map(str, capability)), *numbers


def _state(row: dict[str, Any]) -> str:
    if row["works"]:
        return f"works ({row['device']})"
    return f"does not work ({row['device']})" if row["detected"] else "no"
