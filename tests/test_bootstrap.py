"""scripts/bootstrap.py end to end, with tiny wheels from a local folder and made-up machines: whatever torch and Triton
a machine has, under whatever name, is the one that is imported afterwards.

A machine's Python is a virtual environment with a fake torch in its site-packages, or the real Python with a fake user
site. Only setuptools is real (repacked from the running interpreter), since the editable install needs it.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENDOR_TORCH = "2.4.0+vendor"

spec = importlib.util.spec_from_file_location("ntops_mla_bootstrap", ROOT / "scripts" / "bootstrap.py")
bootstrap = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bootstrap)


# --- fake distributions ---


def module(version):
    return f"__version__ = {version!r}\n"


def distribution_files(name, version, modules, requires=()):
    """{path: text} of an installed distribution; `modules`: {module: its source}."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    files = {f"{module}/__init__.py": source for module, source in modules.items()}
    files[f"{info}/METADATA"] = "\n".join(lines) + "\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{path},,\n" for path in files)
    return {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}


def put(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def make_wheel(folder, name, version, modules, requires=()):
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in distribution_files(name, version, modules, requires).items():
            archive.writestr(path, text)


def repack(folder, name):
    """The wheel of a distribution that is installed here."""
    distribution = importlib.metadata.distribution(name)
    files = [file for file in distribution.files if not str(file).startswith("..") and file.suffix != ".pyc"]
    (info,) = {file.parts[0] for file in files if file.parts[0].endswith(".dist-info")}
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as archive:
        record = []
        for file in files:
            if file.name in ("RECORD", "direct_url.json", "INSTALLER", "REQUESTED") and file.parts[0] == info:
                continue
            content = file.locate().read_bytes()
            archive.writestr(str(file), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{file},sha256={digest},{len(content)}\n")
        archive.writestr(f"{info}/RECORD", "".join(record) + f"{info}/RECORD,,\n")
    return f"{name}=={distribution.version}"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    requires = ["numpy-like>=1.26.4", "triton>=3.0.0", "torch>=2.4.0; extra == 'all'"]
    make_wheel(folder, "ninetoothed", "0.26.0", {"ninetoothed": module("0.26.0")}, requires)
    make_wheel(folder, "numpy-like", "2.0", {"numpy_like": module("2.0")})
    make_wheel(folder, "triton", "3.9.0", {"triton": module("3.9.0")})
    for version in ("2.3.1", "2.12.0", "2.13.0", "3.0.0"):
        make_wheel(folder, "torch", version, {"torch": module(version)})
    make_wheel(folder, "torch", "2.14.0", {"torch": module("2.14.0")}, ["triton==3.9.0"])
    make_wheel(folder, "torch", "2.15.0", {"torch": module("2.15.0")}, ["overwrites-triton"])
    make_wheel(folder, "a-test-tool", "1.0", {"a_test_tool": module("1.0")})
    make_wheel(folder, "transformers", "5.20", {"transformers": module("5.20")}, ["a-test-tool"])
    # what a package might do to a vendor's machine
    make_wheel(folder, "wants-torch", "1.0", {"wants_torch": ""}, ["torch>=2.5"])
    make_wheel(folder, "wants-triton", "1.0", {"wants_triton": ""}, ["triton>=3.5"])
    make_wheel(folder, "overwrites-triton", "1.0", {"triton": module("6.6")})
    # setuptools builds wheels by itself since 70.1
    alone = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) >= (70, 1)
    tools = ("setuptools",) if alone else ("setuptools", "wheel", "packaging")
    requirements = [repack(folder, name) for name in tools]
    (folder / "requirements.txt").write_text("\n".join([*requirements, "a-test-tool", "transformers>=5.15"]) + "\n")
    return folder


# --- a machine ---


class Machine:
    """A checkout with what the bootstrap reads, a Python to build on, and the local wheels as the only registry."""

    def __init__(self, folder, wheels):
        self.root = folder / "a checkout"  # with a space, as people have
        self.venv = self.root / ".venv"
        self.python = self.venv / "bin" / "python"
        for path in (
            "scripts/bootstrap.sh",
            "scripts/bootstrap.py",
            "setup.py",
            "pyproject.toml",
            "ntops_mla/version.py",
        ):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.root / path)
        shutil.copy(wheels / "requirements.txt", self.root / "requirements-test.txt")
        put(self.root, {"ntops_mla/__init__.py": "", "kernels/README.md": "", "platforms/a.py": ""})
        for name in ("kernels", "platforms"):
            (self.root / "ntops_mla" / name).symlink_to(f"../{name}")

        venv.create(folder / "base", with_pip=False)
        self.base = folder / "base" / "bin" / "python"
        (self.site,) = (folder / "base").glob("lib/python*/site-packages")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment.update(
            NTOPS_MLA_PYTHON=str(self.base),
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS=str(wheels),
            PIP_CONFIG_FILE=os.devnull,
            PIP_NO_COMPILE="1",
        )

    def vendor(self, *, torch=VENDOR_TORCH, triton=None):
        """Put a vendor's torch (None: none) and triton on the machine. `triton`: (distribution or None, version)."""
        if torch:
            put(self.site, distribution_files("torch", torch, {"torch": module(torch)}))
        if triton and triton[0]:
            put(self.site, distribution_files(*triton, {"triton": module(triton[1])}))
        elif triton:
            put(self.site, {"triton/__init__.py": module(triton[1])})

    def run(self, *arguments, **environment):
        return subprocess.run(
            ["bash", str(self.root / "scripts" / "bootstrap.sh"), *arguments],
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )

    def ready(self, *arguments, **environment):
        result = self.run(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        assert json.loads((self.venv / "bootstrap.json").read_text())["root"] == str(self.root)
        return result.stderr

    def resolve(self, name):
        """(file, version) of what .venv's Python really imports; None where there is no such module."""
        code = f"import {name}; print({name}.__file__); print(getattr({name}, '__version__', None))"
        result = subprocess.run(
            [str(self.python), "-c", code], cwd=self.elsewhere, env=self.environment, capture_output=True, text=True
        )
        return tuple(result.stdout.split("\n")[:2]) if result.returncode == 0 else None


@pytest.fixture
def machine(tmp_path, wheels):
    return Machine(tmp_path, wheels)


def snapshot(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- a machine with a vendor's torch ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "triton",
    [(None, "3.1.0"), ("triton", "2.1"), ("flagtree", "0.3.0")],
    ids=["no-distribution", "older", "flagtree"],
)
def test_vendor_torch_and_triton_are_kept(machine, triton):
    machine.vendor(triton=triton)
    before = snapshot(machine.site)
    said = machine.ready()
    assert f"its torch {VENDOR_TORCH}" in said
    assert machine.resolve("torch") == (str(machine.site / "torch/__init__.py"), VENDOR_TORCH)
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), triton[1])
    assert machine.resolve("ninetoothed")[1] == "0.26.0"
    assert machine.resolve("numpy_like")[1] == "2.0"
    assert machine.resolve("transformers")[1] == "5.20"
    assert machine.resolve("ntops_mla")[0] == str(machine.root / "ntops_mla/__init__.py")
    assert snapshot(machine.site) == before
    (site,) = machine.venv.glob("lib/python*/site-packages")
    assert not list(site.glob("triton*")) and not list(site.glob("torch*"))


@pytest.mark.slow
@pytest.mark.parametrize("triton", [(None, "3.1.0"), ("flagtree", "0.3.0")], ids=["no-distribution", "flagtree"])
def test_vendor_triton_without_torch_is_kept(machine, wheels, triton):
    machine.vendor(torch=None, triton=triton)
    before = snapshot(machine.site)
    # a torch that insists on another triton: refused, and the way out is named
    result = machine.run(NTOPS_MLA_TORCH="torch==2.14.0")
    assert result.returncode == 1
    assert f"beside triton {triton[1]}" in result.stderr and "NTOPS_MLA_TORCH names another" in result.stderr
    assert not (machine.venv / "bootstrap.json").exists()
    # one that brings a module `triton` under a name that pip cannot know
    result = machine.run(NTOPS_MLA_TORCH="torch==2.15.0")
    assert result.returncode == 1
    assert f"triton was {triton[1]}" in result.stderr and "is now 6.6" in result.stderr
    assert "NTOPS_MLA_TORCH names another" in result.stderr
    # one that does not care
    said = machine.ready()
    assert f"no torch, its triton {triton[1]}" in said and "beside the Triton that is there" in said
    assert machine.resolve("torch")[1] == "2.13.0"
    assert machine.resolve("torch")[0].startswith(str(machine.venv))
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), triton[1])
    assert machine.resolve("ninetoothed")[1] == "0.26.0" and machine.resolve("numpy_like")[1] == "2.0"
    assert snapshot(machine.site) == before
    assert machine.ready() == ""


@pytest.mark.slow
def test_vendor_packages_in_the_system(machine):
    """The usual case: the Python is no virtual environment itself. Its packages are stood in for by a user site."""
    user = machine.elsewhere / "user"
    code = "import site; print(site.getusersitepackages())"
    base = Path(sys.base_prefix) / "bin" / "python3"
    machine.environment.update(PYTHONUSERBASE=str(user), NTOPS_MLA_PYTHON=str(base))
    output = subprocess.run([str(base), "-c", code], env=machine.environment, capture_output=True, text=True).stdout
    machine.site = Path(output.strip())
    # a version that pip cannot read
    machine.vendor(triton=("triton", "3.0.0-vendor.2.31"))
    # raises at import, as MetaX's does where MACA_PATH is unset
    with (machine.site / "triton" / "__init__.py").open("a") as file:
        file.write("import os\nos.environ['MACA_PATH']\n")
    machine.ready()
    assert "include-system-site-packages = true" in (machine.venv / "pyvenv.cfg").read_text()
    machine.environment["MACA_PATH"] = "/somewhere"
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), "3.0.0-vendor.2.31")
    assert machine.resolve("torch") == (str(machine.site / "torch/__init__.py"), VENDOR_TORCH)
    assert machine.resolve("ninetoothed")[0].startswith(str(machine.venv))


@pytest.mark.slow
def test_nothing_may_pull_torch_or_triton(machine):
    """A package that insists on another torch or triton: pip refuses; nothing is half replaced."""
    machine.vendor(triton=("flagtree", "0.3.0"))
    requirements = machine.root / "requirements-test.txt"
    original = requirements.read_text()
    for package in ("wants-torch", "wants-triton"):
        requirements.write_text(original + package + "\n")
        result = machine.run()
        assert result.returncode == 1
        assert package in result.stderr
        assert not (machine.venv / "bootstrap.json").exists()
        assert machine.resolve("torch")[1] == VENDOR_TORCH
        assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), "0.3.0")
    # One that pip cannot see through is caught afterwards, and again, until the machine is in order.
    requirements.write_text(original + "overwrites-triton\n")
    result = machine.run()
    assert result.returncode == 1
    assert "triton was 0.3.0" in result.stderr and "is now 6.6" in result.stderr
    assert not (machine.venv / "bootstrap.json").exists()
    requirements.write_text(original)
    assert "making .venv again: triton was 0.3.0" in machine.ready()
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), "0.3.0")


def test_old_torch_is_refused(machine):
    machine.vendor(torch="2.3.1")
    result = machine.run()
    assert result.returncode == 2
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if "torch 2.3.1" in line]
    assert "2.4 or newer" in result.stderr
    assert not machine.venv.exists()


# --- a machine without torch; then what changes, and what breaks ---


@pytest.mark.slow
def test_life_of_an_environment(machine, wheels):
    """One environment through its life, since making each costs seconds."""
    said = machine.ready()
    assert "installing torch==2.13.0" in said
    assert machine.resolve("torch")[1] == "2.13.0"
    assert machine.resolve("triton")[1] == "3.9.0"
    assert machine.resolve("ninetoothed")[1] == "0.26.0"
    assert machine.resolve("ntops_mla.kernels") is not None

    # nothing to do: nothing said, nothing touched, no registry needed
    before = snapshot(machine.venv)
    start = time.monotonic()
    assert machine.ready(PIP_FIND_LINKS=os.devnull) == ""
    assert time.monotonic() - start < 5  # 0.2 s on an idle machine
    assert snapshot(machine.venv) == before

    # .venv's own Python is not taken for the machine's
    tools = tools_only(machine.elsewhere / "tools")
    activated = os.pathsep.join(map(str, (machine.venv / "bin", machine.base.parent, tools)))
    assert machine.ready(PATH=activated, NTOPS_MLA_PYTHON="") == ""

    # a change of what determines it: done again, in place, and with no registry since nothing is missing; the links,
    # which an unpacked sdist has not, are made again
    with (machine.root / "setup.py").open("a") as file:
        file.write("\n# changed\n")
    for name in ("kernels", "platforms"):
        (machine.root / "ntops_mla" / name).unlink()
    said = machine.ready(PIP_FIND_LINKS=os.devnull)
    assert ".venv is ready" in said and "making .venv" not in said
    assert machine.resolve("ntops_mla.platforms.a") is not None
    assert os.readlink(machine.root / "ntops_mla" / "platforms") == "../platforms"

    # where they cannot be made (here, something else has the name) it is said
    (machine.root / "ntops_mla" / "platforms").unlink()
    (machine.root / "ntops_mla" / "platforms").write_text("../platforms")
    result = machine.run("--again")
    assert result.returncode == 1 and "ntops_mla.platforms cannot be imported" in result.stderr
    (machine.root / "ntops_mla" / "platforms").unlink()
    machine.ready("--again")

    # half-made: the stamp absent, a part missing; and another torch is wanted
    (machine.venv / "bootstrap.json").unlink()
    (site,) = machine.venv.glob("lib/python*/site-packages")
    shutil.rmtree(site / "pip")
    said = machine.ready(NTOPS_MLA_TORCH="torch==2.12.0")
    assert "making .venv again: it has no pip" in said and "installing torch==2.12.0" in said
    assert machine.resolve("torch")[1] == "2.12.0"
    assert machine.resolve("a_test_tool")[1] == "1.0"

    # a wanted torch that cannot be
    result = machine.run(NTOPS_MLA_TORCH="torch==2.3.1")
    assert result.returncode == 2 and "torch 2.3.1" in result.stderr
    result = machine.run(NTOPS_MLA_TORCH="torch==9.9")
    assert result.returncode == 1 and "torch==9.9 could not be installed" in result.stderr

    # .venv's Python gone; and the machine gets a torch of its own: that one, and the public triton, since it has none
    machine.python.unlink()
    machine.python.symlink_to("/nowhere/python3")
    machine.vendor()
    said = machine.ready(NTOPS_MLA_TORCH="torch==2.12.0")
    assert "NTOPS_MLA_TORCH is not used" in said and "making .venv again: its Python does not run" in said
    assert machine.resolve("torch") == (str(machine.site / "torch/__init__.py"), VENDOR_TORCH)
    assert machine.resolve("triton")[1] == "3.9.0"
    assert machine.resolve("triton")[0].startswith(str(machine.venv))

    # its Python gone again, and nothing else changed: the stamp is not believed
    machine.python.unlink()
    machine.python.symlink_to("/nowhere/python3")
    assert "making .venv again: its Python does not run" in machine.ready()

    # it gets a triton too, which the public one would shadow
    machine.vendor(triton=(None, "3.1.0"))
    assert "making .venv again: triton was 3.1.0" in machine.ready()
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), "3.1.0")


@pytest.mark.slow
def test_optional_parts_may_be_missing(machine, wheels, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(wheels, fewer, ignore=shutil.ignore_patterns("ninetoothed*", "transformers*"))
    said = machine.ready(PIP_FIND_LINKS=str(fewer))
    assert "ninetoothed could not be installed" in said and "transformers could not be installed" in said
    assert machine.resolve("torch") and machine.resolve("a_test_tool")
    # said again, in one line each, but not tried again unless asked for
    said = machine.ready()
    assert len(said.splitlines()) == 2 and "--again" in said
    assert ".venv is ready" in machine.ready("--again")
    assert machine.resolve("ninetoothed") and machine.resolve("transformers")
    assert machine.ready() == ""


@pytest.mark.slow
def test_two_at_once(machine):
    command = ["bash", str(machine.root / "scripts" / "bootstrap.sh")]
    options = {"cwd": machine.elsewhere, "env": machine.environment, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("making .venv" in text for text in said) == [False, True]
    assert sum("waiting for another bootstrap" in text for text in said) == 1


# --- without a network ---

NO_INDEX = "http://127.0.0.1:9/simple"  # nobody answers there


@pytest.mark.slow
def test_offline(machine, wheels, tmp_path):
    """What --carry lists is fetched by its own commands, and is enough; without a part of it, the part is named."""
    registry, carried = tmp_path / "registry", tmp_path / "carried"
    shutil.copytree(wheels, registry)
    requires = [*bootstrap.NINETOOTHED_REQUIRES, "triton>=3.0.0"]
    make_wheel(registry, "ninetoothed", "0.27.0", {"ninetoothed": module("0.27.0")}, requires)
    make_wheel(registry, "numpy", "2.1", {"numpy": module("2.1")})
    make_wheel(registry, "sympy", "1.13.0", {"sympy": module("1.13.0")}, ["a-test-tool"])
    machine.vendor(triton=("flagtree", "0.3.0"))
    before = snapshot(machine.site)
    listed = machine.run("--carry")
    assert listed.returncode == 0 and not listed.stderr and not machine.venv.exists()
    (tmp_path / "carry.txt").write_text(listed.stdout)
    commands = re.findall(r"^#   python (-m pip download .*)", listed.stdout, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = [{"DIR": "carried"}.get(word, word) for word in command.split()]
        environment = {**machine.environment, "PIP_FIND_LINKS": str(registry)}
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, check=True)
    names = {path.name.split("-")[0] for path in carried.iterdir()}
    assert names >= {"ninetoothed", "numpy", "sympy", "transformers", "a_test_tool"}
    assert not names & {"torch", "triton"}

    # Whatever else is set: from the folder alone. There is an index that has what will be missing.
    (wheel,) = wheels.glob("a_test_tool*")
    put(tmp_path, {"simple/a-test-tool/index.html": f'<a href="{wheel.as_uri()}">{wheel.name}</a>'})
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nindex-url = {NO_INDEX}\nfind-links = {NO_INDEX}\n")
    del machine.environment["PIP_NO_INDEX"], machine.environment["PIP_FIND_LINKS"]
    reachable = (tmp_path / "simple").as_uri()
    machine.environment.update(PIP_INDEX_URL=NO_INDEX, PIP_EXTRA_INDEX_URL=reachable, PIP_CONFIG_FILE=str(settings))
    machine.environment["PIP_RETRIES"] = "0"
    lacking = machine.elsewhere / "on a stick"  # with a space, as people have
    shutil.copytree(carried, lacking, ignore=shutil.ignore_patterns("a_test_tool*", "transformers*"))
    result = machine.run("--offline", "on a stick")
    assert result.returncode == 1, result.stderr
    assert f"{lacking} holds no wheel of a-test-tool, transformers>=5.15; `bash scripts/" in result.stderr
    assert f"{lacking} holds no wheel of a-test-tool that fits python3." in result.stderr
    assert "127.0.0.1" not in result.stderr
    assert not (machine.venv / "bootstrap.json").exists()

    said = machine.ready("--offline", str(carried))
    assert "beside the Triton that is there" in said and "could not be installed" not in said
    assert machine.resolve("triton") == (str(machine.site / "triton/__init__.py"), "0.3.0")
    assert machine.resolve("torch") == (str(machine.site / "torch/__init__.py"), VENDOR_TORCH)
    assert [machine.resolve(name)[1] for name in ("ninetoothed", "transformers")] == ["0.27.0", "5.20"]
    assert snapshot(machine.site) == before

    # The two commands of a checkout find it ready.
    for name in ("attention_test.sh", "test.sh"):
        shutil.copy(ROOT / "scripts" / name, machine.root / "scripts" / name)
    report = "import ninetoothed, sys; print(*sys.argv[1:], ninetoothed.__version__)\n"
    put(machine.root, {"scripts/attention_test.py": report})
    put(next(machine.venv.glob("lib/python*/site-packages")), {"pytest.py": report})
    for name, argument in (("attention_test.sh", "--cpu"), ("test.sh", "tests")):
        command = ["bash", str(machine.root / "scripts" / name), argument]
        done = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{argument} 0.27.0\n", "")


def test_what_to_carry(machine):
    """A machine without anything needs it all, a vendor's no torch, no triton, and nothing that would want numpy 2."""

    def lines(**environment):
        listed = machine.run("--carry", **environment)
        assert listed.returncode == 0, listed.stderr
        return [line for line in listed.stdout.splitlines() if not line.startswith("#")]

    tests = (machine.root / "requirements-test.txt").read_text().split()
    assert lines() == ["torch==2.13.0", "ninetoothed", *tests]
    assert lines(NTOPS_MLA_TORCH="torch==2.12.0")[0] == "torch==2.12.0"
    machine.vendor()
    assert lines() == ["ninetoothed", *tests]
    machine.vendor(triton=(None, "3.1.0"))
    put(machine.site, distribution_files("numpy", "1.26.4", {"numpy": module("1.26.4")}))
    assert lines() == [*bootstrap.NINETOOTHED_REQUIRES, *tests, "numpy<2"]
    assert not machine.venv.exists()


def test_ninetoothed_requires_what_is_carried():
    pytest.importorskip("ninetoothed")
    requires = importlib.metadata.requires("ninetoothed")
    assert bootstrap.besides_triton(requires) == list(bootstrap.NINETOOTHED_REQUIRES)


@pytest.mark.parametrize(
    ("libc", "system", "tags"),
    [
        (("glibc", "2.18"), "linux-x86_64", ["manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_18_x86_64"]),
        (("glibc", "2.17"), "linux-aarch64", ["manylinux2014_aarch64", "manylinux_2_17_aarch64"]),
        (("", ""), "linux-x86_64", ["linux_x86_64"]),
        (("", ""), "macosx-14.0-arm64", ["macosx_14_0_arm64"]),
    ],
)
def test_platform_tags(monkeypatch, libc, system, tags):
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(bootstrap.sysconfig, "get_platform", lambda: system)
    assert bootstrap.platform_tags() == tags


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--offline", "nowhere"), "--offline nowhere: there is no such folder"),
        (("--offline", "."), "--offline .: there is no wheel in it; `bash scripts/bootstrap.sh --carry`"),
        (("--offline", ".", "--carry"), "not allowed with"),
    ],
)
def test_an_offline_folder_that_cannot_be(machine, arguments, said):
    result = machine.run(*arguments)
    assert result.returncode == 2 and said in result.stderr.splitlines()[-1]
    assert not machine.venv.exists()


# --- which Python ---


def tools_only(folder):
    """A folder for PATH with what bootstrap.sh needs, and no Python."""
    folder.mkdir()
    for tool in ("bash", "dirname", "sh"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def fake_python(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_python_with_torch_is_preferred(tmp_path, monkeypatch):
    """The first one with torch, even behind others; one that does not run is passed over."""
    answers = {}
    for name, torch in {"python3": None, "python": None, "python3.12": "2.6.0", "python3.11": "2.9.0"}.items():
        found = {"file": f"/{name}/torch/__init__.py", "version": torch} if torch else None
        answers[name] = {
            "executable": name,
            "version": [3, 11, 0],
            "prefix": f"/{name}",
            "modules": {"torch": found, "triton": None, "numpy": None},
        }
    answers["python3"]["version"] = [3, 9, 1]
    bin_folder = tmp_path / "bin"
    for name, answer in answers.items():
        fake_python(bin_folder, name, f"echo '{json.dumps(answer)}'")
    fake_python(bin_folder, "python3.13", "echo no such version >&2; exit 127")
    monkeypatch.setenv("PATH", str(bin_folder))
    monkeypatch.delenv("NTOPS_MLA_PYTHON", raising=False)
    assert bootstrap.choose()["executable"] == "python3.12"
    # one that is too old is passed over where another is not, and said to be too old where it is the only one
    answers["python3.12"]["modules"]["torch"]["version"] = "2.3.1"
    fake_python(bin_folder, "python3.12", f"echo '{json.dumps(answers['python3.12'])}'")
    assert bootstrap.choose()["executable"] == "python3.11"
    (bin_folder / "python3.11").rename(bin_folder / "hidden")
    with pytest.raises(bootstrap.Stop, match=r"torch 2\.3\.1 of python3\.12 is too old"):
        bootstrap.choose()
    (bin_folder / "hidden").rename(bin_folder / "python3.11")
    for name in ("python3.12", "python3.11"):
        (bin_folder / name).unlink()
    assert bootstrap.choose()["executable"] == "python"
    (bin_folder / "python").unlink()
    with pytest.raises(bootstrap.Stop, match=r"no usable Python 3\.10"):
        bootstrap.choose()
    # named, but too old: no other one is taken
    monkeypatch.setenv("NTOPS_MLA_PYTHON", str(bin_folder / "python3"))
    with pytest.raises(bootstrap.Stop, match=r"NTOPS_MLA_PYTHON=.*python3 is not a usable"):
        bootstrap.choose()


@pytest.mark.parametrize("named", [True, False])
def test_no_new_enough_python_is_one_clear_line(machine, tmp_path, named):
    old = tools_only(tmp_path / "old")
    script = 'case "$*" in *version_info*) exit 1;; esac; echo should not run >&2; exit 9'
    for name in bootstrap.PYTHONS:
        fake_python(old, name, script)
    machine.environment["PATH"] = str(old)
    result = machine.run(NTOPS_MLA_PYTHON=str(old / "python3") if named else "")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "Python 3.10 or newer" in result.stderr
    assert ("NTOPS_MLA_PYTHON=" in result.stderr) == named


def test_no_venv_module_is_one_clear_line(machine, tmp_path):
    """Debian's python3 without python3-venv."""
    script = f'case "$*" in *ensurepip*) exit 1;; esac; exec "{machine.base}" "$@"'
    real = machine.root / "scripts" / "bootstrap.py"
    real.write_text(real.read_text().replace('"executable": sys.executable', '"executable": os.environ["SHOWN"]'))
    python = fake_python(tmp_path / "debian", "python3", script)
    result = machine.run(NTOPS_MLA_PYTHON=str(python), SHOWN=str(python))
    assert result.returncode == 2
    assert "apt install python3-venv" in result.stderr.splitlines()[-1]
    assert not machine.venv.exists()


# --- small parts ---


def test_besides_triton():
    requires = [
        "numpy>=1.26.4",
        "sympy (>=1.13.0)",
        "triton>=3.0.0",
        "Triton ; python_version < '3.11'",
        "torch>=2.4.0; extra == 'all'",
        "matplotlib>=3.9.0; (sys_platform == 'linux') and extra == 'all'",
        "torch",
        "torch-like-name; python_version >= '3.10'",
    ]
    expected = ["numpy>=1.26.4", "sympy (>=1.13.0)", "torch-like-name; python_version >= '3.10'"]
    assert bootstrap.besides_triton(requires) == expected


def test_constraints():
    def answer(torch, triton, numpy="2.1"):
        modules = {"torch": {"file": "t", "version": "x"}, "triton": {"file": "t", "version": "x"} if triton else None}
        modules["numpy"] = {"file": "n", "version": numpy}
        return {"modules": modules, "providers": {"torch": torch, "triton": triton or {}}}

    make = bootstrap.constraints
    assert make(answer({"torch": "2.4.0+maca.2"}, None), True) == ["torch==2.4.0+maca.2"]
    assert make(answer({"torch": "2.4.0"}, {"triton": "2.1"}), True) == ["torch==2.4.0", "triton==2.1"]
    pinned = ["vendor-torch==2.4.0", "torch<0", "flagtree==0.3.0", "triton<0"]
    assert make(answer({"vendor-torch": "2.4.0"}, {"flagtree": "0.3.0"}), True) == pinned
    assert make(answer({"torch": "2.4.0-x"}, {"triton": "3.0.0-vendor.1"}), True) == ["torch<0", "triton<0"]
    assert make(answer({"torch": "2.4.0"}, None, numpy="1.26.4"), True) == ["torch==2.4.0", "numpy<2"]
    assert make(answer({"torch": "2.4.0"}, None, numpy="1.26.4"), False) == ["torch==2.4.0"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("__version__ = '2.4.0+vendor'\n", "2.4.0+vendor"),
        ('from typing import Optional\n\n__version__: str = "2.6.0"\n', "2.6.0"),
        ('version = "1.26.4"\n__version__ = version\n', "1.26.4"),
        ("__version__ = something()\n", None),
        ("minimum__version__ = '1'\n", None),
    ],
)
def test_version_is_read_without_import(tmp_path, text, version):
    (tmp_path / "version.py").write_text(text)
    assert bootstrap.version_of("a-name-nobody-has", tmp_path / "__init__.py") == version


@pytest.mark.parametrize("version", ["2.3.1", "1.13.1+cu117", "2.3.0a0+git"])
def test_too_old(version):
    with pytest.raises(bootstrap.Stop, match="too old"):
        bootstrap.check_torch({"executable": "python3", "modules": {"torch": {"version": version}}})


@pytest.mark.parametrize("version", ["2.4.0", "2.13.0+cpu", "3.0", "2.10.0a0", None])
def test_new_enough(version):
    bootstrap.check_torch({"executable": "python3", "modules": {"torch": {"version": version}}})


def test_bootstrap_is_standard_library_only():
    source = (ROOT / "scripts" / "bootstrap.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.strip().startswith("import ")}
    assert imported and imported <= set(sys.stdlib_module_names)
