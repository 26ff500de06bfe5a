"""Acts when another package is imported, without importing it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, act: Callable[[], None]) -> None:
    """Call `act` once, when the top-level package `name` has been imported; asking twice for a name counts once.

    A failed import leaves the hook in place for the next one. What `act` raises comes out of the import statement.
    """
    if not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, act))


def forget(name: str) -> bool:
    """Take the hook for `name` away; whether there was one."""
    before = sys.meta_path
    # A new list: another thread may be walking through the old one, and would skip a finder if it shrank.
    sys.meta_path = [finder for finder in before if not (isinstance(finder, _Watch) and finder.name == name)]
    return len(sys.meta_path) < len(before)


class _Watch:
    """A finder that finds nothing by itself: it puts a `_Loader` around what the others find for its name."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self._act = name, act
        self._thread = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        # Another hook may ask all finders, as this one does; it must not ask this one again.
        if name != self.name or self not in finders or getattr(self._thread, "asking", False):
            return None
        self._thread.asking = True
        try:
            for finder in finders[finders.index(self) + 1 :]:
                find = getattr(finder, "find_spec", None)
                spec = None if find is None else find(name, path, target)
                if spec is not None:
                    # A folder without __init__.py has no loader; whatever bears the name then is not the package.
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader, self.name, self._act)
                    return spec
            return None
        finally:
            self._thread.asking = False


class _Loader:
    """The loader of the package, then the act."""

    def __init__(self, loader: Any, name: str, act: Callable[[], None]) -> None:
        self._loader, self._name, self._act = loader, name, act

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)

    def exec_module(self, module: ModuleType) -> None:
        # Nothing of the hook stays behind in the module: reload, inspect and pkgutil see the loader that they know.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # Somebody may run a copy of the package beside the real one.
        if sys.modules.get(self._name) is module:
            forget(self._name)
            self._act()
