"""What an adapter is, and why a peer may be missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

from bench_rows.problem import Problem


@lru_cache(maxsize=64)
def missing(module: str, *names: str) -> str | None:
    """Why `module`, or one of its names, cannot be had here; None: it can."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever a package that does not fit this torch, or this driver, may raise
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return f"{module} does not import: {type(error).__name__}: {said}"
    for name in names:
        if not hasattr(found, name):
            return f"{module} has no {name}"
    return None


class Peer:
    """One other implementation of some ops."""

    name: str
    module: str
    names: tuple[str, ...] = ()
    timed = "whole call"
    note: str | None = None
    kinds: tuple[str, ...] = ()
    on_cpu = False

    def available(self, problem: Problem) -> str | None:
        """Why this peer does not run `problem`, or None."""
        reason = missing(self.module, *self.names)
        if reason is None and problem.device.type == "cpu" and not self.on_cpu:
            reason = f"{self.name} has no implementation for a CPU"
        return reason or self.unsupported(problem)

    def unsupported(self, problem: Problem) -> str | None:
        """Why this peer does not take these sizes, or None."""
        return None

    def make(self, problem: Problem) -> Callable[[], object]:
        """A call that gives a result, or a (result, lse of natural logarithm)."""
        return getattr(self, problem.case.kind)(problem)
