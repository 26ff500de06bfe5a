"""What to try next, by rules over a run's rows: each line says which figures it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench_rows.table import milliseconds
from bench_rows.ways import BOTH, CALL, GRAPH, KERNEL, OURS

# When a figure is worth a line.
FAR_FROM_CEILING = 0.5
SLOWER = 1.1
MOST = 5  # lines of one rule

_TRY = {
    ("decode", "memory"): "more splits where the batch is small, other stages, fewer reads of a key",
    ("decode", "compute"): "larger tiles of heads (`--tiles`), so that each key is used by more of them",
    ("prefill", "memory"): "larger tiles of rows",
    ("prefill", "compute"): "other tiles, and more stages",
    ("module", "memory"): "a replayed graph, and weights of fewer bytes",
    ("module", "compute"): "the part that takes the most, above",
}


def recommendations(rows: Sequence[dict], on_cpu: bool) -> list[str]:
    """Lines, those that cost the most first within each rule. on_cpu: PyTorch is what is meant to run."""
    timed = [row for row in rows if row["status"] == "timed"]
    found = [
        *_failed(rows),
        *_parts(timed),
        *_fallbacks(timed, on_cpu),
        *_slower(timed),
        *_launches(timed),
        *_combine(timed),
        *_ceiling(timed),
    ]
    return found or ["Nothing in these rows calls for anything: no row failed, and none is slower than its peers."]


def _failed(rows: Sequence[dict]) -> Iterator[str]:
    count = sum(row["status"] != "timed" for row in rows)
    if count:
        yield f"{count} of {len(rows)} rows failed: correctness before speed."


def _parts(timed: Sequence[dict]) -> Iterator[str]:
    """The dearest part of each step."""
    parts = [row for row in timed if row["op"] == "parts" and row["implementation"] == OURS]
    for case in dict.fromkeys(row["case"] for row in parts):
        own = [row for row in parts if row["case"] == case]
        most, total = max(own, key=lambda row: row["ms"]), sum(row["ms"] for row in own)
        share = f"{most['ms'] / total:.0%} of the step ({milliseconds(most['ms'])})"
        yield f"In {case}, *{most['part']}* takes {share}: begin there."


def _fallbacks(timed: Sequence[dict], on_cpu: bool) -> Iterator[str]:
    """Ops that PyTorch ran on a board that has kernels."""
    ops = dict.fromkeys(row["op"] for row in timed if row["implementation"] == OURS and row["backend"] == "reference")
    if ops and not on_cpu:
        yield f"PyTorch ran in place of a kernel in {', '.join(ops)}: `python -m ntops_mla explain` says why."


def _by_case(timed: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in timed:
        if row["op"] != "parts" and row["tile"] is None:
            cases.setdefault((row["op"], row["case"]), []).append(row)
    return cases


def _one(rows: Sequence[dict], implementation: str, timed: str) -> dict | None:
    return next((r for r in rows if r["implementation"] == implementation and r["timed"] == timed), None)


def _slower(timed: Sequence[dict]) -> Iterator[str]:
    """Cases in which another implementation's whole call is faster than ours."""
    found = []
    for (op, case), rows in _by_case(timed).items():
        ours = _one(rows, OURS, CALL)
        others = [row for row in rows if row["implementation"] != OURS and row["timed"] == CALL]
        if ours is None or not others:
            continue
        best = min(others, key=lambda row: row["ms"])
        if ours["ms"] > SLOWER * best["ms"]:
            ratio = ours["ms"] / best["ms"]
            found.append(
                (
                    ratio,
                    f"{best['implementation']} is {ratio:.2f} times as fast in {op} {case}: see what it does not do.",
                )
            )
    yield from _most(found)


def _launches(timed: Sequence[dict]) -> Iterator[str]:
    """Where a replayed graph is faster, the host is what a call waits for."""
    found = []
    for (op, case), rows in _by_case(timed).items():
        call, graph = _one(rows, OURS, CALL), _one(rows, OURS, GRAPH)
        if call and graph and call["ms"] > SLOWER * graph["ms"]:
            ratio = call["ms"] / graph["ms"]
            found.append(
                (ratio, f"{op} {case} takes {ratio:.2f} times as long as its replay: launches; record the step.")
            )
    yield from _most(found)


def _combine(timed: Sequence[dict]) -> Iterator[str]:
    """Where joining the splits costs much, there are too many of them, or the join is slow."""
    found = []
    for (_, case), rows in _by_case(timed).items():
        kernel, both = _one(rows, OURS, KERNEL), _one(rows, OURS, BOTH)
        if kernel and both and both["ms"] > SLOWER * kernel["ms"]:
            ratio = both["ms"] / kernel["ms"]
            said = f"joining makes decode {case} {ratio:.2f} times as long ({kernel['note']})"
            found.append((ratio, f"{said}: fewer splits, or a faster join."))
    yield from _most(found)


def _ceiling(timed: Sequence[dict]) -> Iterator[str]:
    """Our kernels' rows that stand farthest below what bounds them."""
    found = []
    for (op, case), rows in _by_case(timed).items():
        own = [row for row in rows if row["implementation"] == OURS and row["backend"] in ("kernel", "mixed")]
        own = [row for row in own if row["share_of_bound"] is not None]
        if not own or op not in ("decode", "prefill", "module"):
            continue
        best = max(own, key=lambda row: row["share_of_bound"])
        if best["share_of_bound"] < FAR_FROM_CEILING:
            said = f"{op} {case} reaches {best['share_of_bound']:.0%} of the {best['bound']} ceiling ({best['timed']})"
            found.append((best["ms"] * (1 - best["share_of_bound"]), f"{said}: {_TRY[op, best['bound']]}."))
    yield from _most(found)


def _most(found: list[tuple[float, str]]) -> Iterator[str]:
    found.sort(key=lambda pair: -pair[0])
    yield from (text for _, text in found[:MOST])
    if len(found) > MOST:
        yield f"and {len(found) - MOST} more cases of the same kind."
