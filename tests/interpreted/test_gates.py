"""The three gates on a made-up platform, missing tiles, and the tiles of the real platforms."""

import dataclasses

import pytest
import torch

import ntops_mla
from ntops_mla import BackendUnavailableError, StrictFallbackError, dispatch, ops
from ntops_mla.platform import Gate, Markers, Platform, all_platforms, get_platform, register_platform
from ntops_mla.platform import unregister_platform as unregister
from ntops_mla.testing import assert_close
from tests import test_latent_fp8 as fp8
from tests.interpreted.numerics import DECODE, DTYPES, PREFILL, by_kernel, check_decode, check_prefill
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_mla_sparse import TOLERANCES as SPARSE
from tests.test_mla_sparse import sparse_inputs
from tests.test_mla_sparse_fp8 import sparse_fp8_inputs
from tests.test_ops import (
    DECODE_TOLERANCES,
    HALF,
    PREFILL_TOLERANCES,
    ROUNDED,
    WRITING,
    append_inputs,
    cache_of,
    clones,
    decode_inputs,
    name_of,
    norm64,
    prefill_inputs,
    rope64,
    tensors,
    turns,
)

TILES = get_platform("cpu").tiles
REAL = [name for name in all_platforms() if name != "cpu"]
NAMES = tuple(name for name in ops.names() if name != "mla_schedule")  # which has whole numbers, and a test below
REASON = {"native": "a toy computes in float32", "float32": "a toy has it not", "reference": "a toy rounds it wrongly"}


def arguments(name, dtype):
    if name == "rms_norm":
        return torch.randn(3, 100).to(dtype), torch.randn(100).to(dtype), 1e-6
    if name == "rope":
        return torch.randn(3, 5, 64).to(dtype), *turns(3, 64)
    if name == "latent_append":
        args = append_inputs(5, 16, dtype, strided=True)
        args[4][2] = -1
        return *args, 1e-6
    if name in fp8.NAMES:
        return tuple(fp8.arguments(name, dtype))
    if name == "mla_decode":
        return *decode_inputs([37, 0, 5], page_size=16, s_q=2, dtype=dtype), True, 2
    if name == "mla_decode_fp8":
        return *fp8_inputs([37, 0, 5], page_size=16, s_q=2, dtype=dtype), True, 2
    if name == "mla_sparse_fp8":
        return *sparse_fp8_inputs([37, 0, 5, 1], 40, page_size=7, pages=9, s_q=2, dtype=dtype), 2, True
    if name == "mla_sparse":
        return *sparse_inputs([37, 0, 5, 1], 40, page_size=7, pages=9, s_q=2, dtype=dtype), 2, True
    return *prefill_inputs([5, 0, 18], [7, 2, 17], heads=2, dtype=dtype), True


def tolerances(name, dtype, backend):
    """PyTorch's lse on a CPU is less exact than the kernels': tests/test_ops.py says why."""
    decode, prefill = (DECODE, PREFILL) if backend == "kernel" else (DECODE_TOLERANCES, PREFILL_TOLERANCES)
    of = {"mla_prefill": prefill}
    of |= dict.fromkeys(("mla_decode", "mla_decode_fp8"), decode) | dict.fromkeys(
        ("mla_sparse", "mla_sparse_fp8"), SPARSE
    )
    return of[name][dtype] if name in of else (ROUNDED[dtype],)


def widened(args, dtype=torch.float64):
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype in DTYPES else a for a in args]
    return [dtype if isinstance(a, torch.dtype) else a for a in args]


def check_against_float64(name, args, results, backend="kernel"):
    """`results`: what the call returned, or the cache that it wrote."""
    if name in fp8.NAMES:
        return fp8.check_outcome(name, args, results[0])
    dtype = args[0].dtype
    exact = widened(args)
    if name in ("rope", "latent_append"):  # cos and sin are float32 in every op
        first = 1 if name == "rope" else 2
        exact[first : first + 2] = args[first : first + 2]
    expected = outcome(name, getattr(ops, name).reference, exact)
    for result, wanted, tolerance in zip(results, expected, tolerances(name, dtype, backend), strict=True):
        if name == "latent_append":  # NaN where nothing is written
            assert torch.equal(result.isnan(), wanted.isnan())
            result, wanted = result.nan_to_num(0), wanted.nan_to_num(0)
        assert_close(result, wanted, tolerance)


def called(name, args):
    """What an op returns, or what it leaves in the cache, for copies of `args`."""
    return outcome(name, getattr(ops, name), args)


def outcome(name, function, args):
    args = clones(args)
    out = function(*args)
    return [cache_of(name, args)] if name in WRITING else tensors(out)


@pytest.fixture
def toy():
    """Registers a platform on CPU tensors with these gates and tiles, and runs there what the test calls."""
    with _Toys() as toys:
        yield toys


class _Toys:
    def __enter__(self):
        self._open = []
        return self

    def __call__(self, gates, tiles=TILES, name="toy", strict=None):
        platform = Platform(
            name=name,
            title="Toy",
            aliases=(),
            markers=Markers(order=1, device_type="cpu", device_names=("Toyota",)),
            limits=(),
            gates=gates,
            ci=None,
            tiles=tuple(dataclasses.replace(tile, arch=(), triton=(None, None)) for tile in tiles),
        )
        register_platform(platform)
        used = ntops_mla.use(platform=name, strict=strict)
        used.__enter__()
        self._open.append((name, used))
        return platform

    def __exit__(self, *raised):
        for name, used in reversed(self._open):
            used.__exit__(None, None, None)
            unregister(name)


def gates(mode):
    return {"*": {"*": Gate(mode, REASON[mode])}}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mode", REASON)
@pytest.mark.parametrize("name", NAMES)
def test_the_three_gates(toy, launches, name, mode, dtype):
    toy(gates(mode))
    args = arguments(name, dtype)
    with dispatch.record() as ran:
        results = called(name, args)
    choice = ran[name]
    assert choice == getattr(ops, name).explain(*args)
    assert (choice.op, choice.platform) == (name, "toy")
    of_value = torch.uint8 if name in fp8.NAMES and name in WRITING else dtype
    assert results[0].dtype == of_value and all(r.dtype == torch.float32 for r in results[1:])
    check_against_float64(name, args, results, choice.backend)
    # An fp8 cache's rope columns are bfloat16, whatever the queries are; its kernel takes them behind its codes.
    rope = 4 if name.endswith("_fp8") else None
    floats = {
        d
        for kernel, dtypes in launches
        for place, d in enumerate(dtypes)
        if d in HALF and not (kernel == name and place == rope)
    }
    if mode == "reference":
        assert choice.backend == "reference" and REASON[mode] in choice.reason and launches == []
        for result, wanted in zip(results, outcome(name, getattr(ops, name).reference, args), strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)
        return
    assert choice.backend == "kernel" and launches
    assert ("cast to float32" in choice.reason) == (mode == "float32")
    expected = {dtype} & set(HALF) if mode == "native" else set()
    # An fp8 cache's RoPE columns are bfloat16 whatever the gate
    assert floats == (expected | {torch.bfloat16} if name in fp8.NAMES else expected)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_through_float32_is_the_float32_kernel_rounded(toy, name, dtype):
    toy(gates("float32"))
    args = arguments(name, dtype)
    narrow, wide = called(name, args), called(name, widened(args, torch.float32))
    if name not in fp8.NAMES or name not in WRITING:
        assert narrow[0].dtype == dtype and wide[0].dtype == torch.float32
    for a, b in zip(narrow, wide):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True)


def test_an_ops_own_gate_goes_first(toy, launches):
    toy(
        {**gates("native"), "rope": {"bfloat16": Gate("reference", "not this one"), "float16": Gate("float32", "cast")}}
    )
    for dtype, expected in ((torch.bfloat16, []), (torch.float16, [torch.float32]), (torch.float32, [torch.float32])):
        launches.clear()
        called("rope", arguments("rope", dtype))
        assert [dtypes[0] for _, dtypes in launches] == expected
    launches.clear()
    called("rms_norm", arguments("rms_norm", torch.bfloat16))
    assert launches == [("rms_norm", (torch.bfloat16,) * 3)]


@pytest.mark.parametrize(
    "name, kernel",
    [
        *[(name, name) for name in NAMES],
        *((f"mla_{n}", "mla_combine") for n in ("decode", "decode_fp8", "sparse", "sparse_fp8")),
    ],
    ids=lambda value: value,
)
def test_without_a_tile_pytorch_runs_and_the_reason_says_so(toy, launches, name, kernel):
    toy(gates("native"), [tile for tile in TILES if tile.kernel != kernel], strict=False)
    args = arguments(name, torch.bfloat16)
    with dispatch.record() as ran:
        results = called(name, args)
    assert launches == [] and ran[name].backend == "reference"
    assert f"no tile of {kernel} for bfloat16" in ran[name].reason and "Toy" in ran[name].reason
    check_against_float64(name, args, results, "reference")
    with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match=f"no tile of {kernel} for bfloat16"):
        called(name, args)
    with ntops_mla.use("kernel"), pytest.raises(BackendUnavailableError, match=f"no tile of {kernel} for bfloat16"):
        called(name, args)
    split = {other for other in NAMES if other.startswith(("mla_decode", "mla_sparse"))}
    for other in set(NAMES) - (split if kernel == "mla_combine" else {name}):
        assert getattr(ops, other).explain(*arguments(other, torch.bfloat16)).backend == "kernel"


@pytest.mark.parametrize(
    "mode, tiles, backend",
    [("native", TILES, "kernel"), ("native", (), "reference"), ("reference", TILES, "reference")],
)
def test_the_gate_of_whole_numbers(toy, mode, tiles, backend):
    toy(gates(mode), tiles, strict=False)
    args = torch.tensor([300, 0, 700], dtype=torch.int32), 16, 5
    with dispatch.record() as ran:
        schedule = ops.mla_schedule(*args)
    assert ran["mla_schedule"].backend == backend
    assert tiles or "no tile of mla_schedule for int32" in ran["mla_schedule"].reason
    assert torch.equal(schedule, ops.mla_schedule.reference(*args))


def test_a_tile_for_float32_serves_what_is_cast(toy):
    toy(gates("float32"), [dataclasses.replace(tile, dtypes=("float32",)) for tile in TILES])
    for name in NAMES:
        args = arguments(name, torch.bfloat16)
        assert getattr(ops, name).explain(*args).backend == "kernel"
        check_against_float64(name, args, called(name, args))


@pytest.mark.parametrize("name", NAMES)
def test_float64_runs_pytorch_because_the_gate_says_so(name, launches):
    args = [
        torch.float64 if a is torch.bfloat16 else a.double() if getattr(a, "dtype", None) == torch.bfloat16 else a
        for a in arguments(name, torch.bfloat16)
    ]
    choice = getattr(ops, name).explain(*args)
    assert choice.backend == "reference" and "gate of cpu" in choice.reason
    called(name, args)
    assert launches == []


REFUSED = {
    "rms_norm": (lambda: (torch.randn(2, 16385), torch.randn(16385)), "rows of 16385 elements"),
    "rope": (lambda: (torch.randn(2, 3, 16), *turns(2, 16)), "16 RoPE columns"),
    "latent_append": (lambda: append_inputs(3, 4, torch.float32, 24, 8), "latents of 24 \\+ 8 columns"),
    "mla_decode": (lambda: decode_inputs([5], page_size=8, dtype=torch.float32), "pages of 8 slots"),
    "mla_decode_fp8": (lambda: fp8_inputs([5], page_size=8, dtype=torch.float32), "pages of 8 slots"),
    "mla_sparse": (lambda: sparse_inputs([5], 8, latent=24, rope=8, dtype=torch.float32), "heads of 24 \\+ 8 columns"),
    "mla_prefill": (lambda: prefill_inputs([5], dqk=24, dv=16, dtype=torch.float32), "heads of 24 / 16 columns"),
}


# What the rest takes the layout says, or the op
@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_a_kernel_does_not_take(name, launches):
    make, words = REFUSED[name]
    args = make()
    with pytest.raises(StrictFallbackError, match=words):
        getattr(ops, name)(*args)
    with ntops_mla.use(strict=False):
        assert getattr(ops, name).explain(*args).backend == "reference"
        getattr(ops, name)(*args)
    assert launches == []


# The real platforms


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", REAL)
def test_real_platforms(name, dtype):
    """Every op with the tile that the platform names first for these sizes, unless its gate is PyTorch's."""
    platform = get_platform(name)
    if not platform.tiles:
        pytest.skip(f"platforms/{name}.py has no tiles yet")
    ran = 0
    with ntops_mla.use(platform=name):
        for op in NAMES:
            if platform.gate(op, dtype, interpreted=True).mode != "reference":
                args = arguments(op, dtype)
                check_against_float64(op, args, called(op, args))
                assert getattr(ops, op).explain(*args).backend == "kernel"
                ran += 1
    assert ran


def distinct_tiles():
    """One of those that differ in nothing that a result depends on."""
    seen = {}
    for name in REAL:
        for tile in get_platform(name).tiles:
            when = {size: limits for size, limits in tile.when.items() if size != "keys"}
            key = tile.kernel, tuple(sorted(tile.blocks.items())), tile.dtypes, tuple(sorted(when.items()))
            if tile.blocks:
                seen.setdefault(key, (name, tile))
    return list(seen.values())


@pytest.mark.parametrize(
    "name, tile",
    distinct_tiles() or [pytest.param(None, None, marks=pytest.mark.skip(reason="no platform has tiles yet"))],
    ids=lambda value: value if isinstance(value, str) else value and f"{value.kernel}-{dict(value.blocks)}",
)
def test_tiles(toy, launches, name, tile):
    """Each tile on sizes that it is for, whatever architecture and Triton it is for."""
    dtypes = [dtype for dtype in DTYPES if not tile.dtypes or name_of(dtype) in tile.dtypes]
    dtype = dtypes[-1]

    def size(what, *wished):
        low, high = tile.when.get(what, (0, None))
        return next((n for n in wished if n >= low and (high is None or n <= high)), low)

    # What the tile's kernel needs beside it
    toy(gates("native"), [tile, *TILES])
    if tile.kernel == "rms_norm":
        width = size("width", 100, 512, 7168)
        x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
        assert_close(by_kernel(ops.rms_norm, x, weight), norm64(x, weight, 1e-6), ROUNDED[dtype])
    elif tile.kernel == "rope":
        width = size("width", 64, 32)
        x, (cos, sin) = torch.randn(3, 21, width).to(dtype), turns(3, width)
        assert_close(by_kernel(ops.rope, x, cos, sin), rope64(x, cos, sin), ROUNDED[dtype])
    elif tile.kernel in ("latent_append", "latent_append_rope"):
        latent = size("latent", 512, 256)
        args = append_inputs(5, 16, dtype, latent, latent // 8)
        if tile.kernel == "latent_append_rope":
            args = (*args, 1e-6, torch.randn(5, 20, latent // 8).to(dtype))
        check_against_float64("latent_append", args, called("latent_append", args))
        assert launches[-1][0] == tile.kernel
    elif tile.kernel == "latent_append_fp8_rope":
        args = clones(fp8.arguments("latent_append_fp8", dtype, heads=20))
        before = clones(args)
        ops.latent_append_fp8(*args)
        fp8.check_outcome("latent_append_fp8", before, args[5], args[7])
        assert launches[-1][0] == tile.kernel
    elif tile.kernel == "mla_prefill":
        width = size("width", 192, 256)
        sizes = {"heads": 1, "dqk": width, "dv": 128 if width == 192 else 256}
        check_prefill(prefill_inputs([70, 0, 5], [150, 3, 2], dtype=dtype, **sizes))
    else:
        latent, heads = size("latent", 512, 256), size("rows", 3, 16, 20, 64, 128)
        for page_size, lengths in ((64, [130, 0]), (16, [17])):
            sizes = {"heads": heads, "page_size": page_size, "latent": latent, "rope": latent // 8}
            check_decode(decode_inputs(lengths, dtype=dtype, **sizes), num_splits=2)
        if 2 * heads <= (tile.when.get("rows", (0, None))[1] or 64):
            check_decode(decode_inputs([65, 1], dtype=dtype, s_q=2, **sizes), num_splits=1)
    assert launches
