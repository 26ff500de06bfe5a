"""`python -m ntops_mla`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ntops_mla import platform as platforms
from ntops_mla.__main__ import main
from ntops_mla.platform import all_platforms
from tests.fakes.boards import Machine

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "rms_norm",
    "rope",
    "latent_append",
    "mla_decode",
    "mla_decode_fp8",
    "mla_prefill",
    "mla_sparse",
    "mla_sparse_fp8",
)


@pytest.fixture
def machine(monkeypatch):
    """A machine without an accelerator, to which a test adds one."""
    with Machine(monkeypatch) as machine:
        yield machine


def run(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_cli_platforms(machine, capsys):
    machine.iluvatar().broken(RuntimeError("driver mismatch"))
    rows = {row["name"]: row for row in json.loads(run(capsys, "platforms", "--json"))}
    assert list(rows) == list(all_platforms())
    assert rows["iluvatar"]["detected"] and not rows["iluvatar"]["works"]
    assert "driver mismatch" in rows["iluvatar"]["reason"]
    assert not rows["nvidia"]["detected"] and "iluvatar" in rows["nvidia"]["reason"]
    assert rows["cpu"]["works"]
    shared = rows["metax"]["limits"][0]["shared_memory"]
    assert shared["value"] == 65536 and shared["source"]
    text = run(capsys, "platforms")
    assert "does not work (cuda:0)" in text and "mthreads" in text and "65536" in text


def test_cli_env(machine, capsys, monkeypatch):
    machine.metax()
    monkeypatch.delenv("NTOPS_MLA_TEST_SEED", raising=False)
    monkeypatch.setenv("NTOPS_MLA_STRICT", "1")
    data = json.loads(run(capsys, "env", "--json"))
    assert data["platform"]["name"] == "metax"
    assert data["device"]["name"] == "MetaX C550"
    assert data["device"]["limits"]["max_warps"]["value"] == 8
    assert data["torch"]["cuda"] == "11.6" and data["torch"]["maca"] == "2.31.0.6"
    assert data["settings"] == {"NTOPS_MLA_STRICT": "1"}
    assert {gate["mode"] for gate in data["gates"]} == {"native", "reference"}
    text = run(capsys, "env")
    for part in ("MetaX C550", torch.__version__, sys.version.split()[0], "NTOPS_MLA_STRICT=1", "float64"):
        assert part in text


def test_cli_env_tells_the_drivers_version_and_what_was_found_broken(machine, capsys, monkeypatch, tmp_path):
    machine.metax()
    (tmp_path / "mx-smi").write_text("#!/bin/sh\necho '| Kernel Mode Driver Version: 2.14.6   | BIOS 1.2 |'\n")
    (tmp_path / "mx-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gates = tmp_path / "gates.json"
    row = {"op": "rope", "dtype": "float16", "works": False, "reason": "it hung"}
    said = {"platform": "metax", "device": "MetaX C550", "triton": "3.0.0", "date": "2026-01-01", "kernels": [row]}
    gates.write_text(json.dumps(said))
    monkeypatch.setenv("NTOPS_MLA_GATES", str(gates))
    data = json.loads(run(capsys, "env", "--json"))
    assert data["device"]["driver"] == "2.14.6"
    first = data["gates"][0]
    assert (first["op"], first["dtype"], first["mode"]) == ("rope", "float16", "reference")
    assert "it hung" in first["reason"]
    gates.write_text("{}")
    data = json.loads(run(capsys, "env", "--json"))
    assert data["gates"][0]["mode"] == "error" and "'platform' is missing" in data["gates"][0]["reason"]


def test_cli_env_comes_out_with_a_wrong_setting(machine, capsys, monkeypatch):
    machine.nvidia()
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "nvidla")
    data = json.loads(run(capsys, "env", "--json"))
    assert data["platform"]["name"] is None
    assert "nvidla" in data["platform"]["reason"]
    assert "nvidla" in run(capsys, "env")


def test_cli_env_states_the_override_without_a_device(machine, capsys, monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "metax")
    data = json.loads(run(capsys, "env", "--json"))
    assert data["platform"]["name"] == "metax" and "NTOPS_MLA_PLATFORM=metax" in data["platform"]["reason"]
    assert data["device"]["device"] == "cpu"


def test_cli_env_comes_out_with_a_broken_platform_file(capsys, monkeypatch):
    def broken():
        raise RuntimeError("platform file toy.py is broken")

    monkeypatch.setattr(platforms, "_found", None)
    monkeypatch.setattr(platforms, "_discover", broken)
    data = json.loads(run(capsys, "env", "--json"))
    assert data["platform"] == {"name": None, "reason": "RuntimeError: platform file toy.py is broken"}
    assert "toy.py is broken" in run(capsys, "env")


def test_cli_ops(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "ops", "--json"))}
    assert set(OPS) <= set(rows)
    assert "softmax_scale" in rows["mla_decode"]["signature"]
    assert rows["mla_decode"]["backends"]["cpu"] == "reference"
    assert set(rows["mla_decode"]["backends"]) == set(all_platforms())
    text = run(capsys, "ops")
    assert all(op in text for op in OPS)


def test_cli_explain(machine, capsys):
    (row,) = json.loads(run(capsys, "explain", "mla_decode", "--platform", "tianshu", "--dtype", "float32", "--json"))
    assert (row["op"], row["platform"], row["backend"]) == ("mla_decode", "iluvatar", "reference")
    assert "float32 products" in row["reason"]
    rows = json.loads(run(capsys, "explain", "--device", "cpu", "--heads", "4", "--page-size", "32", "--json"))
    assert [row["op"] for row in rows if row["platform"] == "cpu"] == list(dict.fromkeys(row["op"] for row in rows))
    assert "PyTorch is the implementation on a CPU" in run(capsys, "explain", "rope")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["magic"], "invalid choice"),
        (["explain", "--platform", "tpu"], "unknown platform 'tpu'"),
        (["explain", "mla_encode"], "no op 'mla_encode'"),
        (["explain", "--dtype", "bfloat17"], "no floating-point dtype 'bfloat17'"),
        (["explain", "--dtype", "int32"], "no floating-point dtype 'int32'"),
        (["explain", "--device", "abacus"], "torch knows no device 'abacus'"),
        (["explain", "--heads", "0"], "a number above zero"),
        (["explain", "--platform", "moore", "--device", "cpu"], "not allowed with"),
    ],
)
def test_cli_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "mla_decode", "--platform", "nvidia", "--dtype", "float8_e4m3fn"], "got torch.float8_e4m3fn"),
        (["explain", "mla_encode"], "no op 'mla_encode'"),
    ],
)
def test_cli_says_it_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("python -m ntops_mla explain: error: ")


def test_cli_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "ntops_mla", "platforms", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert {row["name"] for row in json.loads(done.stdout)} == set(all_platforms())
