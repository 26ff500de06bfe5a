"""What goes wrong on boards: each time a clear reason, PyTorch's result and nothing lost; under strict, an error."""

import importlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import vendor_board

import ntops_mla
from conftest import SHOW, example
from ntops_mla import StrictFallbackError, dispatch, doctor, findings, interpreter, ops
from ntops_mla import board as boards
from ntops_mla.platform import DeviceNotFoundError, best_device, find_device, look_for

NAMES = ("latent_append", "mla_prefill")  # one that writes, one with products


def falls_back(device, name, words):
    """The op gives PyTorch's result on the board, says `words`, and raises under strict before anything is written."""
    dispatch.reset()
    _, on_cpu = next(doctor.small_calls(name, torch.bfloat16))
    args = doctor.moved(on_cpu, device)
    with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match=words):
        getattr(ops, name)(*args)
    for value, before in zip(args, on_cpu):
        assert not isinstance(value, torch.Tensor) or torch.equal(value.cpu(), before), "something was written"
    with dispatch.record() as ran, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = getattr(ops, name)(*args)
    choice = ran[name]
    assert (choice.platform, choice.backend) == (SHOW.platform, "reference")
    assert words in choice.reason
    doctor.compare(name, on_cpu, args, result)
    return [one for one in said if issubclass(one.category, ntops_mla.KernelFallbackWarning)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["CompilationError", "OutOfResources"])
def test_a_kernel_that_does_not_compile_or_fit(device, name, kind):
    def fault(kernel, args):
        if kind == "OutOfResources":
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(73728, 65536, "shared memory")
        from triton.compiler.errors import CompilationError

        raise CompilationError("def f(): pass", None, "this compiler does not know that")

    vendor_board.state.fault = fault
    words = "out of resource: shared memory, Required: 73728" if kind == "OutOfResources" else "CompilationError"
    assert len(falls_back(device, name, words)) == 1, "warned once"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", ["2.1.0", "3.0.0"])
def test_an_old_triton(device, platform, triton_is, version, name):
    if (3, 0) >= tuple(map(int, platform.triton_min.value.split("."))) and version == "3.0.0":
        pytest.skip(f"{platform.title} takes Triton 3.0")
    triton_is(version)
    words = f"Triton {version[:3]} is older than {platform.triton_min.value}"
    assert falls_back(device, name, words) == [], "known beforehand, so nothing failed"
    assert vendor_board.state.launches == []


# The public Triton for NVIDIA: of Iluvatar's own it differs in lanes alone
@pytest.mark.parametrize("other", [("hip", "gfx942", 64), ("cuda", 80, 32)], ids=["hip", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_a_triton_of_another_vendor(device, name, other):
    backend, arch, lanes = SHOW.target
    interpreter.install_driver(*other)
    boards.forget()
    words = f"Triton compiles for {other[0]}:{other[1]} with {other[2]} lanes, and this board's Triton for"
    try:
        assert falls_back(device, name, words) == []
    finally:
        interpreter.install_driver(backend, arch, lanes)
        boards.forget()
    assert vendor_board.state.launches == []


@pytest.mark.parametrize("name", NAMES)
def test_a_triton_that_does_not_import(device, monkeypatch, name):
    """MetaX's raises where MACA_PATH is unset; whoever's, and whatever it raises."""
    stock = importlib.import_module

    def fail(module, *args):
        if module == "triton":
            raise AssertionError("Not found MACA_PATH")
        return stock(module, *args)

    monkeypatch.setattr(importlib, "import_module", fail)
    boards.forget()
    assert falls_back(device, name, "Triton does not import: AssertionError: Not found MACA_PATH") == []
    boards.forget()


def test_a_driver_that_counts_devices_which_do_not_work(monkeypatch, device):
    zeros = torch.zeros

    def broken(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == SHOW.device_type:
            raise RuntimeError("driver version is insufficient for runtime version")
        return zeros(*args, device=device, **kwargs)

    monkeypatch.setattr(torch, "zeros", broken)
    presence = look_for(SHOW.platform)
    assert (presence.works, presence.device) == (False, device)
    with pytest.raises(DeviceNotFoundError, match=r"allocating on \w+:0 failed.*driver version is insufficient"):
        find_device(SHOW.platform)
    if SHOW.device_type == "musa":
        vendor_board.state.torch_cuda_calls.clear()  # with no musa device the other platforms are looked for
        found = best_device()
        vendor_board.state.torch_cuda_calls.clear()
        assert found.device.type == "cpu" and "driver version is insufficient" in found.reason


def test_products_that_may_end_the_process_are_refused(device, platform):
    """Nothing is launched, so nothing can be too late; a doctor's run allows it."""
    if platform.limits_for(SHOW.capability).least_product is None:
        args = example("mla_decode", device)
        assert ops.mla_decode.explain(*args).backend == "kernel"
        return

    def fault(kernel, args):
        if kernel == "mla_decode":
            os.abort()

    vendor_board.state.fault = fault
    assert (
        falls_back(device, "mla_decode", "below 32 the compiler of MetaX, C500, Triton 3.0 may end the process") == []
    )


def test_what_a_doctor_found_elsewhere_allows_nothing(device, platform, tried, monkeypatch):
    if platform.limits_for(SHOW.capability).least_product is None:
        pytest.skip("nothing is refused on this board")
    args = example("mla_decode", device)
    assert ops.mla_decode.explain(*args).backend == "kernel"
    tested = json.loads(tried.read_text())
    for products, backend in (([[16, 32]], "kernel"), ([[32, 16]], "reference")):  # of other tiles nothing is known
        rows = [{**row, "products": products} for row in tested["kernels"]]
        tried.write_text(json.dumps({**tested, "kernels": rows}))
        dispatch.reset()
        assert ops.mla_decode.explain(*args).backend == backend
    tried.write_text(json.dumps(tested))
    for name, other in (("device", "MetaX C600"), ("triton", "3.6.0"), ("platform", "moore")):
        data = json.loads(tried.read_text())
        tried.write_text(json.dumps({**data, name: other}))
        dispatch.reset()
        choice = ops.mla_decode.explain(*args)
        assert choice.backend == "reference" and f"{tried} is of" in choice.reason
        tried.write_text(json.dumps(data))


def test_a_kernel_that_ends_the_process(device, tmp_path, monkeypatch):
    """Its doctor's child is gone, the doctor is not, and the dispatcher hears of it."""
    monkeypatch.setenv(vendor_board.ABORT, "mla_prefill")
    gates = tmp_path / "gates.json"
    command = ["doctor", "--op", "mla_prefill", "--dtype", "bfloat16", "--gates", str(gates)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ntops_mla", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "BROKEN" in done.stdout and "ended by SIGABRT" in done.stdout
    monkeypatch.setenv(findings.VARIABLE, str(gates))
    dispatch.reset()
    choice = ops.mla_prefill.explain(*example("mla_prefill", device))
    assert choice.backend == "reference" and "ended by SIGABRT" in choice.reason
    with ntops_mla.use(strict=True):  # what was found broken is switched off, and that is asked for
        ops.mla_prefill(*example("mla_prefill", device))
    assert vendor_board.state.launches == []


def test_a_kernel_that_never_returns(device, tmp_path):
    assert doctor._child(["--child", "rope", "--dtype", "float16", "--device", str(device)], None, 0.2) == {
        "works": False,
        "reason": "no answer within 0.2 seconds",
    }
