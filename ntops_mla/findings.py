"""What a run of `python -m ntops_mla doctor` found on one board, as a file that the dispatcher reads.

`NTOPS_MLA_GATES=FILE` switches off, by name and with the reason, what did not work there, without touching code; and it
lifts a refusal that stands only until somebody has tried (`Limits.least_product`).

The file is JSON: `platform`, `device` (its name), `triton` (its version), `date`, and `kernels`, a list of
{`op`, `dtype`, `works` (true, false, or null: PyTorch runs there anyway), `reason`, `products` (the rows and columns of
those that were tried; left out: any)}.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ntops_mla import checkout
from ntops_mla.platform import dtype_name

VARIABLE = "NTOPS_MLA_GATES"
_TEXTS = ("platform", "device", "triton", "date")


@dataclass(frozen=True)
class Finding:
    """Whether an op's kernel works in a dtype; None: none is meant to run. `reason` is empty where it works."""

    works: bool | None
    reason: str
    products: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, eq=False)  # part of the key of every call, as settings are
class Findings:
    """One board's findings, by (op, dtype's name)."""

    platform: str
    device: str
    triton: str
    date: str
    kernels: Mapping[tuple[str, str], Finding]
    path: str = ""

    def broken(self, platform: str, op: str, dtype: torch.dtype) -> str | None:
        """Why an op's kernel must not run, whatever this board and its Triton are: broken once is reason enough."""
        found = self._of(platform, op, dtype)
        if found is None or found.works is not False:
            return None
        return f"{VARIABLE}: on {self.device}, {self.date}: {found.reason}"

    def of_board(self, platform: str, device: str | None, triton: str | None) -> bool:
        """Whether they are of this very board with this very Triton."""
        return (platform, device, triton) == (self.platform, self.device, self.triton)

    def works(self, op: str, dtype: torch.dtype, products: tuple[int, ...]) -> bool:
        """Whether an op's kernel was seen to work with these products."""
        found = self._of(self.platform, op, dtype)
        return found is not None and found.works is True and (found.products is None or products in found.products)

    def _of(self, platform: str, op: str, dtype: torch.dtype) -> Finding | None:
        return self.kernels.get((op, dtype_name(dtype))) if platform == self.platform else None


def from_environment() -> Findings | None:
    """The file that NTOPS_MLA_GATES names, None where it names none; ValueError where it cannot be read."""
    path = os.environ.get(VARIABLE, "").strip()
    return read(path) if path else None


def read(path: str | os.PathLike[str]) -> Findings:
    """The findings in a file; ValueError says what is wrong with it."""
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path}: cannot be read: {error}") from error
    try:
        return _parsed(data, str(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{VARIABLE}={path}: not a gates file as `python -m ntops_mla doctor` writes it: {what}"
        ) from None


def write(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data`, in the form above, whole or not at all."""
    _parsed(data, str(path))  # never a file that cannot be read back
    checkout.write({pathlib.Path(path): json.dumps(data, indent=1) + "\n"})


def _parsed(data: Any, path: str) -> Findings:
    if not isinstance(data, Mapping):
        raise TypeError("an object is needed")
    texts = {name: data[name] for name in _TEXTS}
    for name, value in texts.items():
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name} must be a text, got {value!r}")
    kernels = {}
    for row in data["kernels"]:
        works, dtype = row["works"], row["dtype"]
        if works is not None and not isinstance(works, bool):
            raise TypeError(f"works must be true, false or null, got {works!r}")
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"{dtype!r} is no dtype")
        tried = row.get("products")
        products = None if tried is None else tuple(tuple(map(int, one)) for one in tried)
        kernels[str(row["op"]), dtype] = Finding(works, str(row["reason"]), products)
    return Findings(**texts, kernels=MappingProxyType(kernels), path=path)
