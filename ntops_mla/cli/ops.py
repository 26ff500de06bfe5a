"""`ops`: every op, its signature, and where its kernel would run."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ntops_mla import ops
from ntops_mla import platform as platforms
from ntops_mla.cli.explain import ask

HELP = "the ops, with their signatures and backends"


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def report(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One dictionary an op; `backends` maps each platform to what example arguments in bfloat16 would get there."""
    return [
        {
            "name": name,
            "signature": ops.get(name).signature,
            "doc": ops.get(name).doc,
            "backends": {
                platform.name: ask(ops.get(name), torch.device("meta"), torch.bfloat16, {}, platform)["backend"]
                for platform in platforms.all_platforms().values()
            },
        }
        for name in ops.names()
    ]


def text(data: list[dict[str, Any]]) -> str:
    """Three lines an op."""
    return "\n\n".join(
        "\n    ".join([op["signature"], op["doc"], ", ".join(f"{k}: {v}" for k, v in op["backends"].items())])
        for op in data
    )
