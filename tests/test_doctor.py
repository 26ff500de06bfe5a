"""`python -m ntops_mla doctor`: what it says of a machine, and that a child's words are understood."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ntops_mla import child, doctor, findings, ops
from ntops_mla.__main__ import main
from ntops_mla.ops import _fp8
from tests.test_ops import WRITING, cache_of

ROOT = Path(__file__).resolve().parent.parent


def test_a_cpu_has_no_kernels_to_try(capsys, tmp_path):
    """Nothing is broken where PyTorch is the implementation."""
    report, gates = tmp_path / "report.json", tmp_path / "gates.json"
    assert main(["doctor", "--platform", "cpu", "--json", str(report), "--gates", str(gates)]) == 0
    said = capsys.readouterr().out
    data = json.loads(report.read_text())
    assert len(data["kernels"]) == sum(len(ops.get(name).dtypes) for name in ops.names()) and {
        row["works"] for row in data["kernels"]
    } == {None}
    assert said.count("PyTorch is the implementation") == len(data["kernels"])
    assert set(findings.read(gates).kernels) == {(row["op"], row["dtype"]) for row in data["kernels"]}


def test_no_device_of_a_platform_is_status_1(capsys):
    assert main(["doctor", "--platform", "metax"]) == 1
    assert capsys.readouterr().out.startswith("no MetaX device")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--preflight", "--gates", "x.json"], "--gates"),
        (["--json", "/nowhere/x.json"], "--json"),
        (["--dtype", "float64"], "--dtype"),
        (["--timeout", "0"], "seconds above zero"),
        (["--op", "softmax"], "--op"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("name, dtype", [(n, d) for n in ops.names() for d in ops.get(n).dtypes], ids=str)
def test_the_references_own_results_pass_and_wrong_ones_do_not(name, dtype):
    """So the comparison neither asks too much of a kernel nor takes anything; one part in fifty is too much."""
    for _, on_cpu in doctor.small_calls(name, dtype):
        args = doctor.moved(on_cpu, torch.device("cpu"))
        result = getattr(ops, name)(*args)
        doctor.compare(name, on_cpu, args, result)
        changed = cache_of(name, args) if name in WRITING else result[0] if isinstance(result, tuple) else result
        changed = _fp8.views(changed)[1] if changed.dtype == torch.uint8 else changed
        changed.mul_(1.02) if changed.is_floating_point() else changed[1, 1].add_(1)
        with pytest.raises(AssertionError):
            doctor.compare(name, on_cpu, args, result)


def test_float32_is_not_compared_as_bfloat16_is():
    (_, on_cpu), *_ = doctor.small_calls("rms_norm", torch.float32)
    args = doctor.moved(on_cpu, torch.device("cpu"))
    with pytest.raises(AssertionError):
        doctor.compare("rms_norm", on_cpu, args, ops.rms_norm(*args).bfloat16().float())


def test_small_calls_launch_every_kernel_of_decode():
    sizes = doctor._CALLS["mla_decode"]
    assert any(call.get("num_splits", 1) > 1 for call in sizes), "mla_combine"
    assert any(call.get("scheduled") for call in sizes)
    assert any(call.get("s_q", 1) > 1 for call in sizes)
    assert {call.get("page_size", 64) for call in sizes} >= {16, 32, 64}
    assert any(call.get("keys", 0) > 64 for call in sizes), "more than a tile of keys"


def answering(monkeypatch, tmp_path, code):
    """A child that runs `code` in place of the library."""
    script = tmp_path / "child.sh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return child.ask(["doctor"], os.environ, 30)


def test_words_before_an_answer(monkeypatch, tmp_path):
    """A compiler's, without an end of line, and in another encoding."""
    code = (
        'import sys; sys.stdout.buffer.write(b"\\xb1\\xe0 JIT... "); sys.stdout.flush(); '
        f'print("""{child.answer({"works": True})}""")'
    )
    assert answering(monkeypatch, tmp_path, code) == {"works": True}


@pytest.mark.parametrize(
    "code, reason",
    [
        ('print("assertion failed"); import os; os.abort()', "the process was ended by SIGABRT"),
        ('import sys; sys.exit("no such driver")', "the process ended with status 1: no such driver"),
    ],
    ids=["abort", "exit"],
)
def test_a_child_without_an_answer(monkeypatch, tmp_path, code, reason):
    found = answering(monkeypatch, tmp_path, code)
    assert found["works"] is False and found["reason"].startswith(reason)


@pytest.mark.slow
def test_an_end_by_sigterm_takes_the_child_along(tmp_path):
    """A board must not stay held by a compiler that nobody waits for."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import subprocess, sys\n"
        "from ntops_mla import doctor\n"
        "from ntops_mla.__main__ import main\n"
        "stock = subprocess.Popen\n"
        "def sleeper(command, **keys):\n"
        "    process = stock([sys.executable, '-c', 'import time; time.sleep(60)'], **keys)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "subprocess.Popen = sleeper\n"
        "main(['doctor', '--platform', 'cpu', '--preflight'])\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    pid = int(process.stdout.readline())
    time.sleep(1)  # it waits by then
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child lives on")
