"""The ops as ntops.torch has its own: plain functions, one each.

InfiniCore writes a module of its own over the global `torch` of every function in ntops.torch. So this file has no such
global, and the functions only forward; the ops' files keep theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ntops_mla import ops


def _forwarding(op: Callable[..., Any]) -> Callable[..., Any]:
    # With the op's signature, docstring, `.explain` and `.reference`.
    @functools.wraps(op)
    def forward(*args, **kwargs):
        return op(*args, **kwargs)

    forward.__module__ = __name__
    return forward


FUNCTIONS = {name: _forwarding(getattr(ops, name)) for name in ops.names()}
globals().update(FUNCTIONS)  # where pickle looks for them
