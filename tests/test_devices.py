"""Which platform a device belongs to, and how a device that works is found."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ntops_mla import devices
from ntops_mla import platform as platforms
from ntops_mla.platform import (
    DeviceNotFoundError,
    best_device,
    detect,
    find_device,
    get_platform,
    look_for,
    probe,
)
from tests.fakes.boards import Machine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def machine(monkeypatch):
    """A machine without an accelerator, to which a test adds one."""
    with Machine(monkeypatch) as machine:
        yield machine


def test_nvidia(machine):
    machine.nvidia()
    found = detect("cuda:0")
    assert found.platform.name == "nvidia"
    assert found.device == torch.device("cuda:0")
    assert "device name 'NVIDIA H200'" in found.reason


@pytest.mark.parametrize("board", [{}, {"name": "MXC500", "maca": None}, {"maca": None}, {"name": "unnamed"}], ids=str)
def test_metax_although_torch_version_cuda_is_set(machine, board):
    machine.metax(**board)
    assert torch.version.cuda == "11.6"
    found = detect("cuda:0")
    assert found.platform.name == "metax"
    assert torch.version.maca or "device name" in found.reason


@pytest.mark.parametrize(
    "board", [{}, {"corex": False}, {"name": "unnamed"}, {"name": "ILUVATAR MR-V100", "corex": False}], ids=str
)
def test_iluvatar_although_torch_version_cuda_is_set(machine, board):
    machine.iluvatar(**board)
    assert torch.version.cuda == "10.2"
    assert "corex" not in torch.__version__
    found = detect("cuda:0")
    assert found.platform.name == "iluvatar"
    assert "corex" in found.reason or "name" in found.reason


@pytest.mark.parametrize("board", ["Biren BR104", "unnamed"])
def test_what_imitates_cuda_is_not_nvidia(machine, board):
    """The reason tells what was seen, so that a wrong answer can be understood."""
    machine.iluvatar(name=board, corex=False)
    found = detect("cuda:0")
    assert found.platform is None
    assert board in found.reason and "torch.version.cuda '10.2'" in found.reason
    with pytest.raises(DeviceNotFoundError, match="cuda:0 belongs to no platform"):
        find_device("nvidia")
    assert best_device().platform.name == "cpu"


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB", "Tesla V100-SXM2-16GB", "GeForce RTX 3090"]
)
def test_nvidia_by_its_name(machine, name):
    machine.nvidia(name=name)
    found = detect("cuda:0")
    assert found.platform.name == "nvidia" and name in found.reason


def test_moore(machine):
    machine.moore()
    found = detect("musa:0")
    assert found.platform.name == "moore"
    assert "device type musa" in found.reason
    assert not torch.cuda.is_available()


def test_moore_by_its_device_type_alone(machine):
    machine.moore()
    machine.version(musa=None)
    assert detect(torch.device("musa", 0)).platform.name == "moore"


def test_moore_where_a_shim_says_cuda(machine):
    """Under torchada "cuda" is what the program says, and torch.cuda stays unavailable."""
    machine.moore()
    machine.query_raises("get_device_name", RuntimeError("no CUDA"))
    found = detect("cuda")
    assert found.platform.name == "moore"
    assert "torch.version.musa is '4.3.0'" in found.reason


def test_an_amd_board_is_no_platform(machine):
    machine.amd()
    found = detect("cuda:0")
    assert found.platform is None
    assert "AMD Instinct MI300X" in found.reason
    assert "hip '6.2.41133'" in found.reason


@pytest.mark.parametrize("device", ["xpu", "mps", "meta", "hpu"])
def test_another_device_type_is_no_platform_even_where_cuda_is(machine, device):
    machine.nvidia()
    found = detect(device)
    assert found.platform is None
    assert device in found.reason


def test_cpu(machine):
    machine.nvidia()
    assert detect("cpu").platform.name == "cpu"
    assert detect(torch.device("cpu", 0)).platform.name == "cpu"
    assert machine.names == []


def test_no_accelerator_at_all(machine):
    found = detect("cuda")
    assert found.platform is None
    assert "device type cuda" in found.reason


def test_a_name_that_cannot_be_had_is_in_the_reason(machine):
    machine.nvidia().query_raises("get_device_name", RuntimeError("driver is too old\nsecond line"))
    found = detect("cuda:0")
    assert found.platform.name == "nvidia"  # torch.version.cuda says so, and nothing else can
    assert "torch.version.cuda is '12.4'" in found.reason
    assert "get_device_name raised RuntimeError: driver is too old" in found.reason
    assert "\n" not in found.reason


def test_attributes_that_raise_are_in_the_reason(machine, monkeypatch):
    machine.nvidia()

    class Version:
        cuda = None

        @property
        def maca(self):
            raise OSError("libmaca.so")

    monkeypatch.setattr(torch, "version", Version())
    detect.cache_clear()
    found = detect("cuda:0")
    assert found.platform.name == "nvidia"  # by its name
    assert "torch.version.maca raised OSError: libmaca.so" in found.reason


@pytest.mark.parametrize("device", ["abacus", "cuda:minus one", ""])
def test_what_is_no_device_is_a_value_error(machine, device):
    with pytest.raises(ValueError, match="torch knows no such device"):
        detect(device)


@pytest.mark.parametrize(
    ("name", "expected"), [("metax", "metax"), ("MUXI", "metax"), ("mthreads", "moore"), ("cpu", "cpu")]
)
def test_an_override_decides(machine, monkeypatch, name, expected):
    machine.nvidia()
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", name)
    found = detect("cuda:0")
    assert found.platform.name == expected
    assert f"NTOPS_MLA_PLATFORM={name}" in found.reason
    assert machine.names == []


def test_an_override_decides_for_the_cpu_too(machine, monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "metax")
    assert detect("cpu").platform.name == "metax"


@pytest.mark.parametrize("name", ["metax", "cpu"])
def test_the_best_device_states_the_override(machine, monkeypatch, name):
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", name)
    best = best_device()
    assert (best.platform.name, best.device) == (name, torch.device("cpu"))
    assert best.reason.startswith(f"NTOPS_MLA_PLATFORM={name}; no accelerator works")
    machine.nvidia()
    best = best_device()
    assert best.platform.name == name and f"NTOPS_MLA_PLATFORM={name}" in best.reason
    assert best.device == torch.device("cuda:0" if name == "metax" else "cpu")


def test_a_wrong_override_is_a_value_error_that_lists_the_names(machine, monkeypatch):
    machine.nvidia()
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "nvidla")
    for device in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match=r"NTOPS_MLA_PLATFORM=nvidla.*known: moore.*nvidia"):
            detect(device)


def test_detection_is_cached_by_device_and_override(machine, monkeypatch):
    machine.amd()
    assert detect("cuda:0") is detect(torch.device("cuda", 0))
    assert machine.names == ["cuda:0"]
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "nvidia")
    assert detect("cuda:0").platform.name == "nvidia"
    monkeypatch.delenv("NTOPS_MLA_PLATFORM")
    assert detect("cuda:0").platform is None
    assert machine.names == ["cuda:0"]
    detect.cache_clear()
    detect("cuda:0")
    assert machine.names == ["cuda:0", "cuda:0"]


def test_detection_allocates_nothing(machine):
    machine.nvidia()
    detect("cuda:0")
    assert machine.allocations == []


# A device that works


@pytest.mark.parametrize("vendor", ["nvidia", "metax", "iluvatar", "moore"])
def test_a_working_device_is_found(machine, vendor):
    getattr(machine, vendor)()
    device = find_device(vendor)
    assert machine.allocations == [str(device)]
    assert device == torch.device("musa" if vendor == "moore" else "cuda", 0)
    best = best_device()
    assert (best.platform.name, best.device) == (vendor, device)
    others = {"nvidia", "metax", "iluvatar", "moore"} - {vendor}
    for other in others:
        with pytest.raises(DeviceNotFoundError):
            find_device(other)


def test_the_cpu_is_always_found(machine):
    assert find_device("cpu") == torch.device("cpu")
    assert look_for("cpu").works


@pytest.mark.parametrize("vendor", ["nvidia", "iluvatar", "moore"])
def test_a_driver_that_counts_devices_which_do_not_work(machine, vendor):
    getattr(machine, vendor)()
    machine.broken(RuntimeError("CUDA error 803: driver mismatch\nmore"), "musa" if vendor == "moore" else "cuda")
    title = get_platform(vendor).title
    with pytest.raises(DeviceNotFoundError) as caught:
        find_device(vendor)
    message = str(caught.value)
    assert message.startswith(f"no {title} device: torch.")
    assert "device_count() is 1, but allocating on" in message
    assert "driver mismatch" in message
    assert "\n" not in message
    presence = look_for(vendor)
    assert not presence.works and presence.device is not None
    best = best_device()
    assert best.platform.name == "cpu"
    assert "no accelerator works" in best.reason and "driver mismatch" in best.reason


def test_moore_without_its_package(machine):
    with pytest.raises(DeviceNotFoundError) as caught:
        find_device("mthreads")
    assert str(caught.value) == "no Moore Threads device: torch has no torch.musa (torch_musa is not installed)"


def test_moore_whose_package_does_not_load(machine, monkeypatch, tmp_path):
    (tmp_path / "torch_musa.py").write_text("raise OSError('libmusart.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DeviceNotFoundError, match=r"import torch_musa raised OSError: libmusart.so"):
        find_device("moore")


def test_moore_whose_package_has_to_be_imported(machine, monkeypatch, tmp_path):
    """Below torch 2.5 nothing loads torch_musa by itself."""
    machine.moore()
    board = torch.musa
    monkeypatch.delattr(torch, "musa")
    monkeypatch.setattr(devices, "_board_of_the_test", board, raising=False)
    (tmp_path / "torch_musa.py").write_text(
        "import torch\nfrom ntops_mla import devices\ntorch.musa = devices._board_of_the_test"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert find_device("moore") == torch.device("musa:0")
    finally:
        sys.modules.pop("torch_musa", None)


def test_no_device_is_counted(machine):
    with pytest.raises(DeviceNotFoundError, match=r"no NVIDIA device: torch.cuda.device_count\(\) is 0"):
        find_device("nvidia")
    best = best_device()
    assert best.platform.name == "cpu" and best.device == torch.device("cpu")
    assert all(name in best.reason for name in ("Moore Threads", "MetaX", "Iluvatar", "NVIDIA"))


def test_counting_that_raises(machine):
    machine.nvidia().query_raises("device_count", OSError("no driver"))
    with pytest.raises(DeviceNotFoundError, match=r"device_count.* raised OSError: no driver"):
        find_device("nvidia")


def test_a_device_of_another_platform_is_named(machine):
    machine.metax()
    with pytest.raises(DeviceNotFoundError, match="cuda:0 belongs to metax"):
        find_device("nvidia")
    assert machine.allocations == []


def test_the_first_working_device_is_taken(machine, monkeypatch):
    machine.nvidia(count=2)
    error = devices._allocation_error
    monkeypatch.setattr(devices, "_allocation_error", lambda device: "dead" if device.index == 0 else error(device))
    assert find_device("nvidia") == torch.device("cuda:1")


def test_find_device_of_an_unknown_platform():
    with pytest.raises(ValueError, match="unknown platform"):
        find_device("abacus")


def test_probe(machine):
    machine.nvidia()
    info = probe("cuda:0")
    assert (info.name, info.capability, info.shared_memory, info.processors) == ("NVIDIA H200", (9, 0), 232448, 60)


def test_probe_of_a_driver_that_says_nothing(machine):
    machine.nvidia()
    for query in ("get_device_name", "get_device_capability", "get_device_properties"):
        machine.query_raises(query, RuntimeError(f"no {query}"))
    info = probe("cuda:0")
    assert (info.name, info.capability, info.shared_memory, info.processors) == (None,) * 4
    assert len([error for error in info.errors if "RuntimeError: no get_device" in error]) == 3


def test_probe_asks_triton_only_where_it_is_loaded(machine, monkeypatch):
    machine.nvidia()
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert probe("cuda:0").triton_target is None
    assert "triton" not in sys.modules
    target = SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    assert probe("cuda:0").triton_target == "cuda:90, 32 lanes"
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    info = probe("cuda:0")
    assert info.triton_target is None
    assert any("Triton's driver raised AttributeError" in error for error in info.errors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_probe_and_synchronize_without_an_accelerator(device):
    assert probe(device) == platforms.DeviceInfo()
    assert platforms.synchronize(device) is None


def test_device_module_and_synchronize(machine, monkeypatch):
    machine.moore()
    waited = []
    monkeypatch.setattr(torch.musa, "synchronize", waited.append)
    assert platforms.device_module("musa:0") is torch.musa
    assert platforms.device_module(torch.device("cpu")) is torch.cpu
    platforms.synchronize("musa:0")
    assert waited == [torch.device("musa:0")]


def test_device_module_on_an_older_torch(monkeypatch):
    monkeypatch.delattr(torch, "get_device_module")
    assert platforms.device_module("cpu") is torch.cpu


def test_importing_and_detecting_brings_no_triton():
    code = (
        "import sys, ntops_mla.platform as p; p.detect('cpu'); p.best_device(); p.probe('cpu'); p.all_platforms();"
        "sys.exit('triton imported' if 'triton' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
