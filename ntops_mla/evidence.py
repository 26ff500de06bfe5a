"""What a run of scripts/ci.sh on a board showed, as one file, `evidence.json`, that can be sent and merged.

`collect` makes it of what the lane's steps left in their folder, `add` puts it with the repository's results. Its
fields: `format`; `platform` and `board` (the device's name, null where none was found); `driver`, `triton_target` and
`versions`; `date` (UTC) and `commit`; `simulated` (a fake board) and `interpreted` (Triton's interpreter), with either
of which nothing of hardware was shown; `kernels`, what `python -m ntops_mla doctor` found of each op and dtype;
`tests`, the counts; `attention`, attention_test's result; `benchmarks`, files beside this one; `steps`, each with its
exit status.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import re
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ntops_mla import checkout, interpreter, support_table
from ntops_mla.platform import all_platforms

FORMAT = 1
NAME = "evidence.json"
_ROW = ("op", "dtype", "works", "reason")
COUNTS = ("tests", "failures", "errors", "skipped")
SIMULATED = "NTOPS_MLA_TEST_BOARD"  # names the board that a test pretends
_OTHERS = {NAME, "check.json", "env.json"}  # in a board's folder and no figures


# --- making one ---


def collect(platform: str, folder: pathlib.Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What `folder` holds of a lane's run. `machine` is the report of `python -m ntops_mla env`. What a step did not
    leave is null, or empty: the file is for failed runs, too."""
    here = machine["platform"]["name"] == platform
    device = machine["device"] if here else None
    gates = _loaded(folder / "gates.json")
    return {
        "format": FORMAT,
        "platform": platform,
        "board": device and (device["name"] or platform),
        "driver": device and device.get("driver"),
        "triton_target": device and device["triton_target"],
        "versions": {
            **{name: machine[name] for name in ("ntops_mla", "ninetoothed", "python", "os")},
            "triton": machine["triton"]["version"],
            **{"torch" if name == "version" else name: value for name, value in machine["torch"].items()},
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": checkout.commit(checkout.root()),
        "simulated": bool(os.environ.get(SIMULATED)),
        "interpreted": interpreter.enabled(),
        "kernels": [{name: row[name] for name in _ROW} for row in gates["kernels"]] if gates else [],
        "tests": _counts(folder / "test-results.xml"),
        "attention": _attention(folder),
        "benchmarks": [
            path.relative_to(folder).as_posix()
            for path in sorted((folder / "benchmarks").rglob("*.json"))
            if path.name not in _OTHERS
        ],
        "steps": _steps(folder),
    }


def _loaded(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # its step failed, and says so itself
        return None


def _counts(path: pathlib.Path) -> dict[str, int] | None:
    try:
        root = xml.etree.ElementTree.parse(path).getroot()
    except (OSError, xml.etree.ElementTree.ParseError):
        return None
    return {name: sum(int(suite.get(name, 0)) for suite in root.iter("testsuite")) for name in COUNTS}


def _attention(folder: pathlib.Path) -> dict[str, Any] | None:
    found = _loaded(folder / "attention.json")
    if found is None:
        return None
    passed = _steps(folder).get("attention") == 0
    return {"passed": passed, **{name: found[name] for name in ("config", "dtype", "warmups", "runs", "rows")}}


def _steps(folder: pathlib.Path) -> dict[str, int]:
    """scripts/ci.sh writes a line a step: its name and its exit status."""
    try:
        lines = (folder / "steps.txt").read_text(encoding="utf-8").split("\n")
    except OSError:
        return {}
    return {name: int(status) for name, status in (line.split() for line in lines if line)}


# --- judging one ---


def problems(data: Any) -> list[str]:
    """What is wrong with an evidence file's content, each with its field's name."""
    if not isinstance(data, dict):
        return [f"an object is needed, got {type(data).__name__}"]
    if data.get("format") != FORMAT:
        return [f"format: {FORMAT} is needed, got {data.get('format')!r}"]
    said = [f"{name}: missing" for name in _FIELDS if name not in data]
    said += [f"{name}: no such field" for name in data if name not in _FIELDS]
    said += [
        f"{name}: {what} is needed, got {_short(data[name])}"
        for name, (what, good) in _FIELDS.items()
        if name in data and not good(data[name])
    ]
    return said


def refusal(data: dict[str, Any]) -> str | None:
    """Why a file without problems shows nothing of hardware, None where it does."""
    if data["simulated"]:
        return "simulated: it was run on a fake board"
    if data["interpreted"]:
        return "interpreted: its kernels ran in Triton's interpreter"
    if not all_platforms()[data["platform"]].limits:
        return f"platform: {data['platform']} is no accelerator"
    if data["board"] is None:
        return "board: the lane found no device"
    if not data["kernels"]:
        return "kernels: empty, the doctor did not come to its end"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _date(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value):
        return False
    try:
        moment = datetime.datetime.strptime(value, "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return False
    # A clock that runs ahead would keep all later runs out.
    return moment <= datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)


def _kernels(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and row.keys() == set(_ROW)
        and _text(row["op"])
        and isinstance(getattr(torch, str(row["dtype"]), None), torch.dtype)
        and (row["works"] is None or isinstance(row["works"], bool))
        and isinstance(row["reason"], str)
        for row in value
    )


def _counted(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == set(COUNTS)
        and all(_is(int)(number) and number >= 0 for number in value.values())
    )


def _attended(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and isinstance(value.get("passed"), bool) and isinstance(value.get("rows"), list)
    )


def _names(value: Any) -> bool:
    """Files below the evidence's own folder, which can lie in one folder, beside what else is there."""
    if not isinstance(value, list) or not all(isinstance(name, str) and name.endswith(".json") for name in value):
        return False
    paths = [pathlib.PurePosixPath(name) for name in value]
    names = {path.name for path in paths}
    inside = not any(path.is_absolute() or ".." in path.parts for path in paths)
    return inside and len(names) == len(paths) and not names & _OTHERS


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format": (str(FORMAT), _is(int)),
    "platform": ("a platform's name", lambda value: isinstance(value, str) and value in all_platforms()),
    "board": ("a device's name or null", _text_or_none),
    "driver": ("a version or null", _text_or_none),
    "triton_target": ("a text or null", _text_or_none),
    "versions": (
        "an object of texts",
        lambda value: isinstance(value, dict) and all(map(_text_or_none, value.values())),
    ),
    "date": ("a moment in UTC that is not to come, as 2026-01-31T23:59:59Z,", _date),
    "commit": ("a text", _text),
    "simulated": ("true or false", _is(bool)),
    "interpreted": ("true or false", _is(bool)),
    "kernels": ("a list of {op, dtype, works, reason}", _kernels),
    "tests": (f"null or numbers {', '.join(COUNTS)}", _counted),
    "attention": ("null or an object with passed and rows", _attended),
    "benchmarks": ("a list of JSON files beside it", _names),
    "steps": (
        "an object of exit statuses",
        lambda value: isinstance(value, dict) and all(map(_is(int), value.values())),
    ),
}


# --- merging it ---


def add(paths: Iterable[pathlib.Path], root: pathlib.Path) -> list[pathlib.Path]:
    """Puts evidence files, and their benchmarks' figures, in `root`/benchmarks/results/BOARD/, and in README's table.

    A file that shows nothing of hardware, has a bad field or is older than what is there: ValueError, and nothing is
    written.
    """
    stored = support_table.lanes(root)
    new: dict[pathlib.Path, dict[str, Any]] = {}
    files: dict[pathlib.Path, str | bytes] = {}
    for path in paths:
        data = read(path)
        folder = root / "benchmarks" / "results" / board_folder(data["board"])
        target = folder / NAME
        if target in new:
            raise ValueError(f"{path}: FILE gives {data['board']} twice; add one of them")
        if target in stored and data["date"] < stored[target]["date"]:
            raise ValueError(f"{path}: date: {data['date']} is older than {stored[target]['date']}, which is there")
        figures = {folder / pathlib.PurePosixPath(name).name: _figures(path, name) for name in data["benchmarks"]}
        new[target] = {**data, "benchmarks": [place.name for place in figures]}
        files |= figures
    files |= {target: json.dumps(data, indent=1) + "\n" for target, data in new.items()}
    files[root / "README.md"] = readme(root, {**stored, **new})
    checkout.write(files)
    return list(new)


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of an evidence file from a board; ValueError names all that is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    said = problems(data) or [why for why in [refusal(data)] if why]
    if said:
        raise ValueError(f"{path}: {'; '.join(said)}")
    return data


def _figures(path: pathlib.Path, name: str) -> bytes:
    try:
        content = (path.parent / name).read_bytes()
        json.loads(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: benchmarks: {name} cannot be read: {error}") from error
    return content


def board_folder(name: str) -> str:
    """The folder of a board's results, as scripts/gpu_check.sh names it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "board"


def readme(root: pathlib.Path, lanes: Mapping[pathlib.Path, dict[str, Any]] | None = None) -> str:
    """README with the table as the evidence has it; `lanes` in the place of what is stored."""
    found = support_table.lanes(root) if lanes is None else lanes
    runs = [found[path] for path in sorted(found)]
    tried = support_table.toolchains(root)
    table = support_table.table(tried, support_table.checks(root), runs, support_table.changed(root, tried))
    return support_table.written((root / "README.md").read_text(encoding="utf-8"), table)
