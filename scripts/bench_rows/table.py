"""Rows as text."""

from __future__ import annotations

from collections.abc import Iterable

from ntops_mla.cli.table import table

HEAD = ("case", "implementation", "timed", "median", "quartiles", "TB/s", "TFLOP/s", "of the ceiling", "result")


def rows_text(rows: Iterable[dict]) -> str:
    """A table of one op's rows."""
    return table(HEAD, [_cells(row) for row in rows])


def _cells(row: dict) -> tuple[str, ...]:
    name = row["implementation"] if row["backend"] is None else f"{row['implementation']} ({row['backend']})"
    timed = row["part"] or row["timed"]
    if row["tile"]:
        timed += " " + "x".join(str(value) for value in row["tile"].values())
    if row["ms"] is None:
        return (row["case"], name, timed, "", "", "", "", "", f"{row['status']}: {row['reason']}")
    share = "" if row["bound"] is None else f"{row['share_of_bound']:.0%} ({row['bound']})"
    result = "matches float64" if row["max_error"] is None else f"max error {row['max_error']:.2g}"
    quartiles = f"{milliseconds(row['ms_low'])}..{milliseconds(row['ms_high'])}"
    return (
        row["case"], name, timed, milliseconds(row["ms"]), quartiles,
        number(row["tb_per_s"]), number(row["tflop_per_s"]), share, f"{result}, {row['checked']}",
    )  # fmt: skip


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1e3:.3g} us"


def number(value: float | None) -> str:
    """Three digits, empty for none."""
    return "" if value is None else f"{value:.3g}"


def left_out_text(left_out: Iterable[dict]) -> str:
    """A line for each reason, with how many cases it was said of."""
    counted: dict[tuple[str, str, str, str], int] = {}
    for one in left_out:
        key = (one["op"], one["implementation"], one["timed"], one["reason"])
        counted[key] = counted.get(key, 0) + 1
    lines = []
    for (op, implementation, timed, reason), count in counted.items():
        many = f" ({count} cases)" if count > 1 else ""
        lines.append(f"  {op}: {implementation}, {timed}: {reason}{many}")
    return "\n".join(lines)
