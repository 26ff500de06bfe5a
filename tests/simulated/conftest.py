"""Tests that run on a board that is not there, one process a board: tests/test_simulated.py starts them."""

import json

import pytest
import torch
import vendor_board  # from tests/fakes, put on the path by tests/fakes/site/sitecustomize.py

from ntops_mla import board as boards
from ntops_mla import dispatch, findings, ops
from ntops_mla.platform import find_device, get_platform

SHOW = vendor_board.state.show


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Nothing of another test; and torch.cuda is asked by nobody but the platform layer."""
    monkeypatch.setattr(vendor_board.state, "fault", None)
    vendor_board.state.launches.clear()
    vendor_board.state.torch_cuda_calls.clear()
    yield
    strangers = [call for call in vendor_board.state.torch_cuda_calls if call[1] != "ntops_mla/devices.py"]
    assert strangers == [], "torch.cuda is asked outside the platform layer"
    if SHOW.device_type == "musa":
        assert vendor_board.state.torch_cuda_calls == [], "torch.cuda is asked on a musa board"


@pytest.fixture
def platform():
    return get_platform(SHOW.platform)


@pytest.fixture
def device(platform):
    return find_device(platform.name)


@pytest.fixture
def launches():
    """A line a launch: kernel, options, sqmma."""
    return vendor_board.state.launches


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """As after a run of `doctor` that found every kernel working."""
    rows = [
        {"op": op, "dtype": dtype, "works": True, "reason": ""}
        for op in ops.names()
        for dtype in ("bfloat16", "float16", "float32")
    ]
    path = tmp_path / "gates.json"
    data = {"platform": SHOW.platform, "device": SHOW.name, "triton": SHOW.triton, "date": "2026-01-01"}
    path.write_text(json.dumps({**data, "kernels": rows}))
    monkeypatch.setenv(findings.VARIABLE, str(path))
    dispatch.reset()
    return path


@pytest.fixture
def triton_is(monkeypatch):
    """Another version of Triton."""

    def become(version):
        import triton

        monkeypatch.setattr(triton, "__version__", version)
        boards.forget()

    yield become
    boards.forget()


def example(op, device, dtype=torch.bfloat16, **sizes):
    """Arguments on the device: of attention, values around 0.1."""
    return ops.get(op).example(device, dtype, **sizes)
