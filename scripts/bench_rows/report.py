"""docs/performance.md: out of the runs' JSON, and out of a model's numbers by arithmetic. Nothing else goes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench_rows import advice, counting, plots, record
from bench_rows.table import milliseconds, number
from bench_rows.ways import BOTH, CALL, GRAPH, KERNEL, OURS, SCHEDULED
from ntops_mla.config import MLAConfig

MODELS = {"DeepSeek-V2-Lite": MLAConfig.deepseek_v2_lite(), "DeepSeek-R1": MLAConfig.deepseek_r1()}
CONTEXTS = (1024, 4096, 16384, 65536, 131072)

INTRO = """# Performance

Made by `python scripts/performance_report.py` of the files that `python scripts/bench.py` left in
`benchmarks/results/`: nothing here is typed by hand, and a board without results has no row.
`bash scripts/gpu_check.sh bench` makes a board's.

How to read it. Every path was compared with float64 in the same run before it was timed; a path that differs has an
error in the place of a time. A time is the median, with the quartiles behind it. Ratios are of one run; times of two
machines, or of a shared one on two days, say little. FLOP and bytes are counted by FlashMLA's rules
(`scripts/bench_rows/counting.py`), and a share is that of what a copy or a matrix product of PyTorch's reached in the
same run, whichever the row stands closer to. *kernel*: the split kernel alone, into buffers that are there; *kernel +
combine*: both; *whole call*: the public function, with dispatch and results allocated; *graph replay*: that call,
recorded. On an accelerator its cache is flushed before each."""

NO_BOARD = "No accelerator has been measured: `benchmarks/results/` holds no run of one."
NO_CPU = "No run on a CPU lies in `benchmarks/results/`."


class Run(NamedTuple):
    """One file: its content, the plots beside it as (title, path from the report), and its name."""

    data: dict
    plots: tuple[tuple[str, str], ...] = ()
    name: str = ""

    def rows(self, op: str | None = None, group: str | None = None) -> list[dict]:
        """Timed rows without a tile of their own, of an op and a group."""
        return [
            row
            for row in self.data["rows"]
            if row["status"] == "timed"
            and row["tile"] is None
            and (op is None or row["op"] == op)
            and (group is None or group in row["groups"])
        ]


def page(runs: Sequence[Run]) -> str:
    """The whole report."""
    boards = [run for run in runs if run.data["platform"] != "cpu"]
    cpus = [run for run in runs if run.data["platform"] == "cpu"]
    parts = [INTRO]
    if runs:
        parts += ["## Runs", _runs(runs)]
    parts += ["## MLA against MHA", mla_against_mha()]
    parts += ["## Accelerators", *([] if boards else [NO_BOARD])]
    for run in boards:
        parts += _board(run)
    parts += ["## CPU", *([] if cpus else [NO_CPU])]
    if cpus:
        parts.append(
            "What runs on a CPU is PyTorch's form of each op and no kernel: it says nothing of an accelerator."
        )
    for run in cpus:
        parts += _board(run)
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; a bar within a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _runs(runs: Sequence[Run]) -> str:
    head = (
        "file",
        "board",
        "date",
        "commit",
        "driver",
        "versions",
        "dtype, size",
        "copy, TB/s",
        "product, TFLOP/s",
        "rows",
    )
    rows = []
    for run in runs:
        data, found = run.data, run.data["ceilings"]
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
        failed = sum(row["status"] != "timed" for row in data["rows"])
        count = f"{len(data['rows'])}" + (f", {failed} failed" if failed else "")
        rows.append(
            (
                run.name, data["board"], data["date"][:10], data["commit"], data.get("driver") or "", versions,
                f"{data['dtype']}, {data['size']}", number(found["copy_tb_per_s"]), number(found["matmul_tflop_per_s"]),
                count,
            )
        )  # fmt: skip
    return markdown(head, rows)


def mla_against_mha() -> str:
    """By arithmetic: the cache, a decode step, and where one form gives way to the other."""
    cache, pair, step, cross = [], [], [], []
    for name, cfg in MODELS.items():
        latent, heads = counting.cache_per_token(cfg)
        cache.append((name, cfg.num_heads, latent, heads, f"{heads / latent:.1f}"))
        absorbed, expanded = 2 * (cfg.latent_dim + cfg.kv_lora_rank), 2 * (cfg.qk_head_dim + cfg.v_head_dim)
        pair.append((name, absorbed, expanded, 2 * cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)))
        for context in CONTEXTS:
            ours = counting.decode([context], 1, cfg.num_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim)
            theirs = counting.prefill([(1, context)], cfg.num_heads, cfg.qk_head_dim, cfg.v_head_dim)
            step.append(
                (
                    name, context, _si(ours.bytes), _si(theirs.bytes), _si(ours.flop), _si(theirs.flop),
                    number(ours.flop / ours.bytes), number(theirs.flop / theirs.bytes),
                )
            )  # fmt: skip
        cross.append((name, *(counting.crossover(cfg, past) for past in CONTEXTS)))
    return "\n\n".join(
        [
            "By arithmetic from the models' numbers, two bytes an element, one layer. MLA caches one latent for all "
            "heads; MHA of the same heads would cache their keys and values.",
            markdown(("model", "heads", "MLA, bytes a token", "MHA, bytes a token", "times as much"), cache),
            "FLOP of attention for each head and each pair of a query and a key, and what it costs a head to expand a "
            "past token:",
            markdown(("model", "absorbed", "expanded", "expanding a token"), pair),
            "One new token of one request, attention alone: MLA absorbed over its latents, MHA over its own keys and "
            "values.",
            markdown(
                (
                    "model",
                    "context",
                    "MLA bytes",
                    "MHA bytes",
                    "MLA FLOP",
                    "MHA FLOP",
                    "MLA FLOP/byte",
                    "MHA FLOP/byte",
                ),
                step,
            ),
            "The least number of new tokens for which the library expands the past instead of absorbing the queries, "
            "with both at the same rate (`ntops_mla/plan.py`), on a past of:",
            markdown(("model", *CONTEXTS), cross),
        ]
    )


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _board(run: Run) -> list[str]:
    """A run's part: the sections that it has rows for."""
    data = run.data
    parts = [
        f"### {data['board']}: {run.name}",
        f"Times: {data['clock']}. Seed {data['seed']}, up to {data['runs']} runs each.",
    ]
    if said := record.busy(data):
        parts.append(f"**Not to be relied on**: {said}.")
    parts += [f"![{title}]({path})" for title, path in run.plots]
    for title, section in SECTIONS.items():
        text = section(run)
        if text:
            parts += [f"#### {title}", text]
    return parts


def _ms(row: dict) -> str:
    return f"{milliseconds(row['ms'])} ({milliseconds(row['ms_low'])} to {milliseconds(row['ms_high'])})"


def _name(row: dict) -> str:
    return row["implementation"] + (f" ({row['backend']})" if row["backend"] else "")


def _share(row: dict) -> str:
    return "" if row["bound"] is None else f"{row['share_of_bound']:.0%} {row['bound']}"


def _figures(rows: Iterable[dict]) -> str:
    head = ("case", "implementation", "timed", "time", "TB/s", "TFLOP/s", "share of the ceiling")
    return markdown(
        head,
        (
            (r["case"], _name(r), r["timed"], _ms(r), number(r["tb_per_s"]), number(r["tflop_per_s"]), _share(r))
            for r in rows
        ),
    )


def step(run: Run) -> str:
    """The parts of a decode step, each by itself, and its share of their sum; the step's products beside them."""
    rows = run.rows("parts")
    if not rows:
        return ""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        total = sum(row["ms"] for row in own if row["implementation"] == OURS)
        lines += [
            (case, row["part"], _ms(row), f"{row['ms'] / total:.0%}" if row["implementation"] == OURS else "")
            for row in own
        ]
        lines += [
            (case, "all parts over its products", f"{total / row['ms']:.2f}", "")
            for row in own
            if row["implementation"] != OURS
        ]
    head = "Each part timed by itself; the share is of their sum. Its products alone: each weight's, as PyTorch has it."
    return f"{head}\n\n" + markdown(("case", "part", "time", "share"), lines)


def lengths(run: Run) -> str:
    """Attention and layers over the length of a context."""
    found = [*run.rows("decode", "length"), *run.rows("prefill", "length"), *run.rows("module", "layer")]
    return _figures({**row, "case": f"{row['op']} {row['case']}"} for row in found) if found else ""


def group(op: str, name: str) -> Callable[[Run], str]:
    """A section of the rows of one op's group."""

    def section(run: Run) -> str:
        found = run.rows(op, name)
        return _figures(found) if found else ""

    return section


def small(run: Run) -> str:
    """What is no attention."""
    found = [row for op in ("combine", "append", "norm", "rope", "query") for row in run.rows(op)]
    return _figures({**row, "case": f"{row['op']} {row['case']}"} for row in found) if found else ""


def tiles(run: Run) -> str:
    """The sweep over tiles, the fastest first, within each case."""
    found = [row for row in run.data["rows"] if row["status"] == "timed" and row["tile"] is not None]
    if not found:
        return ""
    found.sort(key=lambda row: (row["case"], row["ms"]))
    best = {}
    for row in found:
        best.setdefault(row["case"], row["ms"])
    lines = [
        (r["case"], ", ".join(f"{k} {v}" for k, v in r["tile"].items()), _ms(r), f"{r['ms'] / best[r['case']]:.2f}")
        for r in found
    ]
    return markdown(("case", "tile", "time", "times the best"), lines)


def memory(run: Run) -> str:
    """What a call allocates at most."""
    found = [row for row in run.rows() if row["peak_bytes"] is not None]
    if not found:
        return ""
    lines = [(r["op"], r["case"], _name(r), r["timed"], _si(r["peak_bytes"])) for r in found]
    return "Bytes beyond what was there before the call.\n\n" + markdown(
        ("op", "case", "implementation", "timed", "bytes"), lines
    )


def errors(run: Run) -> str:
    """Distance from float64 over the length of a context."""
    found = [*run.rows("decode", "length"), *run.rows("prefill", "length"), *run.rows("module", "layer")]
    found = [row for row in found if row["max_error"] is not None and row["timed"] == CALL]
    if not found:
        return ""
    lines = [
        (r["op"], r["case"], _name(r), f"{r['max_error']:.2g}", f"{r['cos_diff']:.2g}", r["checked"]) for r in found
    ]
    return markdown(("op", "case", "implementation", "largest error", "cos_diff", "compared"), lines)


def fusions(run: Run) -> str:
    """What belongs together, beside the same apart: ratios of one case's rows."""
    lines = []
    for row in run.rows("append"):
        if row["implementation"] in ("queries apart", "unfused"):
            lines.append(_ratio(run, row, OURS, CALL, row["note"]))
    for row in run.rows("query"):
        if row["implementation"] == "norm folded":
            lines.append(_ratio(run, row, OURS, row["timed"], row["note"]))
    for row in run.rows():
        if row["implementation"] == OURS and row["timed"] == CALL and row["op"] != "parts":
            lines.append(_ratio(run, row, OURS, GRAPH, "the call's launches one by one"))
        if row["op"] == "module" and row["implementation"] == "torch_loop":
            lines.append(_ratio(run, row, OURS, CALL, "request after request, in plain PyTorch"))
    for row in run.rows("decode"):
        if row["timed"] == BOTH:
            lines.append(_ratio(run, row, OURS, KERNEL, "splitting: the join of the splits"))
        if row["implementation"] == OURS and row["timed"] == CALL:
            lines.append(_ratio(run, row, SCHEDULED, CALL, "each request in the same number of splits"))
    lines = [line for line in lines if line is not None]
    head = ("op", "case", "apart", "together", "apart / together")
    return markdown(head, lines) if lines else ""


def _ratio(run: Run, apart: dict, implementation: str, timed: str, what: str | None):
    """`apart` over the row of the same case that is `timed` so; None where there is none."""
    for row in run.rows(apart["op"]):
        if row["case"] == apart["case"] and row["implementation"] == implementation and row["timed"] == timed:
            name = f"{implementation}, {timed}"
            return apart["op"], apart["case"], what or apart["implementation"], name, f"{apart['ms'] / row['ms']:.2f}"
    return None


def peers(run: Run) -> str:
    """How others stand to this library, whole calls of one run."""
    lines = [(case, name, f"{ratio:.2f}") for case, name, ratio in plots.speedups(run.data["rows"])]
    text = []
    if lines:
        text.append(markdown(("case", "implementation", "its time / that of ntops_mla"), lines))
    absent = {}
    for one in run.data["left_out"]:
        if one["implementation"] not in (OURS, SCHEDULED):
            absent.setdefault((one["implementation"], one["reason"]), set()).add(one["op"])
    if absent:
        found = [(name, ", ".join(sorted(of)), reason) for (name, reason), of in absent.items()]
        text += ["Not there:", markdown(("implementation", "ops", "why"), found)]
    return "\n\n".join(text)


def failures(run: Run) -> str:
    """Rows without a time."""
    found = [row for row in run.data["rows"] if row["status"] != "timed"]
    lines = [(r["op"], r["case"], _name(r), r["timed"], r["status"], r["reason"]) for r in found]
    return markdown(("op", "case", "implementation", "timed", "what", "reason"), lines) if lines else ""


def next_steps(run: Run) -> str:
    """Recommendations, each with the figures that it rests on."""
    found = advice.recommendations(run.data["rows"], run.data["platform"] == "cpu")
    return "\n".join(f"- {text}" for text in found)


SECTIONS: dict[str, Callable[[Run], str]] = {
    "Failed": failures,
    "Where time goes in a step": step,
    "FlashMLA's shapes": group("decode", "flashmla"),
    "The two scenarios, whole layers": group("module", "scenario"),
    "The scenario's prefill, attention": group("prefill", "scenario"),
    "Over the fp8 cache": group("decode_fp8", "fp8"),
    "By indices: decode": group("sparse", "sparse"),
    "By indices: prefill": group("sparse_prefill", "sparse"),
    "Over the length": lengths,
    "Over the batch": group("decode", "batch"),
    "Over the heads": group("decode", "heads"),
    "Over tiles": tiles,
    "Smaller ops": small,
    "Peak memory": memory,
    "Error over the length": errors,
    "What each fusion brought": fusions,
    "Beside others": peers,
    "What remains, and what to try next": next_steps,
}
