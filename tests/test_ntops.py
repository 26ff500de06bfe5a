"""The ops in ntops: the stub of it in fakes/ntops_stub in processes of their own, and the real one where it is."""

import importlib.util
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import ntops_mla
from ntops_mla import ops
from ntops_mla.integrations import import_hook, ntops_functions
from ntops_mla.integrations import ntops as integration

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "tests" / "fakes" / "ntops_stub"
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
# The stub, like the real one, has a rms_norm.
OURS = [name for name in ops.names() if name != "rms_norm"]
ADDED = {name: "added" for name in OURS} | {"rms_norm": "upstream"}
PRESENT = {name: "present" for name in OURS} | {"rms_norm": "upstream"}

# Each job in a fork of one process that has imported torch and NineToothed, which takes seconds.
SERVER = """
import json, os, sys, traceback
import ninetoothed, torch

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.path[:0] = job["path"]
            os.environ.update(job["environment"])
            exec(job["code"], {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# What every job may use.
PRELUDE = """
import importlib, json, sys, threading, types, warnings
warnings.simplefilter("error")

def warned(code):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(code, globals())
    return [str(warning.message) for warning in caught]

def hooks():
    return [finder for finder in sys.meta_path if type(finder).__module__ == "ntops_mla.integrations.import_hook"]

def registered():
    torch, kernels = sys.modules["ntops.torch"], sys.modules["ntops.kernels"]
    return {
        "torch": [torch.__all__.count(name) for name in OURS],
        "kernels": [kernels.__all__.count(name) for name in KERNELS],
        "attributes": all(hasattr(torch, name) for name in OURS) and all(hasattr(kernels, name) for name in KERNELS),
    }

def complete():
    return registered() == {"torch": [1] * len(OURS), "kernels": [1] * len(KERNELS), "attributes": True}
"""


@pytest.fixture(scope="module")
def server():
    environment = {name: value for name, value in os.environ.items() if name != integration.VARIABLE}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=STUB.parent, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path):
    """Runs code in a process of its own, with the stub or another folder in front, and gives what it printed."""

    def call(code, path=STUB, **environment):
        names = f"OURS, KERNELS = {OURS!r}, {KERNELS!r}\n"
        code = names + PRELUDE + textwrap.dedent(code)
        log = tmp_path / "log"
        job = {"code": code, "path": [str(path)], "environment": environment, "log": str(log)}
        print(json.dumps(job), file=server.stdin, flush=True)
        status, text = int(server.stdout.readline()), log.read_text()
        log.unlink()
        assert status == 0, text
        return text

    return call


@pytest.fixture
def changed(tmp_path):
    """A copy of the stub with some files written anew, or removed (None)."""

    def make(**files):
        for source in STUB.rglob("*.py"):
            target = tmp_path / "changed" / source.relative_to(STUB)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source.read_text())
        for name, text in files.items():
            target = tmp_path / "changed" / "ntops" / f"{name}.py"
            target.unlink() if text is None else target.write_text(textwrap.dedent(text))
        return tmp_path / "changed"

    return make


def test_ntops_first(run):
    run("""
        import ntops
        upstream, lists = (ntops.torch.rms_norm, ntops.kernels.rms_norm), (ntops.torch.__all__, ntops.kernels.__all__)
        import ntops_mla
        assert complete() and not hooks()
        assert (ntops.torch.rms_norm, ntops.kernels.rms_norm) == upstream
        assert ntops.torch.__all__ is lists[0] and ntops.kernels.__all__ is lists[1]
        assert sys.modules["ntops.kernels.rms_norm"] is upstream[1]
        assert ntops.torch.__all__[:2] == ["add", "rms_norm"] and ntops.torch.__all__.count("rms_norm") == 1
    """)


def test_ntops_mla_first(run):
    """Registered by the import of ntops, whose loader is what it would have been; then the hook is gone."""
    run("""
        import ntops_mla
        assert len(hooks()) == 1 and "ntops" not in sys.modules
        assert importlib.util.find_spec("ntops").loader.get_source("ntops")
        importlib.reload(ntops_mla)
        assert len(hooks()) == 1
        import ntops.kernels.mla_decode
        from ntops.kernels.mla_combine import premake
        from ntops.torch import mla_decode
        assert complete() and not hooks()
        assert type(ntops.__loader__).__name__ == type(ntops.__spec__.loader).__name__ == "SourceFileLoader"
        assert ntops.kernels.mla_decode is sys.modules["ntops_mla.kernels.mla_decode"]
    """)


def test_register_says_what_became_of_each(run):
    printed = run("""
        import ntops_mla
        print(json.dumps([ntops_mla.register(), ntops_mla.register()]))
        assert complete() and not hooks()
        import ntops
        print(json.dumps(ntops_mla.register()))
        assert complete()
    """)
    first, last = map(json.loads, printed.splitlines())
    assert first == [ADDED, PRESENT]
    assert last == PRESENT


def test_reload(run):
    printed = run("""
        import ntops, ntops_mla
        importlib.reload(ntops)
        importlib.reload(ntops_mla)
        assert complete() and not hooks()
        importlib.reload(ntops.torch)
        assert "rope" not in ntops.torch.__all__
        print(json.dumps(ntops_mla.register()))
        assert complete()
    """)
    assert json.loads(printed) == ADDED


def test_switched_off(run):
    printed = run(
        """
        import ntops_mla
        assert not hooks()
        import ntops
        ntops_mla.integrations.ntops.plugin()
        assert ntops.torch.__all__ == ntops.kernels.__all__ == ["add", "rms_norm"]
        print(json.dumps(ntops_mla.register()))
        assert complete()
        """,
        NTOPS_MLA_REGISTER="0",
    )
    assert json.loads(printed) == ADDED


@pytest.mark.parametrize("value", ["2", "no", "true"])
def test_the_switch_is_0_or_1(monkeypatch, value):
    monkeypatch.setenv("NTOPS_MLA_REGISTER", value)
    with pytest.raises(ValueError, match=f"NTOPS_MLA_REGISTER must be 0 or 1, got '{value}'"):
        integration.automatic()
    with pytest.raises(ValueError, match="NTOPS_MLA_REGISTER"):
        integration.plugin()


def test_infinicores_loop(run):
    """It writes its own module over the global `torch` of every function listed."""
    run("""
        import torch, ntops_mla, ntops
        from ntops_mla import ops

        infinicore = types.ModuleType("infinicore")
        for name in ntops.torch.__all__:
            getattr(ntops.torch, name).__globals__["torch"] = infinicore
        # It did what it does: the stub's own functions are InfiniCore's now.
        try:
            ntops.torch.add(1, 2)
        except AttributeError as error:
            assert "infinicore" in str(error)
        else:
            raise AssertionError("the loop had no effect")

        for name in OURS:
            op, function = ops.get(name), getattr(ntops.torch, name)
            args = op.example()
            copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            with ntops_mla.dispatch.record() as ran:
                torch.testing.assert_close(function(*args), getattr(ops, name)(*copies), rtol=0, atol=0)
            for arg, copy in zip(args, copies):  # what is written to, too
                if isinstance(arg, torch.Tensor):
                    torch.testing.assert_close(arg, copy, rtol=0, atol=0)
            assert function.explain(*args) == op.explain(*args) == ran[name]

        # Nothing of ours, the module and the cache included, got another torch.
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "ntops_mla" and name != "ntops_mla.integrations.ntops_functions":
                assert getattr(module, "torch", torch) is torch, name
        config = ntops_mla.MLAConfig(
            hidden_size=64, num_heads=2, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
            v_head_dim=16,
        )
        cache = ntops_mla.LatentCache(config, num_pages=2, page_size=16, dtype=torch.float32)
        mla = ntops_mla.MLA(config, dtype=torch.float32)
        assert mla(torch.randn(3, 64), cache.step([0], [3])).shape == (3, 64)
    """)


def test_kernels_are_modules_with_premake(run):
    """scripts/build_ntops.py passes premake to other processes and calls it with dtype."""
    run("""
        import inspect, pickle, ninetoothed, ntops, ntops_mla
        sizes = {"block_h": 16, "block_n": 32, "block_m": 32, "block_c": 256}
        for name in KERNELS:
            module = getattr(ntops.kernels, name)
            assert isinstance(module, types.ModuleType)
            if name == "rms_norm":
                continue
            assert sys.modules[f"ntops.kernels.{name}"] is module is importlib.import_module(f"ntops.kernels.{name}")
            assert pickle.loads(pickle.dumps(module.premake)) is module.premake
            needed = [p.name for p in inspect.signature(module.premake).parameters.values() if p.default is p.empty]
            arguments = {parameter: sizes.get(parameter, 64) for parameter in needed}
            arrangement, application, tensors = module.premake(**arguments, dtype=ninetoothed.float16)
            assert callable(arrangement) and application is module.application
            # A schedule is whole numbers, whatever it is for.
            assert ninetoothed.float16 in {tensor.dtype for tensor in tensors} or name == "mla_schedule", name
    """)


def test_upstream_keeps_what_it_has(run, changed):
    """Whether imported, only listed, or a file that nothing has imported; in one half, it stays out of the other."""
    path = changed(
        **{
            "kernels/mla_prefill": "upstream = True",
            "kernels/mla_combine": "upstream = True",
            "torch/__init__": """
                def mla_decode():
                    return "upstream"

                def __getattr__(name):
                    if name == "rope":
                        return "upstream"
                    raise AttributeError(name)

                __all__ = ["mla_decode", "rope"]
            """,
        }
    )
    printed = run(
        """
        import ntops, ntops_mla
        print(json.dumps(ntops_mla.register()))
        import ntops.kernels.mla_prefill, ntops.kernels.mla_combine
        assert ntops.kernels.mla_prefill.upstream and ntops.kernels.mla_combine.upstream
        assert ntops.torch.mla_decode() == ntops.torch.rope == "upstream"
        assert not hasattr(ntops.kernels, "mla_decode") and not hasattr(ntops.torch, "mla_prefill")
        assert ntops.kernels.latent_append.premake
        """,
        path,
    )
    upstream = ("rms_norm", "rope", "mla_decode", "mla_prefill")
    assert json.loads(printed) == {name: "upstream" if name in upstream else "present" for name in ops.names()}


def test_all_may_be_missing_or_a_tuple(run, changed):
    path = changed(**{"torch/__init__": "", "kernels/__init__": "__all__ = ('add',)"})
    run(
        """
        import ntops, ntops_mla
        assert not hasattr(ntops.torch, "__all__") and ntops.torch.mla_decode
        assert ntops.kernels.__all__[0] == "add" and set(KERNELS) <= {*ntops.kernels.__all__, "rms_norm"}
        """,
        path,
    )


@pytest.mark.parametrize("half, other", [("torch", "kernels"), ("kernels", "torch")])
def test_half_an_ntops(run, tmp_path, half, other):
    package = tmp_path / "ntops"
    (package / other).mkdir(parents=True)
    (package / "__init__.py").write_text(f"from ntops import {other}\n")
    (package / other / "__init__.py").write_text("__all__ = []\n")
    printed = run(
        """
        import ntops_mla
        print(json.dumps(warned("import ntops")))
        print(json.dumps(warned("ntops_mla.register(); ntops_mla.register()")))
        assert (ntops.kernels.mla_decode.premake if hasattr(ntops, "kernels") else ntops.torch.mla_decode.explain)
        """,
        tmp_path,
    )
    (first,), later = map(json.loads, printed.splitlines())
    assert f"no ntops.{half}" in first
    assert later == []


def test_another_package_of_that_name(run, tmp_path):
    (tmp_path / "ntops.py").write_text("")
    printed = run(
        """
        import ntops_mla
        print(json.dumps(warned("import ntops")))
        try:
            ntops_mla.register()
        except ImportError as error:
            assert "github.com/InfiniTensor/ntops" in str(error) and ntops.__file__ in str(error)
        else:
            raise AssertionError("registered in what is not ntops")
        """,
        tmp_path,
    )
    (message,) = json.loads(printed)
    assert "neither ntops.torch nor ntops.kernels" in message


def test_a_failed_import_of_ntops(run, changed):
    """Its error comes through as it is, and the next import registers."""
    path = changed(**{"torch/add": "import a_module_that_is_not_there"})
    run(
        """
        import ntops_mla
        for attempt in ("import ntops", "ntops_mla.register()", "import ntops"):
            try:
                exec(attempt)
            except ModuleNotFoundError as error:
                assert error.name == "a_module_that_is_not_there", error
            else:
                raise AssertionError("no error")
            assert len(hooks()) == 1
        sys.modules["a_module_that_is_not_there"] = types
        sys.modules["ntops.torch.add"] = types.SimpleNamespace(add=len)
        import ntops
        assert complete() and not hooks()
        """,
        path,
    )


def test_a_failed_registration_does_not_fail_the_import(run):
    printed = run("""
        import ntops_mla
        sys.modules["ntops_mla.kernels.mla_decode"] = None
        print(json.dumps(warned("import ntops")))
        assert ntops.torch.__all__ == ntops.kernels.__all__ == ["add", "rms_norm"]  # all or nothing
        del sys.modules["ntops_mla.kernels.mla_decode"]
        ntops_mla.register()
        assert complete()
    """)
    (message,) = json.loads(printed)
    assert "not in ntops" in message and "mla_decode" in message


BEFORE = "import ntops_mla\nfrom ntops import kernels, torch\n"
AFTER = "from ntops import kernels, torch\nimport ntops_mla\n"
LOADS_PLUGINS = "from ntops import kernels, torch\nfrom ntops_mla.integrations.ntops import plugin\nplugin()\n"


@pytest.mark.parametrize("text", [BEFORE, AFTER, LOADS_PLUGINS], ids=["before", "after", "plugins"])
def test_ntops_imports_ntops_mla(run, changed, text):
    run("import ntops; assert complete() and not hooks()", changed(__init__=text))


def test_ntops_torch_imports_ntops_mla(run, changed):
    """It is not finished then, and would write over `__all__`: that is said."""
    printed = run(
        """
        print(json.dumps(warned("import ntops")))
        import ntops_mla
        ntops_mla.register()
        assert complete() and not hooks()
        """,
        changed(**{"torch/__init__": "import ntops_mla\n__all__ = []\n"}),
    )
    (message,) = json.loads(printed)
    assert "ntops.torch is being imported; call ntops_mla.register()" in message


def test_ntops_is_imported_while_ntops_mla_is(run):
    run("""
        class Early:
            def find_spec(self, name, path=None, target=None):
                if name == "ntops_mla.cache":
                    sys.meta_path.remove(self)
                    import ntops

        sys.meta_path.insert(0, Early())
        import ntops_mla
        assert complete() and not hooks()
    """)


def test_threads(run, changed):
    """Importing both and registering at once, while ntops takes its time."""
    path = changed(**{"torch/add": "import time\ntime.sleep(0.05)\ndef add(): pass\n"})
    run(
        """
        start, errors = threading.Barrier(9), []

        def work(code):
            try:
                start.wait()
                exec(code, {})
            except BaseException as error:
                errors.append(error)

        code = ["import ntops", "import ntops_mla", "import ntops_mla; ntops_mla.register()"] * 3
        threads = [threading.Thread(target=work, args=(line,), daemon=True) for line in code]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors, errors
        assert not any(thread.is_alive() for thread in threads)
        assert complete() and not hooks()
        """,
        path,
    )


def test_no_ntops(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setitem(sys.modules, "ntops", None)
    before = list(sys.meta_path)
    with pytest.raises(ImportError, match=r"pip install git\+https://github.com/InfiniTensor/ntops"):
        ntops_mla.register()
    assert len(sys.meta_path) == len(before)


def test_import_stays_cheap():
    """Neither ntops nor Triton, whose imports take seconds."""
    code = "import sys, ntops_mla; print(sorted({'ntops', 'triton', 'ninetoothed'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(STUB)])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# The functions themselves need no ntops.


@pytest.mark.parametrize("name", ops.names())
def test_functions_look_like_the_ops(name):
    op, function = getattr(ops, name), ntops_functions.FUNCTIONS[name]
    assert type(function) is types.FunctionType
    assert function is not op and function.__name__ == name
    assert inspect.signature(function) == inspect.signature(op)
    assert next(iter(inspect.signature(function).parameters)) != "args"
    assert inspect.getdoc(function) == inspect.getdoc(op)
    assert function.explain == op.explain and function.reference == op.reference
    assert pickle.loads(pickle.dumps(function)) is function
    assert "torch" not in function.__globals__


def test_functions_refuse_what_the_ops_refuse():
    with pytest.raises(TypeError, match="rms_norm: input must be a tensor"):
        ntops_functions.FUNCTIONS["rms_norm"]("no tensor", torch.ones(4))
    with pytest.raises(TypeError, match="unexpected keyword"):
        ntops_functions.FUNCTIONS["rms_norm"](torch.ones(4), torch.ones(4), epsilon=1)


def test_functions_compile():
    function = torch.compile(ntops_functions.FUNCTIONS["rms_norm"], fullgraph=True, backend="eager")
    x, weight = torch.randn(3, 8), torch.randn(8)
    try:
        torch.testing.assert_close(function(x, weight, eps=1e-5), ops.rms_norm(x, weight, 1e-5))
    finally:
        torch.compiler.reset()


# The hook itself, with a package that nobody has.


@pytest.fixture
def package(tmp_path, monkeypatch):
    name = "ntops_mla_test_package"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield name
    sys.modules.pop(name, None)


def test_hook_acts_once_and_goes(package):
    acts, before = [], list(sys.meta_path)
    import_hook.when_imported(package, lambda: acts.append(sys.modules[package].value))
    import_hook.when_imported(package, lambda: acts.append("again"))
    assert importlib.util.find_spec(package) is not None and acts == []
    module = importlib.import_module(package)
    assert acts == [1] and sys.meta_path == before
    importlib.reload(module)
    assert acts == [1]
    assert import_hook.forget(package) is False


def test_hook_leaves_copies_alone(package):
    """A tool may run a package without importing it."""
    acts = []
    import_hook.when_imported(package, lambda: acts.append(1))
    spec = importlib.util.find_spec(package)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert acts == [] and package not in sys.modules
    assert import_hook.forget(package) is True


def test_hook_passes_by_a_folder(tmp_path, package):
    """A checkout in the current folder, say: importable under its name, without a loader, and not the package."""
    (tmp_path / f"{package}.py").unlink()
    (tmp_path / package).mkdir()
    acts = []
    import_hook.when_imported(package, lambda: acts.append(1))
    assert importlib.import_module(package).__file__ is None
    assert acts == []
    assert import_hook.forget(package) is True


@pytest.mark.parametrize("place", [0, 1], ids=["in front", "behind"])
def test_hook_beside_one_that_asks_all_finders(package, place):
    class Asks:
        def find_spec(self, name, path=None, target=None):
            if name == package:
                others = [finder for finder in sys.meta_path if finder is not self]
                return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)

    acts = []
    import_hook.when_imported(package, lambda: acts.append(1))
    sys.meta_path.insert(place, Asks())
    importlib.import_module(package)
    assert acts == [1]


# Packaging.


def test_requirements_pin_a_commit():
    lines = (ROOT / "requirements-ntops.txt").read_text().splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"ntops @ git\+https://github\.com/InfiniTensor/ntops@[0-9a-f]{40}", line)


# The real one.


def test_the_real_ntops():
    """Where it is installed: `pip install -r requirements-ntops.txt`."""
    if importlib.util.find_spec("ntops") is None:
        pytest.skip("ntops is not installed; requirements-ntops.txt says where it is")
    code = f"""
        OURS, KERNELS = {OURS!r}, {KERNELS!r}
        {textwrap.indent(PRELUDE, " " * 8).strip()}
        warnings.simplefilter("default")
        import ntops_mla, ntops, torch
        assert not hooks()
        assert complete(), registered()
        result = ntops_mla.register()
        assert result["rms_norm"] == "upstream" and ntops.torch.rms_norm.__module__ == "ntops.torch.rms_norm"
        assert set(result.values()) == {{"upstream", "present"}}
        infinicore = types.ModuleType("infinicore")
        for name in ntops.torch.__all__:
            getattr(ntops.torch, name).__globals__["torch"] = infinicore
        for name in OURS:
            op = ntops_mla.ops.get(name)
            args = op.example()
            getattr(ntops.torch, name)(*args)
            assert getattr(ntops.torch, name).explain(*args) == op.explain(*args)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment.pop(integration.VARIABLE, None)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
