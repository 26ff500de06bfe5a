"""Platforms: their files, the types they are made of, and the registry."""

import ast
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import ntops_mla.platforms
from ntops_mla import platform as platforms
from ntops_mla.platform import (
    CILane,
    Fact,
    Gate,
    LaunchOption,
    Limits,
    Markers,
    Platform,
    all_platforms,
    detect,
    find_device,
    get_platform,
    register_platform,
    unregister_platform,
)
from tests.fakes.boards import Machine

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "platforms").glob("*.py"))
NAMES = [file.stem for file in FILES]
OPS = (
    "rms_norm",
    "rope",
    "latent_append",
    "mla_decode",
    "mla_decode_fp8",
    "mla_prefill",
    "mla_sparse",
    "mla_sparse_fp8",
)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def machine(monkeypatch):
    """A machine without an accelerator, to which a test adds one."""
    with Machine(monkeypatch) as machine:
        yield machine


@pytest.fixture
def toy():
    """A made-up platform that shares its device type with others, registered for the test."""
    platform = made_up()
    register_platform(platform)
    yield platform
    unregister_platform(platform.name)


def made_up(**changes):
    values = {
        "name": "toy",
        "title": "Toy",
        "aliases": ("plaything",),
        "markers": Markers(order=1, device_type="cuda", device_names=("Toyota",)),
        "limits": (),
        "gates": {"*": {"*": Gate("float32", "a toy")}},
        "ci": None,
    }
    return Platform(**{**values, **changes})


# The files


def test_the_platforms_are_the_files():
    assert FILES
    assert set(all_platforms()) == {file.stem for file in FILES}


def test_asked_in_the_order_of_their_markers():
    orders = [platform.markers.order for platform in all_platforms().values()]
    assert orders == sorted(orders)
    # NVIDIA after all who show themselves as "cuda" too, and the CPU last
    names = [name for name, platform in all_platforms().items() if platform.markers.device_type == "cuda"]
    assert {"metax", "iluvatar"} < set(names) and names[-1] == "nvidia"
    assert list(all_platforms())[-1] == "cpu"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_platform_file_is_data(file):
    """It imports the types of a platform, and nothing else."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.Import, ast.AsyncFunctionDef, ast.ClassDef)), ast.dump(node)
        if isinstance(node, ast.ImportFrom):
            assert node.module == "ntops_mla.platform"
            kinds = [getattr(platforms, alias.name) for alias in node.names]
            assert all(is_dataclass(kind) for kind in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_has_a_source(name):
    facts = list(facts_in(get_platform(name)))
    assert facts and all(fact.source.strip() for fact in facts)
    assert len(facts) >= 3 * len(get_platform(name).limits)


def facts_in(value):
    """Every Fact in a dataclass, however deep."""
    if isinstance(value, Fact):
        yield value
    elif is_dataclass(value):
        for member in fields(value):
            yield from facts_in(getattr(value, member.name))
    elif isinstance(value, tuple):
        for member in value:
            yield from facts_in(member)


def test_names_and_aliases_are_unique():
    names = [name for platform in all_platforms().values() for name in (platform.name, *platform.aliases)]
    assert len(names) == len(set(names))
    assert {"mthreads", "muxi", "tianshu"} <= set(names)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_accelerators_run_kernels_in_half_precision_and_not_in_float64(name, op):
    platform = get_platform(name)
    for dtype in (torch.float16, torch.bfloat16):
        # A tile is for a gate that is open.
        if platform.limits and platform.tile(op, None, dtype, None, rows=16, width=192, latent=512) is not None:
            assert platform.gate(op, dtype).mode != "reference"
    assert platform.gate(op, torch.float64).mode == "reference"
    assert platform.gate(op, torch.int32).mode == "reference"


def test_iluvatar_leaves_float32_attention_to_pytorch():
    iluvatar = get_platform("iluvatar")
    modes = {op: iluvatar.gate(op, torch.float32).mode for op in OPS}
    assert modes == {
        "rms_norm": "native",
        "rope": "native",
        "latent_append": "native",
        "mla_decode": "reference",
        "mla_decode_fp8": "reference",
        "mla_prefill": "reference",
        "mla_sparse": "reference",
        "mla_sparse_fp8": "reference",
    }
    assert "float32" in iluvatar.gate("mla_decode", torch.float32).reason


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_a_cpu_runs_pytorch(op, dtype):
    gate = get_platform("cpu").gate(op, dtype)
    assert gate.mode == "reference"
    assert "PyTorch" in gate.reason


@pytest.mark.parametrize(
    ("name", "capability", "arch", "shared_memory", "lanes"),
    [
        ("nvidia", (7, 5), None, None, None),
        ("nvidia", (8, 0), "sm_80", 163 * 1024, 32),
        ("nvidia", (8, 6), "sm_86", 99 * 1024, 32),
        ("nvidia", (8, 9), "sm_89", 99 * 1024, 32),
        ("nvidia", (9, 0), "sm_90", 227 * 1024, 32),
        ("nvidia", (10, 3), "sm_100", 227 * 1024, 32),
        ("nvidia", (12, 1), "sm_120", 99 * 1024, 32),
        ("nvidia", None, None, None, None),
        ("moore", (2, 1), None, None, None),
        ("moore", (2, 2), "MTT S4000", 73728, 128),
        ("moore", (3, 1), "MTT S5000", 196608, 32),
        ("metax", None, "C500", 65536, 64),
        ("metax", (8, 0), "C500", 65536, 64),
        ("iluvatar", (7, 1), "BI-V100, BI-V150, MR-V100", None, 64),
        ("cpu", None, None, None, None),
    ],
)
def test_limits(name, capability, arch, shared_memory, lanes):
    limits = get_platform(name).limits_for(capability)
    if arch is None:
        assert limits is None
    else:
        assert (limits.arch, limits.shared_memory.value, limits.lanes.value) == (arch, shared_memory, lanes)


def test_moore_ignores_num_stages_on_the_s4000_only():
    limits = {limits.arch: [note.value for note in limits.notes] for limits in get_platform("moore").limits}
    assert any("num_stages above 1 is ignored below capability 3.1" in note for note in limits["MTT S4000"])
    assert not any("num_stages" in note for note in limits["MTT S5000"])


def test_a_warp_fits_the_block_on_metax_and_iluvatar():
    assert get_platform("metax").limits_for((8, 0)).max_warps.value == 8
    assert get_platform("iluvatar").limits_for(None).max_warps.value == 16


# The type


def test_gate_looks_in_the_op_then_in_the_star():
    platform = made_up(
        gates={
            "rope": {"float16": Gate("native", "op and dtype"), "*": Gate("reference", "op")},
            "*": {"float32": Gate("float32", "dtype"), "*": Gate("reference", "neither")},
        }
    )
    assert platform.gate("rope", torch.float16).reason == "op and dtype"
    assert platform.gate("rope", torch.float32).reason == "op"
    assert platform.gate("rms_norm", torch.float32).reason == "dtype"
    assert platform.gate("rms_norm", torch.int8).reason == "neither"
    unknown = made_up(gates={}).gate("rope", torch.float16)
    assert unknown.mode == "reference"
    assert "rope" in unknown.reason and "float16" in unknown.reason


def test_a_platform_cannot_be_changed():
    platform = made_up()
    with pytest.raises(FrozenInstanceError):
        platform.name = "other"
    with pytest.raises(TypeError):
        platform.gates["rope"] = {}
    with pytest.raises(TypeError):
        platform.gates["*"]["*"] = Gate("native", "sneaked in")


UNKNOWN = Fact(None, "nowhere")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Fact(1, ""), ValueError, "source"),
        (lambda: Fact(1, "  "), ValueError, "source"),
        (lambda: Gate("fast", "because"), ValueError, "native, float32, reference"),
        (lambda: Gate("native", ""), ValueError, "reason"),
        (lambda: Limits("a", 8, UNKNOWN, UNKNOWN, UNKNOWN), ValueError, "min_capability"),
        (lambda: Limits("a", None, 65536, UNKNOWN, UNKNOWN), TypeError, "shared_memory must be a Fact"),
        (lambda: Limits("a", None, Fact(0, "x"), UNKNOWN, UNKNOWN), ValueError, "shared_memory must be positive"),
        (lambda: Markers(1, "cuda"), ValueError, "nothing tells"),
        (lambda: Markers(1, "cuda", device_names="NVIDIA"), TypeError, "device_names must be a tuple"),
        (
            lambda: platforms.Tile("a", {}, 4, 1, "x", when={"rows": (None, 9)}),
            TypeError,
            "rows.*begin with an integer",
        ),
        (lambda: LaunchOption("a", ("1",), "magic", ("rope",), "x"), ValueError, "environment"),
        (lambda: LaunchOption("a", ("1",), "launch", ("rope",), ""), ValueError, "source"),
        (lambda: CILane("toy", "runner", None, source=""), ValueError, "source"),
        (lambda: made_up(name="Toy"), ValueError, "lower-case"),
        (lambda: made_up(aliases=("toy",)), ValueError, "duplicate alias"),
        (lambda: made_up(aliases=("a", "a")), ValueError, "duplicate alias"),
        (lambda: made_up(limits=[]), TypeError, "limits must be a tuple"),
        (lambda: made_up(known_bad=("text",)), TypeError, "known_bad needs Fact"),
        (lambda: made_up(gates={"*": {"*": "native"}}), TypeError, "needs Gate"),
        (lambda: made_up(gates={"*": {"bfloat17": Gate("native", "x")}}), ValueError, "bfloat17"),
        (lambda: made_up(limits=(LIMITS, replace(LIMITS, arch="b"))), ValueError, "same capability"),
    ],
)
def test_what_a_type_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


LIMITS = Limits("a", (1, 0), UNKNOWN, UNKNOWN, UNKNOWN)


# The registry


@pytest.mark.parametrize("name", ["moore", "MOORE", "Mthreads", " mthreads "])
def test_get_platform_takes_names_and_aliases_in_any_case(name):
    assert get_platform(name).name == "moore"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown platform 'tpu'.*moore = mthreads.*cpu"):
        get_platform("tpu")


def test_a_registered_platform_works(machine, toy):
    machine.nvidia(name="Toyota T1")
    assert get_platform("plaything") is toy
    assert detect("cuda:0").platform is toy
    assert detect("cuda:0").platform.gate("rope", torch.float16).mode == "float32"
    assert find_device("toy") == torch.device("cuda:0")


def test_registering_is_seen_at_once(machine):
    machine.nvidia(name="NVIDIA Toyota T1")
    assert detect("cuda:0").platform.name == "nvidia"
    register_platform(made_up())
    try:
        assert detect("cuda:0").platform.name == "toy"
    finally:
        unregister_platform("toy")
    assert detect("cuda:0").platform.name == "nvidia"
    with pytest.raises(ValueError, match="toy"):
        get_platform("toy")


@pytest.mark.parametrize(
    "changes", [{"name": "nvidia"}, {"name": "muxi"}, {"aliases": ("metax",)}, {"aliases": ("tianshu",)}]
)
def test_a_name_that_is_taken_is_refused(changes):
    before = all_platforms()
    with pytest.raises(ValueError, match="two platforms"):
        register_platform(made_up(**changes))
    assert all_platforms() == before


def test_only_what_was_registered_is_unregistered():
    with pytest.raises(ValueError, match="not registered"):
        unregister_platform("nvidia")
    with pytest.raises(TypeError):
        register_platform("nvidia")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A second folder of platforms beside the real one."""
    before = set(sys.modules)
    monkeypatch.setattr(ntops_mla.platforms, "__path__", [*ntops_mla.platforms.__path__, str(tmp_path)])
    platforms.reset()
    yield tmp_path
    monkeypatch.undo()
    for name in set(sys.modules) - before:
        if name.startswith("ntops_mla.platforms."):
            del sys.modules[name]
    platforms.reset()


TOY_FILE = """
from ntops_mla.platform import Gate, Markers, Platform

PLATFORM = Platform(
    name="{name}", title="Toy", aliases=({alias!r},), limits=(), gates={{}}, ci=None,
    markers=Markers(order=50, device_type="cuda", device_names=("Toyota",)),
)
"""


def test_a_file_dropped_into_the_folder_is_a_platform(folder):
    (folder / "toy.py").write_text(TOY_FILE.format(name="toy", alias="plaything"))
    (folder / "README.md").write_text("no platform")
    assert set(all_platforms()) == {file.stem for file in FILES} | {"toy"}
    assert get_platform("plaything").name == "toy"
    names = list(all_platforms())
    assert names.index("nvidia") < names.index("toy") < names.index("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise OSError('gone')", "toy.py is broken: OSError: gone"),
        ("import no_such_module", "toy.py is broken: ModuleNotFoundError"),
        ("PLATFORM = 3", "toy.py: PLATFORM must be a Platform, got int"),
        ("", "toy.py is broken: AttributeError"),
        (TOY_FILE.format(name="other", alias="plaything"), "toy.py: PLATFORM is called 'other'"),
    ],
)
def test_a_broken_file_is_named(folder, text, message):
    (folder / "toy.py").write_text(text)
    with pytest.raises(RuntimeError, match=message):
        all_platforms()


def test_two_files_with_one_alias_are_refused(folder):
    (folder / "toy.py").write_text(TOY_FILE.format(name="toy", alias="mthreads"))
    with pytest.raises(ValueError, match="'mthreads' names two platforms"):
        all_platforms()
