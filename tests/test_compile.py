"""Proof without a device: every platform's tiles, compiled for its targets or their stand-ins, and read.

Each platform is compiled in a process of its own, because the driver of a machine without a device is installed there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ntops_mla.cross_compile import TARGETS
from ntops_mla.platform import all_platforms, get_platform, version_pair

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
# A new platform may begin without tiles; with any, it has them for all that the models need.
PLATFORMS = [name for name, platform in all_platforms().items() if platform.limits and platform.tiles]


def python(*args, **environment):
    """A fresh interpreter in the repository's root."""
    cleaned = {
        key: value for key, value in os.environ.items() if key not in ("NTOPS_MLA_INTERPRET", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *args],
        cwd=ROOT,
        env={**cleaned, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """Platform -> the rows of `python -m ntops_mla compile --platform ...`, compiled once."""
    known = {}

    def rows(name):
        if name not in known:
            path = tmp_path_factory.mktemp("compiled") / f"{name}.json"
            done = python("-m", "ntops_mla", "compile", "--platform", name, "--json", str(path))
            assert path.exists(), done.stderr[-3000:]
            known[name] = done, json.loads(path.read_text())["rows"]
        return known[name]

    return rows


@pytest.mark.parametrize("name", PLATFORMS)
def test_no_tile_spills_or_passes_a_limit(rows_of, name):
    done, rows = rows_of(name)
    assert [
        f"{row['kernel']} {row['target']} {row['tile']}: {row['problems']}" for row in rows if row["problems"]
    ] == []
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("name", PLATFORMS)
def test_every_kernel_is_compiled_for_every_architecture(rows_of, name):
    _, rows = rows_of(name)
    platform = get_platform(name)
    compiled = {limits.arch for limits in platform.limits if limits.stand_ins or _public(limits)}
    assert compiled
    for arch in compiled:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels >= {
            "rms_norm",
            "rope",
            "latent_append",
            "mla_decode",
            "mla_decode_fp8",
            "mla_combine",
            "mla_prefill",
            "mla_sparse",
            "mla_sparse_fp8",
        }, arch


@pytest.mark.parametrize("kernel", ["mla_decode", "mla_decode_fp8"])
def test_every_form_of_decode_is_a_row_of_its_own(rows_of, kernel):
    """Constants of a call are compiled in: one form may spill where the others do not."""
    done, rows = rows_of("nvidia")
    arch = "sm_90"
    forms = {(r["split"], r["causal"], r["planned"]) for r in rows if r["kernel"] == kernel and r["arch"] == arch}
    of_results, parts, planned = (False, False), (True, False), (True, True)
    assert forms >= {(split, causal, plan) for split, plan in (of_results, parts, planned) for causal in (False, True)}
    assert "bfloat16 split causal planned" in done.stdout


def _public(limits):
    return limits.triton_target is not None and str(limits.triton_target.value) in TARGETS


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_stand_in_is_called_one(rows_of, name):
    done, rows = rows_of(name)
    own = {
        limits.arch: str(limits.triton_target and limits.triton_target.value) for limits in get_platform(name).limits
    }
    for row in rows:
        assert row["stand_in"] == (row["target"] != own[row["arch"]])
    assert ("*" in done.stdout.split("kernels, ")[0]) == any(row["stand_in"] for row in rows)


def _decode(rows, arch, rows_of_a_tile):
    return [
        row
        for row in rows
        if row["kernel"] == "mla_decode"
        and row["arch"] == arch
        and row["tile"]["latent"] == 512
        and row["tile"]["block_h"] == rows_of_a_tile
    ]


def test_hopper_reads_each_key_once_by_async_copies(rows_of):
    """cp.async moves 16 bytes a thread: the copies of one tile of 576 columns, for each stage, and no more."""
    found = _decode(rows_of("nvidia")[1], "sm_90", 64) or _decode(rows_of("nvidia")[1], "sm_90", 32)
    assert found
    for row in found:
        tile = row["tile"]
        copies = tile["block_n"] * 576 * 2 // (16 * 32 * tile["num_warps"])
        assert row["async_copies"] == tile["num_stages"] * copies


def test_hopper_computes_128_heads_by_async_wgmma(rows_of):
    _, rows = rows_of("nvidia")
    if version_pair(rows[0]["triton"]) >= (3, 7):
        pytest.skip("this Triton spills in every tile of 64 rows: the platform's file takes 32, which have no wgmma")
    found = _decode(rows, "sm_90", 64)
    assert found and all(row["asynchronous"] == row["products"] > 0 for row in found)


def test_hopper_runs_two_programs_of_16_heads_on_a_processor(rows_of):
    found = _decode(rows_of("nvidia")[1], "sm_90", 16)
    assert found and all(row["programs"] >= 2 for row in found)


def test_metax_stays_within_its_shared_memory_and_warps(rows_of):
    for row in rows_of("metax")[1]:
        assert row["shared_bytes"] <= 65536 and row["tile"]["num_warps"] <= 8


def test_keep_writes_source_and_assembly(tmp_path):
    kept = tmp_path / "kept"
    done = python("-m", "ntops_mla", "compile", "--platform", "metax", "--op", "rope", "--keep", str(kept))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.suffix for path in kept.iterdir()} == {".py", ".ttgir", ".amdgcn"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--op", "softmax"), "argument --op: no op 'softmax'"),
        (("--json", "/nowhere/at/all.json"), "argument --json: there is no folder /nowhere/at"),
        (("--platform", "abacus"), "unknown platform 'abacus'"),
    ],
)
def test_bad_arguments_are_one_line(args, said):
    done = python("-m", "ntops_mla", "compile", *args)
    assert done.returncode == 2 and said in done.stderr


def test_an_interpreting_process_does_not_compile():
    done = python("-m", "ntops_mla", "compile", NTOPS_MLA_INTERPRET="1")
    assert done.returncode == 2 and "NTOPS_MLA_INTERPRET=1" in done.stderr


VARIANTS = """
import itertools, torch
from ntops_mla import interpreter, kernel, ops
from ntops_mla.board import Board
from ntops_mla.platform import get_platform
interpreter.install_driver()
platform = get_platform("nvidia")
board = Board(platform, platform.limits_for((9, 0)), None, 132)
op = ops.get("mla_decode")
launches = []
for batch, pages, width in itertools.product((1, 16, 33), (1, 48, 1000), (1, 32)):
    cache = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device="meta")
    with kernel.capture() as caught:
        op.spec.kernel(
            board,
            torch.empty(batch, 1, 16, 512, dtype=torch.bfloat16, device="meta"),
            torch.empty(batch, 1, 16, 192, dtype=torch.bfloat16, device="meta")[..., 128:],
            cache[..., :512], cache[..., 512:],
            torch.empty(batch, width, dtype=torch.int32, device="meta"),
            torch.empty(batch, dtype=torch.int32, device="meta"),
            0.1, True, None, None,
        )
    launches += [launch for launch in caught if launch[0].name == "mla_decode"]
variants = set()
for made, args in launches:
    _, arguments, _ = made.record(*args)
    form = []
    for parameter, value in zip(made.function.params, arguments):
        if parameter.is_constexpr:
            form.append(value)
        elif isinstance(value, torch.Tensor):
            form.append(value.dtype)
        elif isinstance(value, float):
            form.append("float")
        elif parameter.do_not_specialize:
            form.append("i32" if value < 2**31 else "i64")
        else:
            form.append((value == 1, value % 16 == 0, value < 2**31))
    variants.add((id(made), tuple(form)))
print(len(launches), len(variants))
"""


def test_new_sizes_do_not_compile_anew():
    """18 combinations of batch, pages and table width: at most 3 variants of mla_decode."""
    done = python("-c", VARIANTS)
    assert done.returncode == 0, done.stderr[-3000:]
    launches, variants = map(int, done.stdout.split())
    assert launches == 18 and 1 <= variants <= 3


@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None, reason="no backend for NVIDIA")
def test_the_benchmark_of_launches_runs(tmp_path):
    """It calls what the kernels were made of, past the ops."""
    path = tmp_path / "launches.json"
    done = python("benchmarks/launch_overhead.py", "--rounds", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert figures["cached"] > 0 and figures["generated"] > 0
