"""Every way to install a copy of the repository: `ntops_mla.kernels` and `ntops_mla.platforms` are there, and the two
folders at the root, which they come from, shadow nobody's `kernels`."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ntops_mla

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = sorted(path.stem for path in (ROOT / "platforms").glob("*.py"))
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
# Of the running interpreter: torch and setuptools come from here. Given as plain path entries, whose .pth files are not
# read, so an editable install of the repository itself stays out of sight.
SITE = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]

REPORT = """
import importlib.util, inspect, json, pkgutil
import ntops_mla, ntops_mla.kernels, ntops_mla.platforms
names = sorted(module.name for module in pkgutil.iter_modules(ntops_mla.platforms.__path__))
module = importlib.import_module("ntops_mla.platforms.nvidia")
kernels = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": ntops_mla.__file__,
    "platform": module.__file__,
    "platforms": names,
    "kernels": sorted(module.name for module in pkgutil.iter_modules(ntops_mla.kernels.__path__)),
    "source": inspect.getsource(module),
    "version": __import__("ntops_mla.version").version.__version__,
    "top_level": None if kernels is None else str(kernels.origin),
}))
"""

# A stand-in for Hugging Face's package: `import kernels` must still mean it.
FOREIGN = "kernels/__init__.py"


def run(*command, cwd, path=()):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.update(PYTHONPATH=os.pathsep.join(map(str, path)), PIP_NO_INDEX="1", PIP_USER="0")
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def backend(function, source, target):
    """Call a build hook the way pip and build do."""
    target.mkdir(parents=True)
    code = f"from setuptools import build_meta; build_meta.{function}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (result,) = target.iterdir()
    return result


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Makes copies of the repository, each fresh: builds leave things behind that could hide a fault."""

    def make():
        target = tmp_path_factory.mktemp("copy") / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
        return shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)

    return make


@pytest.fixture(scope="module")
def sdist(copy, tmp_path_factory):
    return backend("build_sdist", copy(), tmp_path_factory.mktemp("sdist") / "out")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    source = unpacked(sdist, tmp_path_factory.mktemp("unpacked"))
    return backend("build_wheel", source, tmp_path_factory.mktemp("wheel") / "out")


def unpacked(sdist, folder):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (source,) = folder.iterdir()
    return source


@pytest.fixture
def environment(tmp_path):
    """A throw-away virtual environment that sees the running interpreter's packages."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "running_interpreter.pth").write_text("".join(f"{path}\n" for path in SITE))
    return python


def check(report, place, top_level=None):
    report = json.loads(report.splitlines()[-1])
    assert Path(report["package"]).is_relative_to(place)
    assert Path(report["platform"]).resolve().is_relative_to(Path(place).resolve())
    assert report["platforms"] == PLATFORMS
    assert report["kernels"] == KERNELS
    assert report["source"] == (ROOT / "platforms" / "nvidia.py").read_text()
    assert f'__version__ = "{report["version"]}"' in (ROOT / "ntops_mla" / "version.py").read_text()
    assert report["top_level"] == top_level


def test_there_are_platforms():
    assert {"cpu", "nvidia", "moore", "metax", "iluvatar"} <= set(PLATFORMS)


def test_no_init_in_the_two_folders():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "platforms" / "__init__.py").exists()


def test_symlinks_are_relative():
    for name in ("kernels", "platforms"):
        assert os.readlink(ROOT / "ntops_mla" / name) == f"../{name}"


def test_sdist_holds_each_file_once(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"platforms/{name}.py" for name in PLATFORMS} | {"kernels/README.md", "requirements-test.txt"} <= names
    assert {".ci/run", "benchmarks/dispatch_overhead.py", "scripts/bootstrap.py"} <= names
    assert not [name for name in names if name.startswith(("ntops_mla/kernels", "ntops_mla/platforms"))]


def test_wheel_from_sdist(wheel, tmp_path):
    target = tmp_path / "installed"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ntops_mla"}
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    check(run(sys.executable, "-c", REPORT, cwd=tmp_path, path=[target, *SITE]), target, foreign_kernels())


def test_plain_install(copy, tmp_path):
    target = tmp_path / "installed"
    options = ("-q", "--no-deps", "--no-build-isolation", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, copy(), cwd=tmp_path)
    check(run(sys.executable, "-c", REPORT, cwd=tmp_path, path=[target, *SITE]), target, foreign_kernels())


def test_editable_install_of_an_unpacked_sdist(sdist, environment, tmp_path):
    """It holds no links, so that each file is there once; then it is a checkout like any other."""
    source = unpacked(sdist, tmp_path / "unpacked")
    options = ("-q", "--no-deps", "--no-build-isolation", "-e", source)
    run(environment, "-m", "pip", "install", *options, cwd=tmp_path)
    check(run(environment, "-c", REPORT, cwd=tmp_path), source, foreign_kernels())
    check(run(sys.executable, "-c", REPORT, cwd=tmp_path, path=[source, *SITE]), source, foreign_kernels() or "None")
    assert os.readlink(source / "ntops_mla" / "kernels") == "../kernels"


@pytest.mark.parametrize("mode", ["default", "compat", "strict"])
def test_editable_install(mode, copy, environment, tmp_path):
    source = copy()
    options = ["-q", "--no-deps", "--no-build-isolation"]
    if mode != "default":
        if "--config-settings" not in run(environment, "-m", "pip", "install", "--help", cwd=tmp_path):
            pytest.skip("this pip has no --config-settings")
        options += ["--config-settings", f"editable_mode={mode}"]
    run(environment, "-m", "pip", "install", *options, "-e", source, cwd=tmp_path)

    # compat puts the whole root on sys.path, so there `kernels` is a folder without __init__.py: a namespace, which
    # any real package of that name, wherever on the path, comes before.
    expected = foreign_kernels() or ("None" if mode == "compat" else None)
    check(run(environment, "-c", REPORT, cwd=tmp_path), source, expected)
    late = tmp_path / "late"
    (late / FOREIGN).parent.mkdir(parents=True)
    (late / FOREIGN).write_text("")
    code = f"import sys; sys.path.append({str(late)!r}); import kernels; print(kernels.__file__)"
    expected = foreign_kernels() or str(late / FOREIGN)
    assert run(environment, "-c", code, cwd=tmp_path).strip() == expected


def foreign_kernels():
    """Hugging Face's `kernels` may really be there; then every install must leave it in place."""
    places = (Path(path) / FOREIGN for path in SITE)
    return next((str(place) for place in places if place.exists()), None)


def test_importable_from_a_checkout(copy, tmp_path):
    source = copy()
    check(run(sys.executable, "-c", REPORT, cwd=tmp_path, path=[source, *SITE]), source, foreign_kernels() or "None")


def test_folder_without_python_files_is_installed(copy, tmp_path):
    source = copy()
    for path in (source / "kernels").glob("*.py"):
        path.unlink()
    wheel = backend("build_wheel", source, tmp_path / "wheel")
    assert "ntops_mla/kernels/README.md" in zipfile.ZipFile(wheel).namelist()


def test_install_requires_nothing(wheel):
    """A plain install must not touch a vendor's torch or Triton."""
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    required = re.findall(r"^Requires-Dist: (.*)$", zipfile.ZipFile(wheel).read(name).decode(), re.MULTILINE)
    assert required
    assert [requirement for requirement in required if "extra ==" not in requirement] == []


def test_entry_point_for_ntops(wheel):
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/entry_points.txt")]
    text = zipfile.ZipFile(wheel).read(name).decode()
    found = re.fullmatch(r"\[ntops\.plugins\]\nntops_mla = (\S+)\s*", text)
    assert found, text
    point = importlib.metadata.EntryPoint("ntops_mla", found[1], "ntops.plugins")
    assert point.load() is ntops_mla.integrations.ntops.plugin


def test_test_requirements_pull_neither_torch_nor_triton():
    """Follows the installed distributions' own requirements."""
    lines = (ROOT / "requirements-test.txt").read_text().splitlines()
    todo = [name_of(line) for line in lines if line and not line.startswith("#")] + ["safetensors"]
    assert "pytest" in todo
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another Python or system, or optional and left out
            continue
        todo += [name_of(line) for line in requires if not re.search(r";.*\bextra\b", line)]
    assert len(seen) > 10
    assert not seen & {"torch", "triton", "flagtree", "ninetoothed"}


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()
