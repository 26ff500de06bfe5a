"""What `import ntops_mla` asks of torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ntops_mla._torch_version import require_torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("version", ["2.3.1", "1.13.0+cu117", "2.0.0a0+gitabc"])
def test_an_older_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=r"torch >= 2\.4, found " + version.replace("+", r"\+")):
        require_torch()


@pytest.mark.parametrize("version", ["2.4.0", "2.4.0a0+vendor", "2.10.0", "3.0.0", "nightly"])
def test_newer_and_unreadable_versions_pass(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    require_torch()


def test_no_torch_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match="README"):
        require_torch()


def test_importing_brings_nothing_that_is_slow():
    """Triton, NineToothed, ntops and transformers take longer than the library itself: 0.05 s behind torch."""
    code = (
        "import sys, torch, ntops_mla; "
        "print([name for name in ('triton', 'ninetoothed', 'ntops', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
