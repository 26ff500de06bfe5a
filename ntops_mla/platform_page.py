"""The data of a platform's file as Markdown: a part of its page, which scripts/platform_pages.py writes.

It stands between two marks; what is around them is written by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ntops_mla.platform import CILane, Fact, Gate, Limits, Markers, Platform, Tile

BEGIN, END = "<!-- platform data: begin -->", "<!-- platform data: end -->"


def with_data(page: str, platform: Platform) -> str:
    """`page` with the data between its marks as the platform's file has it now."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page of {platform.name} must hold {BEGIN!r} and then {END!r}, each once")
    return f"{page[: page.index(BEGIN)]}{BEGIN}\n{data(platform)}\n{page[page.index(END) :]}"


def skeleton(platform: Platform) -> str:
    """A page for a platform that has none: what is the same everywhere, and the data."""
    page = f"""\
# {platform.title}

TODO: what the boards are, and the traps of this vendor's torch and Triton.

## Install

On the vendor's image, whose torch and Triton are used as they are: `bash scripts/bootstrap.sh`, as
[the overview](README.md) says.

## What is proven

Nothing has been run on a board. README's table says what was checked without one, and [the overview](README.md) how to
send evidence.

## What the platform's file says

{BEGIN}
{END}
"""
    return with_data(page, platform)


def data(platform: Platform) -> str:
    """All that the platform's file says, each number with its source."""
    said = (f.name for f in dataclasses.fields(Platform) if isinstance(getattr(platform, f.name), Fact))
    parts = [
        f"Made of `platforms/{platform.name}.py` by `scripts/platform_pages.py`: change that file, not this part.",
        _section("Recognised by", _markers(platform)),
        _section("Limits", _limits(platform.limits)),
        _section("Gates", _gates(platform.gates)),
        _section("Gates in Triton's interpreter", _gates(platform.interpreted_gates or {})),
        _section("Tiles", _tiles(platform.tiles)),
        _section("Launch options", _table_of(platform.launch_options)),
        _section("Known to be bad there", _facts(platform.known_bad)),
        _section("Numbers of the whole platform", _numbers(platform, said)),
        _section("Notes", _facts(platform.notes)),
        _section("CI lane", _lane(platform.ci)),
    ]
    return "\n\n".join(part for part in parts if part)


def _section(title: str, body: str) -> str:
    return f"### {title}\n\n{body}" if body else ""


def _markers(platform: Platform) -> str:
    markers: Markers = platform.markers
    rows = [("names on the command line", (platform.name, *platform.aliases))]
    rows += [(_words(f.name), getattr(markers, f.name)) for f in dataclasses.fields(Markers)]
    rows += [("import that brings the device type", platform.extra_import)]
    return table(("mark", "value"), [row for row in rows if row[1] not in (None, (), False)])


def _limits(limits: Sequence[Limits]) -> str:
    """A row an architecture; below it the sources, each said once."""
    names = [f.name for f in dataclasses.fields(Limits) if f.name not in ("arch", "min_capability", "notes")]
    names = [name for name in names if any(getattr(one, name) not in (None, ()) for one in limits)]
    rows, sources = [], {}
    for one in limits:
        capability = "any" if one.min_capability is None else ".".join(map(str, one.min_capability))
        values = {name: getattr(one, name) for name in names}
        rows.append([one.arch, capability, *(_value(value) for value in values.values())])
        for name, value in values.items():
            if isinstance(value, Fact):
                sources.setdefault((name, value.source), []).append(one.arch)
    lines = [
        f"- {_words(name)}{'' if len(archs) == len(limits) else f' ({_cell(archs)})'}: {_cell(source)}"
        for (name, source), archs in sources.items()
    ]
    lines += [f"- {one.arch}: {_cell(note.value)} ({note.source})" for one in limits for note in one.notes]
    head = ["architecture", "capability from", *map(_words, names)]
    return "\n\n".join(filter(None, (table(head, rows), "\n".join(lines))))


def _value(value: object) -> object:
    if isinstance(value, Fact):
        return "?" if value.value is None else value.value
    return value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _gates(gates: Mapping[str, Mapping[str, Gate]]) -> str:
    others = "all others" if len(gates) > 1 else "all"
    rows = [
        (others if op == "*" else f"`{op}`", _dtype(dtype, row), gate.mode, gate.reason)
        for op, row in sorted(gates.items(), key=lambda item: item[0] == "*")
        for dtype, gate in row.items()
    ]
    return table(("op", "dtype", "gate", "reason"), rows)


def _dtype(dtype: str, row: Mapping[str, Gate]) -> str:
    if dtype != "*":
        return dtype
    return "all others" if len(row) > 1 else "all"


def _tiles(tiles: Sequence[Tile]) -> str:
    """In the file's order, since the first that fits is taken. A source that all have is said once."""
    sources = list(dict.fromkeys(tile.source for tile in tiles))
    columns = {
        "kernel": [f"`{tile.kernel}`" for tile in tiles],
        "for": [_where(tile) for tile in tiles],
        "blocks": [_pairs(tile.blocks.items()) for tile in tiles],
        "warps": [tile.num_warps for tile in tiles],
        "stages": [tile.num_stages for tile in tiles],
        "options": [_pairs(tile.options) for tile in tiles],
        "source": [tile.source for tile in tiles] if len(sources) > 1 else [],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    said = f"The first one that fits is taken.{f' All: {_cell(sources[0])}.' if len(sources) == 1 else ''}"
    return f"{said}\n\n{table(list(columns), zip(*columns.values()))}" if tiles else ""


def _where(tile: Tile) -> str:
    parts = [
        ", ".join(tile.arch),
        ", ".join(tile.dtypes),
        _versions(tile.triton),
        *(_range(name, *ends) for name, ends in tile.when.items()),
    ]
    return "; ".join(filter(None, parts)) or "all"


def _versions(versions: tuple[str | None, str | None]) -> str:
    since, before = versions
    parts = [f"from {since}" if since else "", f"before {before}" if before else ""]
    return " ".join(filter(None, ("Triton" if any(parts) else "", *parts)))


def _range(name: str, low: int, high: int | None) -> str:
    if low == high:
        return f"{name} {low}"
    return f"{name} from {low}" if high is None else f"{name} {low} to {high}"


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _table_of(values: Sequence[Any]) -> str:
    """A column a field, without those that are empty everywhere."""
    if not values:
        return ""
    names = [f.name for f in dataclasses.fields(values[0])]
    names = [name for name in names if any(getattr(value, name) not in (None, (), (None, None)) for value in values)]
    rows = [
        [_versions(value.triton) if name == "triton" else getattr(value, name) for name in names] for value in values
    ]
    return table([_words(name) for name in names], rows)


def _facts(facts: Iterable[Fact]) -> str:
    return "\n".join(f"- {_cell(fact.value)} ({fact.source})" for fact in facts)


def _numbers(owner: Any, names: Iterable[str]) -> str:
    facts = [(name, getattr(owner, name)) for name in names]
    return table(("what", "value", "source"), [(_words(name), _value(fact), fact.source) for name, fact in facts])


def _lane(lane: CILane | None) -> str:
    if lane is None:
        return ""
    rows = [(_words(f.name), getattr(lane, f.name)) for f in dataclasses.fields(CILane) if f.name != "notes"]
    rows = [(name, value) for name, value in rows if value not in (None, ())]
    return "\n\n".join(filter(None, (table(("field", "value"), rows), _facts(lane.notes))))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [_row(row) for row in rows]
    return "\n".join([_row(head), "|" + "---|" * len(head), *lines]) if lines else ""


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (tuple, list)):
        return ", ".join("any" if part is None else str(part) for part in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split()).replace("|", "\\|")
