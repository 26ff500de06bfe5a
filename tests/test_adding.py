"""docs/adding_a_platform.md and docs/adding_an_op.md, done: their files, put into a copy of this checkout, work there.

Everything runs in processes of its own, begun at once, because a platform or an op cannot be taken back from a process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv*", ".triton", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist")
BLOCK = re.compile(r"^```python (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MISSING = [name for name in ("triton", "ninetoothed") if importlib.util.find_spec(name) is None]
needs_kernels = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Each command in the process where the ones before it ran: importing torch takes longer than most of them.
RUN = """
import contextlib, io, json, sys, traceback
import attention_test
from ntops_mla.__main__ import main

answers = []
for program, *words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = {"ntops_mla": main, "attention_test.py": attention_test.main}[program](words)
        except SystemExit as stopped:
            status = stopped.code
        except Exception:
            status = traceback.format_exc()
    answers.append((status or 0, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


def blocks(page):
    """{what stands behind ```python: the block} of a page."""
    return dict(BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))


class Copy:
    """This checkout without its history, with a page's files in it."""

    def __init__(self, root, page):
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        self.root, self.files = root, [path for path in blocks(page) if "/" in path]
        for path in self.files:
            assert not (root / path).exists() and (root / path).parent.is_dir(), path
            (root / path).write_text(blocks(page)[path], encoding="utf-8")

    def python(self, *arguments, **environment):
        """Whatever is set here, and wherever the package is installed, the copy's own is imported."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NTOPS_MLA_", "TRITON_"))}
        kept["PYTHONPATH"] = os.pathsep.join([str(self.root), str(self.root / "scripts")])
        return subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=self.root,
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def pytest(self, *files, **environment):
        return self.python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files, **environment)

    def commands(self, *commands):
        """(status, stdout, stderr) of each command, "program argument ..."."""
        done = self.python("-c", RUN, json.dumps([command.split() for command in commands]))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


PLATFORM_COMMANDS = (
    "ntops_mla platforms",
    "ntops_mla explain mla_decode --platform acme --json",
    "ntops_mla explain rms_norm --platform coyote --dtype float64 --json",
    "attention_test.py --help",
    "attention_test.py --acme",
    "ntops_mla compile --platform acme --op rms_norm",
)
OP_COMMANDS = (
    "ntops_mla ops --json",
    "ntops_mla explain scale_rows --platform metax --json",
    "ntops_mla explain scale_rows --device cpu --kv-lora-rank 8 --json",
    "ntops_mla compile --platform metax --op scale_rows",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What was run, by name: futures, at most two at a time."""
    platform = Copy(tmp_path_factory.mktemp("platform") / "checkout", "adding_a_platform.md")
    op = Copy(tmp_path_factory.mktemp("op") / "checkout", "adding_an_op.md")
    export(op.root, blocks("adding_an_op.md")["export"])
    about_platforms = ("test_platform.py", "test_support_table.py", "test_cli.py", "test_docs.py")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            "platform tests": pool.submit(platform.pytest, *(f"tests/{name}" for name in about_platforms)),
            "platform tiles": pool.submit(platform.pytest, "tests/test_compile.py", "-k", "acme"),
            "op commands": pool.submit(op.commands, *OP_COMMANDS),
            "op test": pool.submit(op.pytest, "tests/interpreted/test_scale_rows.py", NTOPS_MLA_INTERPRET="1"),
            "platform commands": pool.submit(platform.commands, *PLATFORM_COMMANDS),
            "style": pool.submit(style, platform, op),
        }


def export(root, line):
    """As the page says: the import, and the name in __all__."""
    path = root / "ntops_mla" / "ops" / "__init__.py"
    text, count = re.subn(r"^(__all__ = \[)", rf'{line}\n\1"scale_rows", ', path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


def style(*copies):
    """ruff's complaints about the pages' files."""
    said = ""
    for copy in copies:
        for command in (("format", "--check"), ("check",)):
            done = copy.python("-m", "ruff", *command, "--no-cache", *copy.files)
            said += (done.stdout + done.stderr) if done.returncode else ""
    return said


# --- a platform ---


def test_a_platform_is_one_file():
    assert [path for path in blocks("adding_a_platform.md")] == ["platforms/acme.py"]


def test_a_new_platform_is_listed_and_explained(runs):
    platforms, explained, float64, *_ = runs["platform commands"].result()
    assert platforms[0] == 0 and re.search(r"^acme +coyote +cuda +no ", platforms[1], re.MULTILINE), platforms
    (row,) = json.loads(explained[1])
    assert (row["platform"], row["backend"]) == ("acme", "kernel"), explained
    (row,) = json.loads(float64[1])
    assert row["backend"] == "reference" and "less than float64 promises" in row["reason"]


def test_a_new_platform_is_a_flag(runs):
    shown, refused = runs["platform commands"].result()[3:5]
    assert shown[0] == 0 and re.search(r"--acme, --coyote +run on Acme$", shown[1], re.MULTILINE), shown
    assert refused[0] == 2 and re.search(r"error: no Acme device: .", refused[2]), refused


@needs_kernels
def test_a_new_platform_is_compiled_for(runs):
    status, out, err = runs["platform commands"].result()[-1]
    assert status == 0, out + err
    assert re.search(r"^rms_norm +acme +A1 +hip:gfx90a\*", out, re.MULTILINE) and " 0 with problems" in out


def test_the_tests_about_platforms_pass_with_a_new_one(runs):
    done = runs["platform tests"].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b\d\d+ passed", done.stdout)


@needs_kernels
def test_the_tiles_of_a_new_platform_compile(runs):
    done = runs["platform tiles"].result()
    assert done.returncode == 0 and re.search(r"\b3 passed", done.stdout), done.stdout + done.stderr


# --- an op ---


def test_an_op_is_two_files_and_a_test():
    files = [path for path in blocks("adding_an_op.md") if "/" in path]
    assert files == ["kernels/scale_rows.py", "ntops_mla/ops/scale_rows.py", "tests/interpreted/test_scale_rows.py"]


@needs_kernels
def test_a_new_op_passes_its_test(runs):
    done = runs["op test"].result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b1\d passed", done.stdout), done.stdout


def test_a_new_op_is_listed_and_explained(runs):
    listed, on_metax, on_cpu = (json.loads(out) for _, out, _ in runs["op commands"].result()[:3])
    (row,) = [row for row in listed if row["name"] == "scale_rows"]
    assert row["signature"] == "scale_rows(Tensor input, Tensor scale) -> Tensor"
    assert row["doc"] == "Multiply each row by its number."
    assert {row["backends"][name] for name in ("nvidia", "moore", "metax", "iluvatar")} == {"kernel"}
    assert on_metax[0]["backend"] == "kernel" and on_cpu[0]["backend"] == "reference"
    assert "PyTorch is the implementation on a CPU" in on_cpu[0]["reason"]


@needs_kernels
def test_a_new_op_is_compiled(runs):
    status, out, err = runs["op commands"].result()[-1]
    assert status == 0, f"{status}{out}{err}"
    assert re.search(r"^scale_rows +metax +C500 +hip:gfx90a\*", out, re.MULTILINE) and " 0 with problems" in out


def test_the_examples_are_in_this_projects_style(runs):
    assert runs["style"].result() == ""
