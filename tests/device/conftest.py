"""The kernels on the accelerator of this machine: for a run that asks for them with `-m device`.

With NTOPS_MLA_INTERPRET=1 the device is the CPU, in Triton's interpreter, and sizes shrink (on_device.py): so these
tests can be tried where there is no accelerator.
"""

import pytest
import torch

import ntops_mla.dispatch
from ntops_mla import interpreter
from ntops_mla.devices import best_device, device_module

# Before the tests import it, so that its asserts tell what they compared.
pytest.register_assert_rewrite("tests.device.on_device")


@pytest.fixture(scope="session")
def device():
    """The accelerator under test. Without one the tests fail: nobody asks for them who does not want them run."""
    if interpreter.enabled():
        return torch.device("cpu")
    found = best_device()
    if found.device.type == "cpu":
        pytest.fail(f"tests/device need an accelerator: {found.reason}", pytrace=False)
    device_module(found.device).set_device(found.device)  # the one whose streams and graphs are meant
    return found.device


@pytest.fixture(autouse=True)
def _strict(monkeypatch, _fresh_dispatch):
    """A fallback that no test asked for fails it."""
    monkeypatch.setenv("NTOPS_MLA_STRICT", "1")
    for name in ("NTOPS_MLA_BACKEND", "NTOPS_MLA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    ntops_mla.dispatch.reset()


@pytest.fixture(autouse=True)
def _exact_products():
    """Whatever the machine's settings say: float32 products of PyTorch's are float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _poison_the_device(device, _poison, monkeypatch):
    """NaN in new memory of the device too: where its PyTorch does not honour the setting, by `torch.empty` itself."""
    if torch.empty(64, device=device).isnan().all():
        return
    empty = torch.empty

    def poisoned(*args, **kwargs):
        value = empty(*args, **kwargs)
        return value.fill_(float("nan")) if value.is_floating_point() else value

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def empty_board(device):
    """The device with no memory held by what other tests left behind, before and after."""
    module = device_module(device)
    release = getattr(module, "empty_cache", lambda: None)
    release()
    yield device
    release()
