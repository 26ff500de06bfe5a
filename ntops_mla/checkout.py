"""The checkout that this package runs from, for the commands that write into it: CI files, evidence, README's table."""

from __future__ import annotations

import os
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping


def root() -> pathlib.Path:
    """The repository's root; ValueError where the package was installed without it."""
    folder = pathlib.Path(__file__).resolve().parent.parent
    if not (folder / "setup.py").is_file():
        raise ValueError(f"this needs a checkout of the repository, and {folder} is none")
    return folder


def commit(folder: pathlib.Path) -> str:
    """The commit that is checked out, with a + where its code was changed since; else what the environment says."""
    code = ("kernels", "ntops_mla", "platforms", "scripts", "tests")
    head = _git(folder, "rev-parse", "--short", "HEAD")
    if head:
        return head + ("+" if _git(folder, "status", "--porcelain", "--", *code) else "")
    # GITHUB_SHA: a checkout by GitHub's action where the image has no git
    return os.environ.get("NTOPS_MLA_COMMIT") or os.environ.get("GITHUB_SHA", "")[:7] or "unknown"


def _git(folder: pathlib.Path, *args: str) -> str:
    # In a container the checkout belongs to somebody else, which git refuses unless told.
    command = ["git", "-c", f"safe.directory={folder}", *args]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""


def write(files: Mapping[pathlib.Path, str | bytes]) -> None:
    """Writes all the files, each whole. Nothing is replaced before all that is new lies on the disk."""
    umask = os.umask(0)  # there is no way to ask for it alone
    os.umask(umask)
    ready: list[tuple[str, pathlib.Path]] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
            ready.append((temporary, path))
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o666 & ~umask)  # as open() would have made it
        while ready:
            os.replace(*ready[0])
            del ready[0]
    finally:
        for temporary, _ in ready:
            os.unlink(temporary)
