"""What torch shows on each vendor's machine, put in front of a CPU torch.

`Machine(monkeypatch)` begins as a machine without an accelerator, whatever this one has. The methods named after a
vendor add its marks as public reports describe them; nothing here was recorded on a board.

    with Machine(monkeypatch) as machine:
        machine.metax()
        assert detect("cuda:0").platform.name == "metax"
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch

from ntops_mla.platform import detect

_VERSIONS = ("cuda", "musa", "maca", "hip", "xpu")
_QUERIES = ("device_count", "is_available", "get_device_name", "get_device_capability", "get_device_properties")


class Machine:
    """A pretended machine. `names` and `allocations` say what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.names: list[str] = []  # devices whose name was asked for
        self.allocations: list[str] = []  # devices on which a tensor was made
        self._working: set[str] = set()  # device types on which allocation works
        self._broken: dict[str, Exception] = {}
        for variable in ("NTOPS_MLA_PLATFORM", "NTOPS_MLA_BACKEND", "NTOPS_MLA_STRICT"):
            monkeypatch.delenv(variable, raising=False)
        for attribute in _VERSIONS:
            monkeypatch.setattr(torch.version, attribute, None, raising=False)
        monkeypatch.delattr(torch, "corex", raising=False)
        monkeypatch.delattr(torch, "musa", raising=False)
        self._show(torch.cuda, "cuda", [], (8, 0), None)
        self._zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", self._allocate)
        detect.cache_clear()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *raised: object) -> None:
        self._patch.undo()
        detect.cache_clear()

    def nvidia(self, name: str = "NVIDIA H200", count: int = 1) -> Machine:
        """CUDA 12 and a Hopper."""
        self.version(cuda="12.4")
        return self._cuda([name] * count, (9, 0), shared_memory_per_block_optin=232448)

    def metax(self, name: str = "MetaX C550", maca: str | None = "2.31.0.6") -> Machine:
        """Sets torch.version.cuda too."""
        self.version(cuda="11.6", maca=maca)
        return self._cuda([name], (8, 0))

    def iluvatar(self, name: str = "Iluvatar BI-V150", corex: bool = True) -> Machine:
        """Sets torch.version.cuda too; `corex` False is a build without torch.corex."""
        self.version(cuda="10.2")
        if corex:
            self._patch.setattr(torch, "corex", True, raising=False)
        return self._cuda([name], (7, 1))

    def moore(self, name: str = "MTT S5000", capability: tuple[int, int] = (3, 1), count: int = 1) -> Machine:
        """torch_musa is loaded: torch.musa, the device type musa, and nothing in torch.cuda."""
        _name_musa()
        self.version(musa="4.3.0")
        module = SimpleNamespace(synchronize=lambda device=None: None)
        self._patch.setattr(torch, "musa", module, raising=False)
        self._show(module, "musa", [name] * count, capability, None)
        self._working.add("musa")
        return self

    def amd(self) -> Machine:
        """ROCm: device type cuda, torch.version.cuda unset."""
        self.version(hip="6.2.41133")
        return self._cuda(["AMD Instinct MI300X"], (9, 4))

    def version(self, **attributes: str | None) -> Machine:
        """Sets attributes of torch.version."""
        for name, value in attributes.items():
            self._patch.setattr(torch.version, name, value, raising=False)
        detect.cache_clear()
        return self

    def broken(self, error: Exception, device_type: str = "cuda") -> Machine:
        """A mismatched driver: devices are counted, allocating raises."""
        self._broken[device_type] = error
        return self

    def query_raises(self, query: str, error: Exception, device_type: str = "cuda") -> Machine:
        """One of the driver's queries raises."""

        def fail(*args, **kwargs):
            raise error

        self._patch.setattr(getattr(torch, device_type), query, fail)
        detect.cache_clear()
        return self

    def _cuda(self, names: list[str], capability: tuple[int, int], **properties: int) -> Machine:
        self._show(torch.cuda, "cuda", names, capability, properties)
        self._working.add("cuda")
        detect.cache_clear()
        return self

    def _show(self, module, device_type, names, capability, properties) -> None:
        def name_of(device=None):
            self.names.append(str(device))
            return names[torch.device(device).index or 0]

        shown = {
            "device_count": lambda: len(names),
            "is_available": lambda: bool(names) and device_type not in self._broken,
            "get_device_name": name_of,
            "get_device_capability": lambda device=None: capability,
            "get_device_properties": lambda device=None: SimpleNamespace(
                multi_processor_count=60, **(properties or {"shared_memory_per_block": 49152})
            ),
        }
        assert set(shown) == set(_QUERIES)
        for query, answer in shown.items():
            self._patch.setattr(module, query, answer, raising=False)

    def _allocate(self, *args, device=None, **kwargs):
        device_type = torch.device(device or "cpu").type
        if device_type == "cpu":
            return self._zeros(*args, **kwargs)
        self.allocations.append(str(device))
        if device_type in self._broken:
            raise self._broken[device_type]
        if device_type not in self._working:
            raise AssertionError(f"no {device_type} on this machine")
        return self._zeros(*args, **kwargs)


def _name_musa() -> None:
    """Gives torch the device type musa; there is one such name in a process and it stays.

    So torch.musa stays too, without devices: torch.compile asks for the module of every device type that torch names.
    """
    if torch._C._get_privateuse1_backend_name() != "musa":
        torch.utils.rename_privateuse1_backend("musa")
        torch._register_device_module("musa", _NoDevices("torch.musa"))


class _NoDevices(ModuleType):
    """A device module on a machine without that device."""

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Nothing to seed."""
