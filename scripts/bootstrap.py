"""Make `.venv` in the repository's root ready for the scripts and the tests. Standard library only.

The rule behind everything here: a torch or Triton that the machine's Python already has is the vendor's. It is used,
and never replaced, upgraded or shadowed, whatever its distribution is called and also where only one of the two is
there. So `.venv` is then made with that Python's packages visible, every pip call is constrained to what was found,
ninetoothed (which requires the public Triton) goes in without its requirements, and afterwards torch and triton must
resolve to the same file and version as before.

Run by bootstrap.sh. `--check` only says, by its exit status, whether there is anything to do. `--offline DIR` takes
everything from the wheels in DIR and asks no index; `--carry` lists what DIR has to hold for this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "bootstrap.json"

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)
# A fixed release: plain `torch` is whatever is newest on the day.
TORCH = "torch==2.13.0"
PYTHONS = ("python3", "python", "python3.13", "python3.12", "python3.11", "python3.10")
# Where these cannot be installed the run goes on, with this much less.
OPTIONAL = {
    "ninetoothed": "the kernels cannot be built; the PyTorch fallback runs",
    "transformers": "its comparisons are left out",
}
# What ninetoothed requires beside triton: for --carry, on machines where no ninetoothed is there to say it.
NINETOOTHED_REQUIRES = ("numpy>=1.26.4", "sympy>=1.13.0")


VERSION_LINE = re.compile(r"""^(?:__)?version(?:__)?\s*(?::[^=\n]*)?=\s*["']([^"']+)""", re.MULTILINE)
# pip reads only versions of the standard form
STANDARD_VERSION = re.compile(
    r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9]+([._-][A-Za-z0-9]+)*)?"
)
# Folders at the root that the package has as subpackages, through links.
LINKED = ("kernels", "platforms")
# Settings that would send packages elsewhere, or upgrade what is there. A user's own PIP_CONSTRAINT stays in force.
UNWANTED_SETTINGS = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_PYTHON",
    "PIP_UPGRADE",
    "PIP_FORCE_REINSTALL",
    "PIP_NO_DEPS",
)
CARRY = "`bash scripts/bootstrap.sh --carry` lists what this machine needs"


class Stop(Exception):
    """Ends the bootstrap with one clear message. Status 2: this machine has to change; 1: a step failed."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def say(message):
    print(f"ntops_mla: {message}", file=sys.stderr, flush=True)


# --- what a Python has: these run inside the Python that is asked, and import nothing of what they look for ---


def found(name):
    """Where `import name` would come from, and its version; None where there is none. MetaX's triton raises at import
    without MACA_PATH, and a vendor's torch is slow to import, so neither is imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.has_location:  # a folder without __init__.py is no package that counts
        return None
    return {"file": os.path.realpath(spec.origin), "version": version_of(name, Path(spec.origin))}


def version_of(name, origin):
    for path in (origin.with_name("version.py"), origin):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            match = VERSION_LINE.search(path.read_text(encoding="utf-8"))
            if match:
                return match[1]
    import importlib.metadata

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def providers(name):
    """The distributions that hold the module `name`, whatever they are called, as {distribution: version}."""
    import importlib.metadata

    result = {}
    for distribution in importlib.metadata.distributions():
        label = distribution.metadata["Name"]
        record = distribution.read_text("RECORD") or ""
        top = (distribution.read_text("top_level.txt") or "").split()
        if label and (name in (canonical(label), *top) or re.search(rf"^{name}/__init__\.py,", record, re.MULTILINE)):
            result.setdefault(canonical(label), distribution.version)
    return result


def platform_modules():
    """The modules in `ntops_mla.platforms`, imported as any program would, but without running ntops_mla's own
    __init__.py, which imports torch. Empty where it cannot be imported."""
    import pkgutil

    spec = importlib.util.find_spec("ntops_mla")
    if spec is None:
        return []
    sys.modules["ntops_mla"] = importlib.util.module_from_spec(spec)
    try:
        package = importlib.import_module("ntops_mla.platforms")
        return sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    except ImportError:
        return []
    finally:
        sys.modules.pop("ntops_mla.platforms", None)
        del sys.modules["ntops_mla"]


def probe(full=False):
    modules = {name: found(name) for name in ("torch", "triton", "numpy")}
    result = {
        "executable": sys.executable,
        "version": list(sys.version_info[:3]),
        "prefix": os.path.realpath(sys.prefix),
        "base_prefix": os.path.realpath(sys.base_prefix),
        "modules": modules,
    }
    if full:
        import importlib.metadata

        result["providers"] = {name: providers(name) for name in ("torch", "triton")}
        result["package"] = found("ntops_mla")
        result["platforms"] = platform_modules()
        result["site"] = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        result["pip"] = found("pip") is not None
        names = (distribution.metadata["Name"] for distribution in importlib.metadata.distributions())
        result["distributions"] = sorted({canonical(name) for name in names if name})
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result["ninetoothed"] = importlib.metadata.requires("ninetoothed") or []
    return result


def ask(*pythons, full=False):
    """Probe several Pythons at once; None for one that does not run."""
    command = [str(Path(__file__).resolve()), "--probe-full" if full else "--probe"]
    running = []
    for python in pythons:
        try:
            running.append(subprocess.Popen([python, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        except OSError:
            running.append(None)
    answers = []
    for process in running:
        output = process.communicate()[0] if process else b""
        try:
            # the last line: a vendor's start-up hook may print something first
            answers.append(json.loads(output.splitlines()[-1]) if process and process.returncode == 0 else None)
        except (ValueError, IndexError):
            answers.append(None)
    return answers


# --- which Python ---


def candidates():
    # With .venv activated, `python3` is .venv's own: it cannot be made from itself.
    search = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(entry for entry in search if not Path(entry).resolve().is_relative_to(VENV.resolve()))
    names = [os.environ["NTOPS_MLA_PYTHON"]] if os.environ.get("NTOPS_MLA_PYTHON") else PYTHONS
    paths = (shutil.which(os.path.expanduser(name), path=path) for name in names)
    return list(dict.fromkeys(os.path.abspath(path) for path in paths if path))


def choose():
    """The first Python whose torch is new enough, else the first that has torch, else the first."""
    usable = [
        answer
        for answer in ask(*candidates())
        if answer and tuple(answer["version"]) >= OLDEST_PYTHON and answer["prefix"] != os.path.realpath(VENV)
    ]
    if not usable:
        named = os.environ.get("NTOPS_MLA_PYTHON")
        which = f"NTOPS_MLA_PYTHON={named} is not a" if named else "PATH has no"
        raise Stop(f"{which} usable Python {dotted(OLDEST_PYTHON)} or newer outside .venv")
    with_torch = [answer for answer in usable if answer["modules"]["torch"]]
    new_enough = [answer for answer in with_torch if not torch_is_too_old(answer)]
    base = [*new_enough, *with_torch, *usable][0]
    check_torch(base)
    return base


def torch_is_too_old(answer):
    """A version that cannot be read counts as new enough."""
    torch = answer["modules"]["torch"]
    match = re.match(r"(\d+)\.(\d+)", torch["version"] or "") if torch else None
    return bool(match) and (int(match[1]), int(match[2])) < OLDEST_TORCH


def check_torch(answer):
    if torch_is_too_old(answer):
        torch = answer["modules"]["torch"]
        raise Stop(
            f"torch {torch['version']} of {answer['executable']} is too old: {dotted(OLDEST_TORCH)} or newer is needed"
            " (NTOPS_MLA_PYTHON names another Python)"
        )


# --- the stamp ---


def wanted_torch(base):
    """What is to be installed; None where the machine has a torch."""
    return None if base["modules"]["torch"] else os.environ.get("NTOPS_MLA_TORCH") or TORCH


def key(base):
    """Everything that determines .venv. The place counts, since a moved .venv is broken; whether the Python was called
    python or python3 does not."""
    digest = hashlib.sha256()
    for name in ("scripts/bootstrap.sh", "scripts/bootstrap.py", "setup.py", "requirements-test.txt"):
        digest.update((ROOT / name).read_bytes())
    digest.update((ROOT / "ntops_mla" / "version.py").read_bytes())
    modules = {name: base["modules"][name] for name in ("torch", "triton")}
    about = [str(ROOT), base["prefix"], base["version"], modules, wanted_torch(base)]
    digest.update(json.dumps(about).encode())
    return digest.hexdigest()


def read_stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(content):
    # Renamed into place, as the last act: a stamp that is there is whole and true.
    handle, name = tempfile.mkstemp(dir=VENV)
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    os.replace(name, STAMP)


def ready(base):
    stamp = read_stamp()
    if stamp.get("key") != key(base):
        return False
    for name, reason in stamp["missing"].items():
        say(f"{name} could not be installed: {reason} (bash scripts/bootstrap.sh --again tries again)")
    return True


@contextlib.contextmanager
def lock():
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(ROOT / ".venv.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another bootstrap of this folder")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- .venv itself ---


def venv_python():
    return str(VENV / "bin" / "python")


def venv_problem(base, answer):
    """Why the .venv that is there cannot be used, or None. `answer`: what its Python says of itself."""
    if not VENV.is_dir():
        return "there is none"
    if answer is None:
        return "its Python does not run"
    if answer["prefix"] != os.path.realpath(VENV):
        return "it is no virtual environment"
    if not answer["pip"]:
        return "it has no pip"
    if (answer["base_prefix"], answer["version"]) != (base["base_prefix"], base["version"]):
        return "it was made from another Python"
    stamp = read_stamp()
    if stamp and (stamp.get("root"), stamp.get("torch")) != (str(ROOT), wanted_torch(base)):
        return "the folder was moved, or another torch is wanted"
    return torch_problem(base, answer)


def torch_problem(base, answer):
    """What of the machine's torch or triton is not what `answer`'s Python would import."""
    if not base["modules"]["torch"]:
        # ours, then: visible system packages, or the torch of a moved machine, would be somebody else's
        torch = answer["modules"]["torch"]
        if torch and not torch["file"].startswith(os.path.realpath(VENV) + os.sep):
            return f"its torch is {torch['file']}"
    return difference(base["modules"], answer["modules"])


def difference(before, after):
    for name in ("torch", "triton"):
        old, new = before[name], after[name]
        if old and old != new:
            there = f"{new['version']} ({new['file']})" if new else "not to be found"
            return f"{name} was {old['version']} ({old['file']}) and is now {there}"
    return None


def make_venv(base):
    python = base["executable"]
    if subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode:
        short = dotted(base["version"][:2])
        raise Stop(
            f"{python} has no venv module: install it (on Debian and Ubuntu: apt install python3-venv, or"
            f" python{short}-venv), or name another Python with NTOPS_MLA_PYTHON"
        )
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    # Either one is enough: with only a triton there, the public one must not come before it.
    keep = base["modules"]["torch"] or base["modules"]["triton"]
    itself_virtual = base["prefix"] != base["base_prefix"]
    command = [python, "-m", "venv", *(["--system-site-packages"] if keep and not itself_virtual else []), str(VENV)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Stop(f"making .venv failed:\n{tail(result.stdout + result.stderr)}")
    answer = ask(venv_python(), full=True)[0]
    if answer and keep and itself_virtual:
        # venv would look through it to the Python below, which has not its packages and may have others.
        show_parent(base, answer)
        answer = ask(venv_python(), full=True)[0]
    problem = venv_problem(base, answer)
    if problem:
        raise Stop(f"a fresh .venv cannot be used: {problem}")
    return answer


def show_parent(base, answer):
    site = next(path for path in answer["site"] if os.path.realpath(path).startswith(os.path.realpath(VENV)))
    parent = ask(base["executable"], full=True)[0]
    # zz: after everything of .venv's own. addsitedir: the parent's own .pth files count as well.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in parent["site"]]
    Path(site, "zz_parent_environment.pth").write_text("".join(lines))


# --- pip ---


class PipFailed(Exception):
    pass


wheels = None  # the folder that everything comes from, after `use_only`


def use_only(folder):
    """From here on pip takes what `folder` holds and asks no index, whatever the environment or pip's own files say."""
    global wheels
    wheels = Path(folder).resolve()
    if not wheels.is_dir():
        raise Stop(f"--offline {folder}: there is no such folder")
    if not any(wheels.glob("*.whl")):
        raise Stop(f"--offline {folder}: there is no wheel in it; {CARRY}")


def from_where():
    """pip's settings of where packages come from."""
    # The environment goes before pip's own files. An address, because pip splits a path at its spaces.
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri()} if wheels else {}


def pip(*arguments):
    """One quiet `pip install` into .venv; what it printed is shown only where it fails. The one place through which
    everything is installed: where packages may come from is decided here and nowhere else."""
    command = [venv_python(), "-m", "pip", "install", "--quiet", "--no-warn-conflicts", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED_SETTINGS}
    environment.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **from_where())
    # `-m` puts the current folder on sys.path: .venv holds nothing that could be imported by mistake
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=VENV)
    if result.returncode:
        raise PipFailed(tail(result.stdout + result.stderr) + to_carry(result.stderr))


def to_carry(said):
    """The wheels that pip did not find in the offline folder, out of what it said, as lines of their own."""
    if not wheels:
        return ""
    python = next(VENV.glob("lib/python*")).name  # not this one, which may be another
    missing = dict.fromkeys(re.findall(r"No matching distribution found for (\S.*)", said))
    where = f"that fits {python} on {sysconfig.get_platform()}"
    return "".join(f"\n    {wheels} holds no wheel of {line} {where}; {CARRY}" for line in missing)


def constraints(answer, keep_numpy, names=("torch", "triton")):
    """pip constraints that hold what is there of `names`. A module that no distribution of its name provides (a bare
    folder, or `flagtree`) cannot be pinned; then a distribution of that name must not come in at all, and no release
    is < 0."""
    lines = []
    for name in names:
        if not answer["modules"][name]:
            continue
        owners = answer["providers"][name]
        pinned = {owner: version for owner, version in owners.items() if STANDARD_VERSION.fullmatch(version)}
        lines += [f"{owner}=={version}" for owner, version in pinned.items()]
        lines += [f"{owner}<0" for owner in dict.fromkeys((*owners, name)) if owner not in pinned]
    numpy = answer["modules"]["numpy"]
    if keep_numpy and numpy and (numpy["version"] or "").startswith("1."):
        lines.append("numpy<2")  # a torch built for numpy 1 cannot exchange arrays with numpy 2
    return lines


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement):
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", requirement)
    return canonical(match[1]) if match else ""


def besides_triton(requires):
    """A distribution's requirements without extras, torch and triton."""
    return [
        requirement
        for requirement in requires
        if not re.search(r";.*\bextra\b", requirement) and name_of(requirement) not in ("torch", "triton")
    ]


def test_requirements():
    lines = (line.strip() for line in (ROOT / "requirements-test.txt").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def carried(base):
    """(requirements, those of them to be fetched without what they require): all that .venv is made of, without what
    the machine has. With a triton there, ninetoothed may not bring another one."""
    torch = wanted_torch(base)
    numpy = base["modules"]["numpy"]
    old_numpy = numpy and (numpy["version"] or "").startswith("1.") and not torch
    lines = [torch] if torch else []
    lines += NINETOOTHED_REQUIRES if base["modules"]["triton"] else ["ninetoothed"]
    lines += test_requirements()
    # What is fetched for the others should go with the machine's numpy, which is kept at its first part.
    lines += ["numpy<2"] if old_numpy else []
    return lines, ["ninetoothed"] if base["modules"]["triton"] else []


def platform_tags():
    """The tags of wheels for this system, for `pip download --platform`, which expands none of them."""
    system, _, machine = re.sub(r"[^a-z0-9_]", "_", sysconfig.get_platform().lower()).partition("_")
    libc, version = platform.libc_ver()
    if system != "linux" or libc != "glibc":
        return [f"{system}_{machine}"]
    newest = int(version.split(".")[1])
    return [f"manylinux2014_{machine}", *(f"manylinux_2_{minor}_{machine}" for minor in range(17, newest + 1))]


def carry():
    """What to carry to this machine, as a requirements file that says in its comments how to fetch it."""
    base = choose()
    lines, alone = carried(base)
    kept = [f"{name} {base['modules'][name]['version']}" for name in ("torch", "triton") if base["modules"][name]]
    keeping = f", which keeps its {' and '.join(kept)}" if kept else ""
    tags = " ".join(f"--platform {tag}" for tag in platform_tags())
    python = dotted(base["version"][:2])
    download = f"python -m pip download --only-binary=:all: --python-version {python} -d DIR"
    return "\n".join(
        [
            f"# For Python {python} on {sysconfig.get_platform()}{keeping}.",
            "# Where there is a network, with this text in the file carry.txt, by the same Python version (pip",
            "# leaves out what another one does not need):",
            f"#   {download} -r carry.txt {tags}",
            *(f"#   {download} --no-deps {line}" for line in alone),  # a wheel for all systems
            "# Then here, with the folder DIR: bash scripts/bootstrap.sh --offline DIR",
            *dict.fromkeys(lines),
        ]
    )


def install_ninetoothed(answer, held):
    if not answer["modules"]["triton"]:
        pip(*held, "ninetoothed")
        return
    pip(*held, "--no-deps", "ninetoothed")
    others = besides_triton(ask(venv_python(), full=True)[0].get("ninetoothed", []))
    if others:
        pip(*held, *others)


@contextlib.contextmanager
def constrained(lines):
    """pip's arguments for these constraints."""
    handle, path = tempfile.mkstemp(suffix=".txt", text=True)
    try:
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{line}\n" for line in lines))
        yield ["-c", path]
    finally:
        os.unlink(path)


def install_torch(base, answer, torch):
    """`torch`, beside the triton that the machine has, if it has one; returns what .venv's Python then says."""
    triton = base["modules"]["triton"]
    beside = f" beside triton {triton['version']} ({triton['file']}), which is kept" if triton else ""
    say(f"installing {torch}{beside} (may take some minutes)")
    # Only the machine's own triton is held: one that an earlier torch brought into .venv goes with that torch.
    held = constraints(answer, keep_numpy=False, names=("triton",)) if triton else []
    try:
        with constrained(held) as options:
            pip(*(options if held else ()), torch)
    except PipFailed as error:
        hint = "NTOPS_MLA_TORCH names another requirement, NTOPS_MLA_PYTHON a Python that has torch"
        raise Stop(f"{torch} could not be installed{beside} ({hint}):\n{error}", 1) from None
    answer = ask(venv_python(), full=True)[0]
    check_torch(answer)
    problem = difference(base["modules"], answer["modules"])
    if problem:
        raise Stop(f"installing {torch} changed .venv: {problem}; NTOPS_MLA_TORCH names another requirement", 1)
    return answer


def install(base, answer):
    """Everything into .venv; returns what of the optional things is missing."""
    missing = {}
    if wheels:
        say_what_is_not_there(base, answer)
    torch = wanted_torch(base)
    if torch:
        answer = install_torch(base, answer, torch)

    with constrained(constraints(answer, keep_numpy=not torch)) as held:

        def optional(name, step):
            try:
                step()
            except PipFailed as error:
                missing[name] = OPTIONAL[name]
                say(f"{name} could not be installed: {OPTIONAL[name]}\n{error}")

        say("installing ninetoothed" + (" beside the Triton that is there" if answer["modules"]["triton"] else ""))
        optional("ninetoothed", lambda: install_ninetoothed(answer, held))
        say("installing what the tests need")
        try:
            pip(*held, *(line for line in test_requirements() if name_of(line) not in OPTIONAL))
            for line in test_requirements():
                if name_of(line) in OPTIONAL:
                    optional(name_of(line), lambda line=line: pip(*held, line))
            link_folders()
            pip(*held, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        except PipFailed as error:
            raise Stop(f"pip failed:\n{error}", 1) from None

    verify(answer)
    return missing


def say_what_is_not_there(base, answer):
    """All wheels that are missing at once: pip ends at the first one. What they require in turn, only pip can tell."""
    there = {canonical(path.name.split("-")[0]) for path in wheels.glob("*.whl")} | set(answer["distributions"])
    lines = [line for part in carried(base) for line in part]
    missing = dict.fromkeys(line for line in lines if name_of(line) not in there)
    if missing:
        say(f"{wheels} holds no wheel of {', '.join(missing)}; {CARRY}")


def link_folders():
    """ntops_mla/<name> -> ../<name>, where it is missing: an unpacked sdist holds no links, and an editable install
    finds the two folders only through them. setup.py does the same for whoever runs it without this script."""
    for name in LINKED:
        link = ROOT / "ntops_mla" / name
        if (ROOT / name).is_dir() and not os.path.lexists(link):
            with contextlib.suppress(OSError):  # verify says what that means
                link.symlink_to(f"../{name}", target_is_directory=True)


def verify(before):
    after = ask(venv_python(), full=True)[0]
    problem = "its Python does not run" if after is None else difference(before["modules"], after["modules"])
    if problem:
        raise Stop(f"an installation changed .venv: {problem}; nothing was left marked as ready", 1)
    package = after["package"]
    if not package or not Path(package["file"]).is_relative_to(ROOT):
        place = package["file"] if package else "nowhere"
        raise Stop(f"ntops_mla would be imported from {place}, not from {ROOT}: uninstall that one", 1)
    if not after["platforms"]:
        raise Stop(
            f"ntops_mla.platforms cannot be imported: is {ROOT / 'ntops_mla/platforms'} a link to ../platforms?", 1
        )


def bootstrap(again=False):
    base = choose()
    with lock():
        answer = ask(venv_python(), full=True)[0]
        problem = venv_problem(base, answer)
        if not again and not problem and ready(base):  # another bootstrap has done it all meanwhile
            return
        python = f"{base['executable']} (Python {dotted(base['version'])}"
        torch, triton = base["modules"]["torch"], base["modules"]["triton"]
        theirs = f"its torch {torch['version']}" if torch else "no torch"
        theirs += f", its triton {triton['version']}" if triton else ""
        say(f"building on {python}, {theirs})")
        if torch and os.environ.get("NTOPS_MLA_TORCH"):
            say("NTOPS_MLA_TORCH is not used: there is a torch, and it is kept")
        # From here on .venv is half-made until the new stamp is written.
        with contextlib.suppress(OSError):
            STAMP.unlink()
        if problem:
            say("making .venv" + (f" again: {problem}" if VENV.exists() else ""))
            answer = make_venv(base)
        missing = install(base, answer)
        write_stamp({"key": key(base), "root": str(ROOT), "torch": wanted_torch(base), "missing": missing})
        say(".venv is ready")


def dotted(version):
    return ".".join(map(str, version))


def tail(text, lines=15):
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


def main():
    parser = argparse.ArgumentParser(description="Make .venv ready.")
    parser.add_argument("--again", action="store_true", help="do every step although nothing changed")
    parser.add_argument("--check", action="store_true", help="exit 0 if there is nothing to do, else 3")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--offline", metavar="DIR", help="take all packages from the wheels in DIR, and ask no index")
    where.add_argument("--carry", action="store_true", help="list what DIR must hold for this machine; change nothing")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe-full", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe or arguments.probe_full:
        sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
        print("\n" + json.dumps(probe(arguments.probe_full)))
        return 0
    try:
        if arguments.offline is not None:
            use_only(arguments.offline)
        if arguments.check:
            return 3 if arguments.again or arguments.carry or not ready(choose()) else 0
        if arguments.carry:
            print(carry())
            return 0
        bootstrap(arguments.again)
    except Stop as stop:
        if arguments.check:  # the full run, which follows, says it
            return 3
        say(stop)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
