"""PNG plots of a run: latency over context, the roofline with every row on it, speed-up bars. Needs matplotlib."""

from __future__ import annotations

import importlib
import os
import pathlib
import tempfile

from bench_rows.ways import CALL, OURS, SCHEDULED

NAMES = ("latency.png", "roofline.png", "speedup.png")


def unavailable() -> str | None:
    """Why no plot can be made, or None."""
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # not installed, or built for another numpy
        return f"matplotlib cannot be imported ({error})"
    return None


def write(data: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """The plots that the rows have points for, each whole, into `folder`, which must exist."""
    title = f"{data['board']}, {data['dtype']}, {data['date'][:10]}"
    written = []
    for name, draw in zip(NAMES, (latency, roofline, speedup)):
        figure = draw(data, title)
        if figure is None:
            continue
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
        os.close(descriptor)
        try:
            figure.savefig(temporary, format="png", dpi=120)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
        written.append(folder / name)
    return written


def _figure(width: float = 7, height: float = 5):
    # Figure itself and no pyplot: no backend, no window, nothing global.
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _timed(data: dict) -> list[dict]:
    return [row for row in data["rows"] if row["status"] == "timed"]


def latency(data: dict, title: str):
    """Median over context with the quartiles around it, a line for each implementation and batch."""
    lines: dict[str, list[dict]] = {}
    for row in _timed(data):
        if row["op"] == "decode" and "length" in row["groups"] and row["tile"] is None:
            name = f"{row['implementation']}, {row['timed']}, batch {row['params']['batch']}"
            lines.setdefault(name, []).append(row)
    if not lines:
        return None
    figure = _figure()
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms", title=f"decode: {title}"
    )
    for name, rows in lines.items():
        rows.sort(key=lambda row: row["params"]["context"])
        x = [row["params"]["context"] for row in rows]
        (line,) = axes.plot(x, [row["ms"] for row in rows], marker="o", markersize=3, label=name)
        axes.fill_between(
            x, *([row[key] for row in rows] for key in ("ms_low", "ms_high")), alpha=0.2, color=line.get_color()
        )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def roofline(data: dict, title: str):
    """FLOP per byte and TFLOP/s of every row that has both, under the ceilings of the same run."""
    points = [row for row in _timed(data) if row["flop"] and row["bytes"]]
    if not points:
        return None
    copy, matmul = data["ceilings"]["copy_tb_per_s"], data["ceilings"]["matmul_tflop_per_s"]
    figure = _figure()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=title)
    found = [row["flop"] / row["bytes"] for row in points]
    x = sorted([min(found) / 2, matmul / copy, max(max(found), matmul / copy) * 2])
    axes.plot(x, [min(copy * at, matmul) for at in x], color="black", label=f"{copy:.3g} TB/s, {matmul:.3g} TFLOP/s")
    for name in dict.fromkeys(row["implementation"] for row in points):
        own = [row for row in points if row["implementation"] == name]
        axes.scatter([r["flop"] / r["bytes"] for r in own], [r["tflop_per_s"] for r in own], s=12, label=name)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def speedup(data: dict, title: str):
    """Each other implementation's time over ours, whole call by whole call, of the cases that both ran."""
    bars = [(f"{case}\n{name}", ratio) for case, name, ratio in speedups(data["rows"])]
    if not bars:
        return None
    figure = _figure(7, 1.5 + 0.28 * len(bars))
    axes = figure.add_subplot(xlabel="times as fast as", title=f"ntops_mla: {title}")
    axes.barh([name.replace("\n", "  ") for name, _ in bars], [ratio for _, ratio in bars])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(labelsize=6)
    axes.invert_yaxis()
    return figure


def speedups(rows: list[dict]) -> list[tuple[str, str, float]]:
    """(op and case, the other implementation, its time / ours), whole calls; parts and tiles are left out."""
    ours, found = {}, []
    whole = [row for row in rows if row["status"] == "timed" and row["op"] != "parts" and row["tile"] is None]
    for row in whole:
        if row["implementation"] == OURS and row["timed"] == CALL:
            ours[row["op"], row["case"]] = row["ms"]
    for row in whole:
        own = ours.get((row["op"], row["case"]))
        if own and row["implementation"] not in (OURS, SCHEDULED) and row["timed"] == CALL:
            found.append((f"{row['op']} {row['case']}", row["implementation"], row["ms"] / own))
    return found
