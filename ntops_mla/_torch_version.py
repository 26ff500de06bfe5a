"""The oldest PyTorch this package runs on, said at import."""

from __future__ import annotations

import pathlib
import re

MINIMUM = (2, 4)


def require_torch() -> None:
    """Raise ImportError where torch is missing or older than MINIMUM."""
    minimum = ".".join(map(str, MINIMUM))
    try:
        import torch
    except ImportError as error:
        own = pathlib.Path(__file__).resolve().parent.parent / ".venv" / "bin" / "activate"
        there = f". This checkout has one: source {own}" if own.exists() else ""
        raise ImportError(
            f"ntops_mla needs torch >= {minimum}; install your platform vendor's, or see README.md{there}"
        ) from error
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is not None and tuple(map(int, found.groups())) < MINIMUM:
        raise ImportError(f"ntops_mla needs torch >= {minimum}, found {torch.__version__}")
