"""Types of command-line arguments, each with a message that says what is allowed."""

from __future__ import annotations

import argparse

import torch

from ntops_mla import platform as platforms


def platform(text: str) -> str:
    """The name of a platform; an alias is turned into it."""
    try:
        return platforms.get_platform(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def dtype(text: str) -> torch.dtype:
    """A floating-point dtype by its torch name."""
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise argparse.ArgumentTypeError(f"no floating-point dtype {text!r}, say bfloat16, float16, float32 or float64")
    return found


def device(text: str) -> torch.device:
    """A device that torch can name."""
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"torch knows no device {text!r}") from None


def check_files(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError unless each of these arguments that is given is a file, there or not, in a folder that is."""
    for name in names:
        path = getattr(args, name)
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise ValueError(f"argument --{name}: {path} is not a file in a folder that exists")


def positive(text: str) -> int:
    """A number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number above zero is needed, got {text!r}")
    return int(text)
