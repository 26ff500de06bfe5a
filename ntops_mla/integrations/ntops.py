"""The ops as part of ntops (github.com/InfiniTensor/ntops), which has no place where a plugin could register.

`ntops.torch.<op>` is a function that forwards to the dispatcher, `ntops.kernels.<op>` the kernel's module; both are in
`__all__`, as ntops's own are. `ntops.kernels` gets every kernel, also those that are no op by themselves: mla_decode
needs mla_combine.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
import threading
import warnings
from importlib.machinery import PathFinder
from types import FunctionType, ModuleType

from ntops_mla.integrations.import_hook import forget, when_imported
from ntops_mla.integrations.ntops_functions import FUNCTIONS

VARIABLE = "NTOPS_MLA_REGISTER"
SOURCE = "git+https://github.com/InfiniTensor/ntops"
Thing = FunctionType | ModuleType
_lock = threading.Lock()


def register() -> dict[str, str]:
    """Put the ops into ntops, which is imported for it, and say of each what became of it.

    "added"; "present": an earlier call did it, and nothing was missing; "upstream": ntops has the name itself, in
    ntops.torch or ntops.kernels, and keeps it in both. `import ntops_mla` does this where ntops is imported, or as soon
    as it is, unless NTOPS_MLA_REGISTER=0. After a reload of ntops.torch or ntops.kernels, which empties `__all__` of
    what others added, call it again. ImportError where there is no ntops; RuntimeError while it is being imported.
    """
    hooked = forget("ntops")  # or the hook would add them, and this call find them present
    try:
        halves = _halves()
    except BaseException:
        if hooked:
            when_imported("ntops", _register_or_warn)
        raise
    # All imports are done: a lock held while importing could be waited for by the thread that the import waits for.
    with _lock:
        names = {name for _, ours in halves for name in ours}
        upstream = {name for package, ours in halves for name in names if _taken(package, name, ours.get(name))}
        added = {
            name
            for package, ours in halves
            for name, thing in ours.items()
            if name not in upstream and _publish(package, name, thing)
        }
    return {name: "upstream" if name in upstream else "added" if name in added else "present" for name in FUNCTIONS}


def automatic() -> None:
    """What `import ntops_mla` does: `register` at once where ntops is imported, else as soon as it is."""
    if not _wanted():
        return
    # First the hook: another thread may be about to import ntops.
    when_imported("ntops", _register_or_warn)
    if sys.modules.get("ntops") is not None:
        _register_or_warn()


def plugin() -> None:
    """The entry point in the group `ntops.plugins`, for the day when ntops loads plugins."""
    if _wanted():
        register()


def _wanted() -> bool:
    value = os.environ.get(VARIABLE, "").strip() or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}")
    return value == "1"


def _register_or_warn() -> None:
    """Neither `import ntops` nor `import ntops_mla` fails because of the other."""
    try:
        register()
    except Exception as error:
        _warn_once(f"ntops_mla's ops are not in ntops: {type(error).__name__}: {error}")


def _halves() -> list[tuple[ModuleType, dict[str, Thing]]]:
    """ntops.torch and ntops.kernels, those that this ntops has, each with what belongs there."""
    try:
        ntops = importlib.import_module("ntops")
    except ModuleNotFoundError as error:
        if error.name != "ntops":
            raise
        raise ImportError(f"ntops is not installed; it is on GitHub only: pip install {SOURCE}") from error
    parts = {name: _part(name) for name in ("ntops.torch", "ntops.kernels")}
    missing = [name for name, part in parts.items() if part is None]
    if len(missing) == len(parts):
        place = getattr(ntops, "__file__", None) or ", ".join(getattr(ntops, "__path__", ()))
        raise ImportError(f"{place} has neither ntops.torch nor ntops.kernels; ntops itself is {SOURCE}")
    if missing:
        _warn_once(f"this ntops has no {missing[0]}: ntops_mla's ops are registered without it")
    ours = {"ntops.torch": lambda: FUNCTIONS, "ntops.kernels": _kernel_modules}
    return [(part, ours[name]()) for name, part in parts.items() if part is not None]


def _part(name: str) -> ModuleType | None:
    try:
        part = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    # import_module waits for another thread's import; what is unfinished now is being imported by this thread.
    if getattr(part.__spec__, "_initializing", False):
        raise RuntimeError(f"{name} is being imported; call ntops_mla.register() when it is there")
    return part


def _kernel_modules() -> dict[str, ModuleType]:
    import ntops_mla.kernels as folder  # not above: the kernels' files bring NineToothed and Triton

    names = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    modules = {name: importlib.import_module(f"{folder.__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "premake")}


def _taken(package: ModuleType, name: str, ours: Thing | None) -> bool:
    """Whether ntops itself has the name: as an attribute, in `__all__`, or in a file that it has not imported."""
    there = vars(package).get(name)
    if there is not None:
        return there is not ours
    if name in getattr(package, "__all__", ()):
        return True
    path = getattr(package, "__path__", None)
    return path is not None and PathFinder.find_spec(f"{package.__name__}.{name}", path) is not None


def _publish(package: ModuleType, name: str, thing: Thing) -> bool:
    """Whether anything was missing."""
    missing = vars(package).get(name) is not thing
    setattr(package, name, thing)
    names = getattr(package, "__all__", None)
    if names is not None and name not in names:
        missing = True
        if isinstance(names, list):
            names.append(name)
        else:
            package.__all__ = [*names, name]
    full = f"{package.__name__}.{name}"
    if isinstance(thing, ModuleType) and sys.modules.get(full) is not thing:
        missing, sys.modules[full] = True, thing
    return missing


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
