"""The JSON of a run: what board and what versions, the ceilings, the rows, and what was left out."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import torch

from bench_rows.timing import Clock
from ntops_mla import checkout, evidence, interpreter
from ntops_mla.cli import env
from ntops_mla.devices import probe
from ntops_mla.platform import Detection

FORMAT = 1
# Distributions of the peers that are timed
PEERS = ("transformers", "flash_mla", "flashinfer-python", "flash-attn", "flag_gems", "sageattention")
# What every row has, and which of it may be null.
FIELDS = {
    "op": str, "case": str, "groups": list, "params": dict, "implementation": str, "timed": str, "backend": str,
    "note": str, "tile": dict, "part": str, "status": str, "reason": str, "checked": str, "max_error": float,
    "cos_diff": float, "flop": int, "bytes": int, "ms": float, "ms_low": float, "ms_high": float, "runs": int,
    "peak_bytes": int, "tb_per_s": float, "tflop_per_s": float, "share_of_copy": float, "share_of_matmul": float,
    "bound": str, "share_of_bound": float,
}  # fmt: skip
_ALWAYS = ("op", "case", "groups", "params", "implementation", "timed", "status")
_HEAD = {
    "format": int, "date": str, "commit": str, "board": str, "platform": str, "device": str, "interpreted": bool,
    "versions": dict, "dtype": str, "size": str, "seed": int, "runs": int, "clock": str, "ceilings": dict, "rows": list,
    "left_out": list,
}  # fmt: skip
CEILINGS = ("copy_tb_per_s", "copy_bytes", "matmul_tflop_per_s", "matmul_rows")


def head(detection: Detection, clock: Clock, dtype: str, size: str, seed: int, runs: int, ceilings: dict) -> dict:
    """All but the rows."""
    machine = env.report(argparse.Namespace())
    device = (machine["device"] or {}) if machine["platform"]["name"] == detection.platform.name else {}
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": checkout.commit(checkout.root()),
        "board": board(detection),
        "platform": detection.platform.name,
        "device": str(detection.device),
        "interpreted": interpreter.enabled(),
        "simulated": bool(os.environ.get(evidence.SIMULATED)),
        "driver": device.get("driver"),
        "versions": {
            **{"torch" if name == "version" else name: version for name, version in machine["torch"].items()},
            "triton": machine["triton"]["version"],
            **{name: machine[name] for name in ("ninetoothed", "ntops_mla", "python")},
            **{name: _version(name) for name in PEERS},
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": dtype,
        "size": size,
        "seed": seed,
        "runs": runs,
        "clock": clock.said,
        "ceilings": ceilings,
    }


def board(detection: Detection) -> str:
    """The device's name; of a CPU, how many cores it has: models of them tell little of a shared machine."""
    if detection.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"CPU, {cores} cores"
    return probe(detection.device).name or detection.platform.title


def busy(data: dict[str, Any]) -> str | None:
    """Why a CPU's figures mean little: others wanted its cores when the run began. None: nothing is against it."""
    load, threads = data.get("load"), data.get("threads")
    if data["platform"] != "cpu" or load is None or not threads or load < 0.75 * threads:
        return None
    return f"the machine was busy (load {load:.1f} for {threads} threads): even ratios of this run mean little"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: pathlib.Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    checkout.write({path: json.dumps(data, indent=1, allow_nan=False) + "\n"})


def read(path: pathlib.Path) -> dict[str, Any]:
    """A run's JSON; ValueError that names the file and the field where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON file that can be read: {error}") from error
    said = problems(data)
    if said:
        raise ValueError(f"{path}: {said[0]}")
    return data


def problems(data: Any) -> list[str]:
    """What is wrong with a run's content, each with its field's name."""
    if not isinstance(data, dict):
        return [f"an object is needed, got {type(data).__name__}"]
    if data.get("format") != FORMAT:
        return [f"format: {FORMAT} is needed, got {data.get('format')!r}"]
    said = [_wrong(name, kind, data, True) for name, kind in _HEAD.items()]
    if any(said):
        return [text for text in said if text]
    said += [f"ceilings: {name}: a number is needed" for name in CEILINGS if not _is(data["ceilings"].get(name), float)]
    for index, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            said.append(f"rows[{index}]: an object is needed")
            continue
        told = [_wrong(name, kind, row, name in _ALWAYS) for name, kind in FIELDS.items()]
        if row.get("status") == "timed" and not _is(row.get("ms"), float):
            told.append("ms: a timed row has one")
        said += [f"rows[{index}]: {text}" for text in told if text]
    return [text for text in said if text]


def _is(value: Any, kind: type) -> bool:
    number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or isinstance(value, kind)


def _wrong(name: str, kind: type, data: dict, needed: bool) -> str | None:
    if name not in data:
        return f"{name}: missing"
    if data[name] is None and not needed:
        return None
    return None if _is(data[name], kind) else f"{name}: {kind.__name__} is needed, got {data[name]!r}"
