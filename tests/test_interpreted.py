"""The kernels' numerics, in Triton's interpreter: each file of tests/interpreted in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
VARIABLE = "NTOPS_MLA_INTERPRET"
MISSING = [name for name in ("triton", "ninetoothed") if importlib.util.find_spec(name) is None]


def pytest_of(*paths, interpret, **environment):
    """A pytest of its own in the repository's root."""
    kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "TRITON_INTERPRET")}
    if interpret:
        environment |= {VARIABLE: "1", "NTOPS_MLA_STRICT": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *paths],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_every_kernel_has_its_file():
    kernels = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    kernels -= {"mla_combine", "latent_append_rope"}  # tested with mla_decode and latent_append
    # tested together, as latent_fp8
    kernels -= {"latent_append_fp8", "latent_append_fp8_rope", "latent_quantize", "latent_dequantize"}
    assert kernels <= {name[len("test_") : -len(".py")] for name in FILES}


@pytest.fixture(scope="module")
def runs():
    """File -> its run. All are begun at once, as many at a time as there are processors: some take minutes."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        longest_first = sorted(FILES, key=lambda name: name != "test_mla_decode.py")
        yield {name: pool.submit(pytest_of, f"tests/interpreted/{name}", interpret=True) for name in longest_first}


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("file", FILES)
def test_interpreted(runs, file):
    done = runs[file].result()
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", ["tests/interpreted", "tests/interpreted/test_rope.py"])
def test_without_the_variable_they_are_refused(path):
    done = pytest_of(path, interpret=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"needs {VARIABLE}=1" in done.stderr and "passed" not in done.stdout


@pytest.mark.slow
def test_the_normal_run_leaves_them_out():
    done = pytest_of("--collect-only", "-q", interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert "tests/test_interpreted.py" in files and not any("interpreted/" in file for file in files)
