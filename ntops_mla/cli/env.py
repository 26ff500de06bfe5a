"""`env`: what a bug report needs to say about the machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform as system
import re
import subprocess
import sys
from typing import Any

import torch

from ntops_mla import findings
from ntops_mla import platform as platforms
from ntops_mla.cli.platforms import LIMIT_HEAD, limit_row, limits_data
from ntops_mla.cli.table import said, table

HELP = "a report on this machine, to paste into a bug report"

_TRITONS = ("triton", "flagtree", "pytorch-triton", "triton-musa")  # distributions that bring a module `triton`


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data. A part that cannot be had says why in its place."""
    try:
        found, error = platforms.best_device(), None
    except (ValueError, RuntimeError) as raised:  # a wrong setting, a broken platform file: the report is about that
        found, error = None, f"{type(raised).__name__}: {raised}"
    return {
        "ntops_mla": _version("ntops_mla"),
        "python": sys.version.split()[0],
        "os": system.platform(),
        "torch": {"version": torch.__version__, **_vendor_versions()},
        "triton": _triton(),
        "ninetoothed": _version("ninetoothed"),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NTOPS_MLA_")},
        "platform": {"name": found.platform.name, "reason": found.reason} if found else {"name": None, "reason": error},
        "device": _device(found) if found else None,
        "gates": _gates(found.platform) if found else [],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(package) is None:
            return None
    try:  # a checkout that is not installed
        return f"{importlib.import_module(f'{package}.version').__version__}, not installed"
    except (ImportError, AttributeError):
        return "present, version unknown"


def _vendor_versions() -> dict[str, str]:
    """Whatever torch.version holds: every vendor adds an attribute of its own."""
    said_by_torch = {name: value for name, value in vars(torch.version).items() if isinstance(value, str)}
    return {name: value for name, value in said_by_torch.items() if name[0] != "_" and name != "git_version"}


def _triton() -> dict[str, str | None]:
    """Version and place of Triton without importing it: some vendors' raise at import where a variable is unset."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError) as error:
        return {"version": None, "place": f"{type(error).__name__}: {error}"}
    if spec is None:
        return {"version": None, "place": None}
    for name in _TRITONS:
        try:
            return {"version": f"{importlib.metadata.version(name)} ({name})", "place": spec.origin}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"version": "unknown", "place": spec.origin}


def _device(found: platforms.Detection) -> dict[str, Any]:
    errors = []
    if found.device.type != "cpu":  # for the driver's target; a CPU has none
        try:
            importlib.import_module("triton")
        except Exception as error:  # a report must come out whatever a vendor's import does
            errors.append(f"import triton raised {type(error).__name__}: {error}")
    info = platforms.probe(found.device)
    limits = found.platform.limits_for(info.capability)
    return {
        "device": str(found.device),
        "name": info.name,
        "capability": None if info.capability is None else list(info.capability),
        "shared_memory": info.shared_memory,
        "processors": info.processors,
        "triton_target": info.triton_target,
        "driver": _driver(found.platform),
        "errors": [*errors, *info.errors],
        "limits": None if limits is None else limits_data(limits),
    }


def _driver(platform: platforms.Platform) -> str | None:
    """The driver's version, as the vendor's tool shows it."""
    if platform.ci is None or platform.ci.smi is None:
        return None
    try:
        done = subprocess.run(
            [platform.ci.smi], capture_output=True, text=True, timeout=30, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    told = re.search(r"driver version\s*:?\s*([0-9][\w.-]*)", done.stdout, re.IGNORECASE)
    return told and told[1]


def _gates(platform: platforms.Platform) -> list[dict[str, str]]:
    """Those of a gates file first, since they win, then the platform's."""
    try:
        found = findings.from_environment()
    except ValueError as error:  # every op raises it; the report is about that
        rows = [{"op": "*", "dtype": "*", "mode": "error", "reason": str(error)}]
    else:
        broken = (
            [(op, dtype, found.broken(platform.name, op, getattr(torch, dtype))) for op, dtype in found.kernels]
            if found
            else []
        )
        rows = [{"op": op, "dtype": dtype, "mode": "reference", "reason": why} for op, dtype, why in broken if why]
    return rows + [
        {"op": op, "dtype": dtype, "mode": gate.mode, "reason": gate.reason}
        for op, row in platform.gates.items()
        for dtype, gate in row.items()
    ]


def text(data: dict[str, Any]) -> str:
    """The report as text."""
    device = data["device"] or {}
    torch_said = ", ".join(
        [data["torch"]["version"], *(f"{k} {v}" for k, v in data["torch"].items() if k != "version")]
    )
    lines = [
        ("platform", said(data["platform"]["name"])),
        ("why", data["platform"]["reason"]),
        ("device", ", ".join(filter(None, (device.get("device"), device.get("name")))) or "?"),
        ("capability", ".".join(map(str, device.get("capability") or ["?"]))),
        ("shared memory", said(device.get("shared_memory"))),
        ("processors", said(device.get("processors"))),
        ("triton target", said(device.get("triton_target"))),
        ("driver", said(device.get("driver"))),
        *(("said", error) for error in device.get("errors", ())),
        ("ntops_mla", said(data["ntops_mla"])),
        ("torch", torch_said),
        ("triton", said(data["triton"]["version"]) if data["triton"]["version"] else "not installed"),
        ("", data["triton"]["place"] or ""),
        ("ninetoothed", data["ninetoothed"] or "not installed"),
        ("python", data["python"]),
        ("os", data["os"]),
        ("settings", ", ".join(f"{k}={v}" for k, v in data["settings"].items()) or "none"),
    ]
    width = max(len(name) for name, _ in lines)
    parts = ["\n".join(f"{name.ljust(width)}  {value}" for name, value in lines if value)]
    if device.get("limits"):
        parts.append(table(LIMIT_HEAD, [limit_row(data["platform"]["name"], device["limits"])]))
    if data["gates"]:
        rows = [(gate["op"], gate["dtype"], gate["mode"], gate["reason"]) for gate in data["gates"]]
        parts.append(table(("op", "dtype", "gate", "reason"), rows))
    return "\n\n".join(parts)
