"""The dispatcher: what it chooses on a made-up platform, what it says about it, and what follows a failure."""

import contextvars
import dataclasses
import importlib
import threading
import warnings

import pytest
import torch

import ntops_mla
from ntops_mla import board as boards
from ntops_mla import dispatch, ops
from ntops_mla.board import Board, Needed
from ntops_mla.dispatch import BackendUnavailableError, Choice, KernelFallbackWarning, OpSpec, StrictFallbackError
from ntops_mla.kernel import OutOfReach
from ntops_mla.platform import (
    Fact,
    Gate,
    Limits,
    Markers,
    Platform,
    Tile,
    get_platform,
    register_platform,
    unregister_platform,
)
from tests.test_ops import cache_of

CPU = torch.device("cpu")
# Recognised by no platform file, and needs no machine.
NOWHERE = torch.device("meta")

GATES = {
    "*": {
        "float32": Gate("native", "a toy computes in float32"),
        "bfloat16": Gate("native", "a toy computes in float32"),
        "float16": Gate("float32", "a toy has no float16"),
        "*": Gate("reference", "a toy knows no other dtype"),
    },
    # An op with a row of its own, which lacks most dtypes: "*" serves those.
    "picky": {"bfloat16": Gate("reference", "a toy rounds bfloat16 wrongly in this op")},
    "mla_schedule": {"int32": Gate("native", "a toy can count")},
}


@pytest.fixture
def platform():
    """A platform on CPU and meta tensors that none is recognised as: chosen by name, so that they reach its kernels."""
    toy = Platform(
        name="toy",
        title="Toy",
        aliases=("plaything",),
        markers=Markers(order=1, device_type="cpu", also_device_types=("meta",), device_names=("Toyota",)),
        limits=(),
        gates=GATES,
        ci=None,
    )
    register_platform(toy)
    yield toy
    unregister_platform("toy")


@pytest.fixture
def on_toy(platform):
    """All calls of the test are on the made-up platform, by the environment's settings otherwise."""
    with ntops_mla.use(platform="toy"):
        yield platform


@pytest.fixture
def on_toy_by_environment(platform, monkeypatch):
    """NOWHERE is the made-up platform, because a variable says so."""
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "toy")
    dispatch.reset()
    return platform


class FakeOp:
    """x -> 2 x, with a value that says who computed it: the kernel adds 1. `calls` holds what ran, in order."""

    def __init__(self, name="toy_op", *, has_kernel=True, fail=None, result=None, key=None, **parts):
        self.calls = []
        self.fail = fail or (lambda x: None)
        self.result = result or (lambda x: 2 * x + 1)
        self.spec = OpSpec(
            name,
            key or (lambda x: ((x.dtype,), (x.shape[-1],))),
            self._reference,
            **{"supports": lambda platform, dtypes, sizes: None, **parts},
            kernel=self._kernel if has_kernel else None,
        )

    def _reference(self, x):
        self.calls.append("reference")
        return 2 * x

    def _kernel(self, board, x):
        self.calls.append("kernel")
        self.platform, self.input = board.platform, x
        error = self.fail(x)
        if error is not None:
            raise error
        return self.result(x)

    def __call__(self, x, device=CPU):
        return dispatch.call(self.spec, device, (x,))

    def explain(self, x, device=CPU, **kwargs):
        return dispatch.explain(self.spec, device, (x,), **kwargs)


def ones(size=4, dtype=torch.float32):
    return torch.ones(2, size, dtype=dtype)


def always(error):
    return lambda x: error


def with_kernel(monkeypatch, name, kernel):
    """Give the registered op `name` a kernel for this test."""
    op = ops.get(name)
    # no tiles: what stands in for the kernel is no NineToothed kernel
    monkeypatch.setattr(op, "spec", dataclasses.replace(op.spec, kernel=kernel, tiles=None))


@pytest.fixture
def quiet():
    """Every warning of the test, none swallowed by Python's own once-a-place rule."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def fallbacks(caught):
    return [str(w.message) for w in caught if issubclass(w.category, KernelFallbackWarning)]


# The choice


def test_a_kernel_is_chosen_and_runs(on_toy):
    op = FakeOp()
    assert op.explain(ones()) == ("toy_op", "toy", "kernel", "the platform's kernel")
    assert op.calls == []
    assert torch.equal(op(ones()), torch.full((2, 4), 3.0))
    assert op.calls == ["kernel"]
    assert op.platform is on_toy


def test_a_choice_reads_as_a_sentence(on_toy):
    choice = FakeOp().explain(ones())
    assert isinstance(choice, Choice)
    assert choice._fields == ("op", "platform", "backend", "reason")
    assert str(choice) == "toy_op: kernel on toy (the platform's kernel)"


def test_an_op_without_a_kernel_runs_pytorch(on_toy, quiet):
    op = FakeOp(has_kernel=False)
    choice = op.explain(ones())
    assert choice[:3] == ("toy_op", "toy", "reference")
    assert "no compiled kernel of toy_op" in choice.reason
    assert torch.equal(op(ones()), torch.full((2, 4), 2.0))
    assert fallbacks(quiet) == []


@pytest.mark.parametrize(
    "name, dtype, backend, gate",
    [
        ("toy_op", torch.float32, "kernel", "native"),
        ("toy_op", torch.bfloat16, "kernel", "native"),
        ("toy_op", torch.float16, "kernel", "float32"),
        ("toy_op", torch.float64, "reference", "a toy knows no other dtype"),
        ("picky", torch.bfloat16, "reference", "a toy rounds bfloat16 wrongly in this op"),
        ("picky", torch.float32, "kernel", "native"),
        ("picky", torch.float64, "reference", "a toy knows no other dtype"),
    ],
)
def test_gates_decide_by_op_and_dtype(on_toy, name, dtype, backend, gate):
    op = FakeOp(name)
    x = ones(dtype=dtype)
    choice = op.explain(x)
    assert (choice.op, choice.backend) == (name, backend)
    if backend == "reference":
        assert gate in choice.reason and str(dtype).removeprefix("torch.") in choice.reason
    else:
        assert ("cast to float32" in choice.reason) == (gate == "float32")
    out = op(x)
    assert op.calls == [backend]
    assert out.dtype == dtype


@pytest.mark.parametrize(
    "dtypes, backend, reason, seen",
    [
        ((torch.float32, torch.float64), "reference", "a toy knows no other dtype", None),
        ((torch.float64, torch.float32), "reference", "a toy knows no other dtype", None),
        ((torch.bfloat16, torch.float16), "kernel", "cast to float32", torch.float32),
        ((torch.float16, torch.bfloat16), "kernel", "cast to float32", torch.float32),
        ((torch.bfloat16, torch.float32), "kernel", "the platform's kernel", torch.bfloat16),
    ],
)
def test_of_several_dtypes_the_strictest_gate_counts(on_toy, dtypes, backend, reason, seen):
    """The tensor is bfloat16 throughout: what the kernel sees of it tells which gate was in force."""
    op = FakeOp(key=lambda x: (dtypes, ()))
    choice = op.explain(ones())
    assert choice.backend == backend and reason in choice.reason
    op(ones(dtype=torch.bfloat16))
    assert op.calls == [backend]
    assert (op.input.dtype if seen else None) == seen


def test_a_native_gate_hands_the_very_tensors_on(on_toy):
    op = FakeOp(result=lambda x: x)
    x = ones(dtype=torch.bfloat16).t()
    assert op(x) is x
    assert op.input is x


# The float32 gate


def test_the_float32_gate_casts_in_and_back(on_toy):
    op = FakeOp()
    out = op(ones(dtype=torch.float16))
    assert op.input.dtype == torch.float32
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.full((2, 4), 3.0, dtype=torch.float16))


def test_the_float32_gate_leaves_the_lse_in_float32(on_toy):
    """1/3 in float16 differs from float32's, so a cast on the way would show."""
    lse = torch.full((2,), 1 / 3)
    op = FakeOp(result=lambda x: (2 * x, lse))
    out, out_lse = op(ones(dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out_lse.dtype == torch.float32
    assert torch.equal(out_lse, lse)


def test_the_float32_gate_leaves_other_arguments_alone(on_toy, monkeypatch, quiet):
    """Of mla_decode's arguments only the floating tensors are cast; integers and plain values pass as they are."""
    seen = []

    def kernel(platform, *args):
        seen.extend(args)
        return ops.get("mla_decode").spec.reference(*args)

    args = ops.get("mla_decode").example(CPU, torch.float16, tokens=2, heads=2)
    expected = ops.mla_decode.reference(*args)
    with_kernel(monkeypatch, "mla_decode", kernel)
    out, lse = ops.mla_decode(*args)
    assert fallbacks(quiet) == []
    assert [a.dtype for a in seen[:4]] == [torch.float32] * 4
    assert [a.dtype for a in seen[4:6]] == [torch.int32] * 2
    assert seen[6:] == list(args[6:])
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out, expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, expected[1], atol=2e-3, rtol=2e-3)


def test_an_op_may_bring_its_own_way_through_float32(on_toy):
    seen = []

    def through(kernel, platform, args):
        seen.append((platform, args))
        return kernel(platform, *(a.double() for a in args)).half()

    op = FakeOp(through_float32=through)
    x = ones(dtype=torch.float16)
    assert op(x).dtype == torch.float16
    assert op.input.dtype == torch.float64
    assert len(seen) == 1 and seen[0][0].platform is on_toy and seen[0][1][0] is x
    op(ones())
    assert len(seen) == 1, "behind a native gate it has no part"


def test_latent_append_through_float32_writes_the_rows_and_nothing_else(on_toy, monkeypatch, quiet):
    """float16, slots out of order with a skipped one, more tokens than a page, in a cache of NaN."""
    launched = []

    def kernel(platform, kv_a, weight, cos, sin, slots, cache, eps, q_pe):
        launched.append((kv_a.dtype, weight.dtype, cache.dtype, q_pe.dtype))
        ops.get("latent_append").spec.reference(kv_a, weight, cos, sin, slots, cache, eps, q_pe)

    kv_a, weight, cos, sin, *_ = ops.get("latent_append").example(CPU, torch.float16, tokens=21)
    weight = torch.rand_like(weight) + 0.5
    slots = torch.randperm(48)[:21]
    slots[[3, 17]] = -1
    expected = torch.full((3, 16, 576), float("nan"), dtype=torch.float16)
    cache = expected.clone()
    q_pe = torch.randn(21, 3, 64).to(torch.float16)
    expected_q = q_pe.clone()
    ops.latent_append.reference(kv_a, weight, cos, sin, slots, expected, 1e-6, expected_q)
    with_kernel(monkeypatch, "latent_append", kernel)
    assert "cast to float32" in ops.latent_append.explain(kv_a, weight, cos, sin, slots, cache).reason
    ops.latent_append(kv_a, weight, cos, sin, slots, cache, 1e-6, q_pe)
    assert launched == [(torch.float32,) * 4]
    assert torch.equal(q_pe, expected_q)
    assert fallbacks(quiet) == [], "or PyTorch wrote them"
    written = ~cache.view(48, -1).isnan().any(-1)
    assert sorted(written.nonzero().flatten().tolist()) == sorted(s for s in slots.tolist() if s >= 0)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("heads", [None, 3])
def test_latent_append_fp8_through_float32_turns_the_queries_where_they_are(on_toy, monkeypatch, quiet, heads):
    """Rounded to float16 once, columns of a wider q; the cache is the caller's own."""
    launched = []

    def kernel(platform, kv_a, weight, cos, sin, slots, cache, eps, q_pe):
        launched.append((kv_a.dtype, weight.dtype, None if q_pe is None else q_pe.dtype, cache.data_ptr()))
        ops.get("latent_append_fp8").spec.reference(kv_a, weight, cos, sin, slots, cache, eps, q_pe)

    kv_a, weight, cos, sin, slots, cache, *_ = ops.get("latent_append_fp8").example(CPU, torch.float16, tokens=5)
    slots[3] = -1
    q = torch.randn(5, heads or 1, 192).to(torch.float16)
    expected, before = cache.clone(), q.clone()
    q_pe = None if heads is None else q[..., 128:]
    with_kernel(monkeypatch, "latent_append_fp8", kernel)
    assert "cast to float32" in ops.latent_append_fp8.explain(kv_a, weight, cos, sin, slots, cache).reason
    ops.latent_append_fp8(kv_a, weight, cos, sin, slots, cache, 1e-6, q_pe)
    wide = torch.float32
    assert launched == [(wide, wide, None if heads is None else wide, cache.data_ptr())]
    assert fallbacks(quiet) == [], "or PyTorch wrote them"
    ops.latent_append_fp8.reference(kv_a, weight, cos, sin, slots, expected, 1e-6)
    assert torch.equal(cache, expected)
    assert torch.equal(q[..., :128], before[..., :128])
    turned = before[..., 128:] if heads is None else ops.rope.reference(before[..., 128:], cos, sin)
    assert torch.equal(q[..., 128:], turned)


# supports()


def refuse(platform, dtypes, sizes):
    return f"rows of {sizes[0]} elements; the kernel takes 4" if sizes[0] != 4 else None


def test_supports_refuses_a_shape_by_name(on_toy):
    op = FakeOp(supports=refuse)
    assert op.explain(ones(5)) == ("toy_op", "toy", "reference", "rows of 5 elements; the kernel takes 4")
    op(ones(5))
    op(ones(4))
    assert op.calls == ["reference", "kernel"]


def test_supports_is_asked_about_platform_dtypes_and_sizes(on_toy):
    asked = []
    op = FakeOp(supports=lambda *args: asked.append(args))
    op(ones(7, torch.bfloat16))
    assert asked == [(on_toy, (torch.bfloat16,), (7,))]


def decode_example(**sizes):
    return ops.get("mla_decode").example(CPU, torch.bfloat16, **{"tokens": 2, "heads": 2, **sizes})


@pytest.mark.parametrize(
    "name, sizes, words",
    [
        ("mla_decode", {"kv_lora_rank": 384}, "384 + 64"),
        ("mla_decode", {"rope": 32}, "512 + 32"),
        ("mla_decode", {"page_size": 8}, "pages of 8 slots"),
        ("mla_decode_fp8", {"page_size": 8}, "pages of 8 slots"),
        ("mla_sparse", {"kv_lora_rank": 384}, "384 + 64"),
        ("mla_prefill", {"v": 64}, "192 / 64"),
        ("mla_prefill", {"nope": 64}, "128 / 128"),
        ("latent_append", {"kv_lora_rank": 128, "rope": 64}, "128 + 64"),
        ("rope", {"rope": 16}, "16 RoPE columns"),
        ("rms_norm", {"kv_lora_rank": 16385}, "16385 elements"),
    ],
)
def test_real_ops_refuse_sizes_they_were_not_written_for(on_toy, monkeypatch, name, sizes, words):
    op = ops.get(name)
    launched = []
    with_kernel(monkeypatch, name, lambda platform, *args: launched.append(args))
    args = op.example(CPU, torch.bfloat16, **{"tokens": 2, "heads": 2, **sizes})
    choice = op.explain(*args)
    assert choice.backend == "reference" and words in choice.reason
    getattr(ops, name)(*args)
    assert launched == []


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("mla_decode", {}),
        ("mla_decode", {"kv_lora_rank": 256, "rope": 32}),
        *(("mla_decode", {"page_size": p}) for p in (16, 32, 128)),
        *(("mla_decode_fp8", {"page_size": p}) for p in (16, 32, 64, 128)),
        *(("mla_sparse_fp8", {"page_size": p}) for p in (1, 61, 64)),
        ("mla_sparse", {}),
        ("mla_sparse", {"kv_lora_rank": 256, "rope": 32}),
        *(("mla_sparse", {"page_size": p}) for p in (1, 61, 576)),
        ("mla_prefill", {}),
        ("mla_prefill", {"nope": 192, "v": 256}),
        ("latent_append", {}),
        ("latent_append", {"kv_lora_rank": 256, "rope": 32}),
        ("rope", {}),
        ("rope", {"rope": 32}),
        ("rms_norm", {}),
        ("rms_norm", {"kv_lora_rank": 16384}),
    ],
)
def test_real_ops_take_the_models_sizes(on_toy, monkeypatch, name, sizes):
    op = ops.get(name)
    with_kernel(monkeypatch, name, lambda platform, *args: None)
    args = op.example(CPU, torch.bfloat16, **{"tokens": 2, "heads": 2, **sizes})
    assert op.explain(*args).backend == "kernel"


# A kernel that fails at its first use

FAILURES = [
    RuntimeError("PassManager::run failed\nand much more of it"),
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 65536."),
    NameError("cannot access name 'tile' in the generated source"),
    ImportError("no module named ninetoothed"),
    AssertionError(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failing_kernel_falls_back_once_and_for_all(on_toy, quiet, error):
    op = FakeOp(fail=always(error))
    for _ in range(5):
        assert torch.equal(op(ones()), torch.full((2, 4), 2.0))
    assert op.calls == ["kernel"] + ["reference"] * 5
    assert len(fallbacks(quiet)) == 1
    choice = op.explain(ones())
    assert choice.backend == "reference"
    for said in (fallbacks(quiet)[0], choice.reason):
        assert type(error).__name__ in said
        assert (str(error).splitlines() or ["no message"])[0] in said
        assert "\n" not in said
    assert "toy_op" in fallbacks(quiet)[0] and "toy" in fallbacks(quiet)[0]


def test_arguments_out_of_reach_do_not_count_for_others_of_their_sizes(on_toy, quiet):
    error = OutOfReach("x: too far apart")
    op = FakeOp(fail=lambda x: error if x[0, 0] == 1 else None)
    near, far = torch.zeros(2, 4), ones()
    with dispatch.record() as ran:
        for x, backend in ((far, "reference"), (near, "kernel"), (far, "reference"), (near, "kernel")):
            op(x)
            assert ran["toy_op"].backend == backend
    assert op.calls == ["kernel", "reference", "kernel", "kernel", "reference", "kernel"]
    (said,) = fallbacks(quiet)
    assert "x: too far apart" in said
    with ntops_mla.use(strict=True):
        op(near)
        for _ in range(2):
            with pytest.raises(StrictFallbackError, match="too far apart"):
                op(far)
    with ntops_mla.use("kernel"), pytest.raises(BackendUnavailableError, match="too far apart"):
        op(far)


def test_a_failure_counts_for_its_sizes_and_dtype_only(on_toy, quiet):
    op = FakeOp(fail=lambda x: RuntimeError("too wide") if x.shape[-1] == 8 and x.dtype == torch.float32 else None)
    for x in (ones(4), ones(8), ones(8, torch.bfloat16), ones(8), ones(4)):
        op(x)
    assert op.calls == ["kernel", "kernel", "reference", "kernel", "reference", "kernel"]
    assert op.explain(ones(4)).backend == "kernel"
    assert op.explain(ones(8)).backend == "reference"
    assert len(fallbacks(quiet)) == 1


def test_a_failure_counts_for_its_op_only(on_toy, quiet):
    broken, other = FakeOp("broken", fail=always(RuntimeError("no"))), FakeOp("other")
    broken(ones())
    other(ones())
    assert other.calls == ["kernel"]


def test_a_failure_counts_for_its_platform_only(on_toy, quiet):
    second = dataclasses.replace(on_toy, name="toy_two", aliases=())
    register_platform(second)
    try:
        op = FakeOp(fail=lambda x: RuntimeError("no") if op.platform is on_toy else None)
        op(ones())
        with ntops_mla.use(platform="toy_two"):
            assert op.explain(ones())[1:3] == ("toy_two", "kernel")
            op(ones())
        assert op.calls == ["kernel", "reference", "kernel"]
    finally:
        unregister_platform("toy_two")


def test_a_kernel_that_worked_and_fails_later_falls_back_too(on_toy, quiet):
    """The decision is kept after the first call; a later failure must still replace it."""
    op = FakeOp()
    op(ones())
    op.fail = always(RuntimeError("out of resource: threads"))
    assert torch.equal(op(ones()), torch.full((2, 4), 2.0))
    assert torch.equal(op(ones()), torch.full((2, 4), 2.0))
    assert op.calls == ["kernel", "kernel", "reference", "reference"]


def test_a_failure_behind_the_float32_gate_falls_back_with_the_callers_tensors(on_toy, quiet):
    op = FakeOp(fail=always(RuntimeError("no")))
    out = op(ones(dtype=torch.float16))
    assert out.dtype == torch.float16
    assert torch.equal(out, torch.full((2, 4), 2.0, dtype=torch.float16))


def test_reset_forgets_a_failure(on_toy, quiet):
    op = FakeOp(fail=always(RuntimeError("no")))
    op(ones())
    op.fail = always(None)
    dispatch.reset()
    op(ones())
    assert op.calls == ["kernel", "reference", "kernel"]


def test_threads_that_meet_a_failure_together_warn_once(on_toy, quiet):
    """All of them are inside the kernel before any of them fails."""
    gate = threading.Barrier(4)

    def fail(x):
        gate.wait(timeout=30)
        return RuntimeError("no")

    op = FakeOp(fail=fail)
    results = []
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(lambda: results.append(op(ones())),))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert op.calls.count("kernel") == 4
    assert len(results) == 4 and all(torch.equal(r, torch.full((2, 4), 2.0)) for r in results)
    assert len(fallbacks(quiet)) == 1


@pytest.mark.parametrize("name", ops.names())
def test_a_real_op_survives_a_broken_kernel(on_toy, monkeypatch, quiet, name):
    def kernel(platform, *args):
        raise RuntimeError("the code generator gave up")

    op, function = ops.get(name), getattr(ops, name)
    args = op.example(CPU, torch.bfloat16, tokens=3, heads=2)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = op.reference(*copies)
    with_kernel(monkeypatch, name, kernel)
    for _ in range(2):
        out = function(*args)
    if expected is None:
        out, expected = cache_of(name, args), cache_of(name, copies)
    for a, b in zip(_tensors(out), _tensors(expected)):
        assert torch.equal(a, b)
    assert len(fallbacks(quiet)) == 1
    assert "the code generator gave up" in function.explain(*args).reason


def _tensors(value):
    return value if isinstance(value, (tuple, list)) else (value,)


# Strict


def test_strict_raises_where_a_kernel_is_missing(on_toy):
    op = FakeOp(has_kernel=False)
    with ntops_mla.use(strict=True):
        for ask in (op, op.explain):
            with pytest.raises(StrictFallbackError, match=r"strict.*toy_op.*reference on toy.*no compiled kernel"):
                ask(ones())
    assert op.calls == []


def test_strict_raises_where_a_shape_is_refused(on_toy):
    op = FakeOp(supports=refuse)
    with ntops_mla.use(strict=True):
        op(ones(4))
        with pytest.raises(StrictFallbackError, match="rows of 5 elements"):
            op(ones(5))
    assert op.calls == ["kernel"]


def test_strict_raises_when_a_kernel_fails_and_ever_after(on_toy, quiet):
    cause = RuntimeError("out of registers")
    op = FakeOp(fail=always(cause))
    with ntops_mla.use(strict=True):
        with pytest.raises(StrictFallbackError, match=r"toy_op.*out of registers") as caught:
            op(ones())
        assert caught.value.__cause__ is cause
        with pytest.raises(StrictFallbackError, match=r"toy_op.*out of registers"):
            op(ones())
    assert op.calls == ["kernel"]
    assert fallbacks(quiet) == []


@pytest.mark.parametrize("has_kernel", [True, False])
def test_strict_allows_what_a_gate_asks_for(on_toy, has_kernel):
    op = FakeOp(has_kernel=has_kernel)
    with ntops_mla.use(strict=True):
        out = op(ones(dtype=torch.float64))
        assert op.explain(ones(dtype=torch.float64)).backend == "reference"
    assert op.calls == ["reference"] and out.dtype == torch.float64


@pytest.mark.parametrize("has_kernel", [True, False])
def test_strict_allows_what_the_user_asks_for(on_toy, has_kernel):
    op = FakeOp(has_kernel=has_kernel)
    with ntops_mla.use("reference", strict=True):
        op(ones())
        assert "asked for" in op.explain(ones()).reason
    assert op.calls == ["reference"]


@pytest.mark.parametrize("strict", ["0", 1])
def test_strict_is_a_bool(strict):
    with (
        pytest.raises(TypeError, match=f"strict must be True, False or None, got {strict!r}"),
        ntops_mla.use(strict=strict),
    ):
        pass


def test_strict_raises_on_an_unknown_device():
    op = FakeOp()
    with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match="no platform file recognises"):
        op(ones(), NOWHERE)
    assert op.calls == []


# Overrides


def test_reference_on_request(on_toy):
    op = FakeOp()
    with ntops_mla.use("reference"):
        assert op.explain(ones())[:3] == ("toy_op", "toy", "reference")
        op(ones())
    op(ones())
    assert op.calls == ["reference", "kernel"]


def test_a_kernel_on_request_runs(on_toy):
    op = FakeOp()
    with ntops_mla.use("kernel"):
        op(ones())
        op(ones(dtype=torch.float16))
    assert op.calls == ["kernel", "kernel"]


def test_a_kernel_that_cannot_run_is_refused_with_every_reason(on_toy, quiet):
    """The gate, the missing kernel and the size at once."""
    op = FakeOp(has_kernel=False, supports=refuse)
    with ntops_mla.use("kernel"):
        for ask in (op, op.explain):
            with pytest.raises(BackendUnavailableError) as caught:
                ask(ones(5, torch.float64))
            said = str(caught.value)
            for part in ("toy_op", "toy", "float64", "a toy knows no other dtype", "no compiled kernel", "rows of 5"):
                assert part in said, part
    assert op.calls == []


def test_a_remembered_failure_is_one_of_the_reasons(on_toy, quiet):
    op = FakeOp(fail=always(RuntimeError("out of registers")))
    op(ones())
    with ntops_mla.use("kernel"):
        for ask in (op, op.explain):
            with pytest.raises(BackendUnavailableError, match=r"failed here before.*out of registers"):
                ask(ones())
    assert op.calls == ["kernel", "reference"]


def test_a_kernel_on_request_that_fails_raises(on_toy, quiet):
    cause = NameError("name 'tile' is not defined")
    op = FakeOp(fail=always(cause))
    with ntops_mla.use("kernel"), pytest.raises(BackendUnavailableError, match=r"toy_op.*toy.*tile") as caught:
        op(ones())
    assert caught.value.__cause__ is cause
    assert op.calls == ["kernel"]
    assert fallbacks(quiet) == []


def test_a_kernel_on_request_names_an_unknown_device():
    with ntops_mla.use("kernel"), pytest.raises(BackendUnavailableError, match="unknown: no platform file recognises"):
        FakeOp()(ones(), NOWHERE)


def test_auto_takes_an_outer_override_back(on_toy):
    op = FakeOp()
    with ntops_mla.use("reference"), ntops_mla.use("auto"):
        op(ones())
    assert op.calls == ["kernel"]


# Errors that must not be hidden

DEVICE_ERRORS = {
    "illegal access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "triton's wording": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "assert": RuntimeError("CUDA error: device-side assert triggered"),
    "hip": RuntimeError("HIP error: unspecified launch failure"),
    "musa": RuntimeError("MUSA error: invalid configuration"),
    "triton, a watchdog": RuntimeError("Triton Error [CUDA]: the launch timed out and was terminated"),
    "triton, lost": RuntimeError("Triton Error [CUDA]: invalid program counter"),
    "triton, maca": RuntimeError("Triton Error [MACA]: an illegal address was encountered"),
    "maca": RuntimeError("MACA runtime error: unknown"),
    "maca's names": RuntimeError("mcErrorIllegalAddress"),
    "memory": torch.OutOfMemoryError("out of memory") if hasattr(torch, "OutOfMemoryError") else MemoryError(),
    # Torch before 2.5, and vendors' forks of it, raise the bare type with this message.
    "memory, old torch": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 79.1 GiB total)"),
    "memory, the host": MemoryError("out"),
}
if hasattr(torch, "AcceleratorError"):
    DEVICE_ERRORS["accelerator"] = torch.AcceleratorError("launch timed out")


@pytest.mark.parametrize("gate", [torch.float32, torch.float16], ids=["native", "float32"])
@pytest.mark.parametrize("error", DEVICE_ERRORS.values(), ids=DEVICE_ERRORS)
def test_device_errors_pass_and_are_not_remembered(on_toy, quiet, error, gate):
    op = FakeOp(fail=always(error))
    x = ones(dtype=gate)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            op(x)
        assert caught.value is error
    assert op.explain(x).backend == "kernel"
    op.fail = always(None)
    op(x)
    assert op.calls == ["kernel"] * 3
    assert fallbacks(quiet) == []


def _triton_error(name, message):
    """An error of a class as Triton has it, whatever its text."""
    return type(name, (Exception,), {"__module__": "triton.runtime.errors"})(message)


@pytest.mark.parametrize(
    "error",
    [
        _triton_error("PTXASError", "PTXAS error: Internal Triton PTX codegen error"),
        _triton_error("OutOfResources", "out of resource: shared memory, Required: 294912, Hardware limit: 232448"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("PTXAS error: `ptxas` failed with error code 255"),
        RuntimeError("MLIR error: pass failed"),
    ],
    ids=lambda error: str(error)[:24],
)
def test_errors_before_anything_ran_fall_back(on_toy, quiet, error):
    op = FakeOp(fail=always(error))
    for _ in range(2):
        assert op(ones()).eq(2).all()
    assert op.calls == ["kernel", "reference", "reference"]
    assert len(fallbacks(quiet)) == 1


def test_a_failure_under_strict_warns_when_it_first_falls_back(on_toy, quiet):
    op = FakeOp(fail=always(RuntimeError("out of registers")))
    with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match="out of registers"):
        op(ones())
    assert fallbacks(quiet) == []
    op(ones())
    op(ones())
    assert len(fallbacks(quiet)) == 1 and "out of registers" in fallbacks(quiet)[0]


# The board


def on_board(monkeypatch, **parts):
    """Every device has this board."""
    board = Board(get_platform("cpu"), **parts)
    monkeypatch.setattr(boards, "board_of", lambda detection: board)
    return board


def test_a_board_without_a_tile_is_a_reason(on_toy, monkeypatch, quiet):
    limits = Limits("T1", None, Fact(65536, "made up"), Fact(8, "made up"), Fact(64, "made up"))
    on_board(monkeypatch, limits=limits, triton=(3, 1))
    op = FakeOp(tiles=lambda board, dtypes, sizes: [Needed("toy_kernel", None)])
    choice = op.explain(ones())
    assert choice.backend == "reference"
    assert choice.reason == "no tile of toy_kernel for float32 and these sizes on CPU, T1, Triton 3.1"
    with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match="no tile of toy_kernel"):
        op(ones())


def test_a_tile_wider_than_the_board_is_a_reason(on_toy, monkeypatch):
    limits = Limits("T1", None, Fact(65536, "made up"), Fact(8, "made up"), Fact(64, "made up"))
    on_board(monkeypatch, limits=limits)
    tile = Tile("toy_kernel", {}, num_warps=16, num_stages=1, source="made up")
    op = FakeOp(tiles=lambda board, dtypes, sizes: [Needed("toy_kernel", tile)])
    assert op.explain(ones()).reason == "the tile of toy_kernel takes 16 warps, CPU, T1 at most 8"


def test_a_board_on_which_nothing_compiles_is_a_reason(on_toy, monkeypatch):
    on_board(monkeypatch, problem="Triton does not import: OSError: MACA_PATH is unset")
    op = FakeOp(tiles=lambda board, dtypes, sizes: [])
    assert "MACA_PATH is unset" in op.explain(ones()).reason


def test_behind_a_float32_gate_the_tile_is_float32s(on_toy, monkeypatch):
    on_board(monkeypatch)
    asked = []
    op = FakeOp(tiles=lambda board, dtypes, sizes: asked.append(dtypes) or [])
    op.explain(ones(dtype=torch.float16))
    assert asked == [(torch.float32,)]


def test_float32_behind_a_float32_gate_needs_no_cast(on_toy, monkeypatch, quiet):
    gates = {"*": {"*": Gate("float32", "this test says so")}}
    register_platform(dataclasses.replace(on_toy, name="caster", aliases=(), gates=gates))
    try:
        op = FakeOp()
        with ntops_mla.use(platform="caster"):
            for dtype in (torch.float32, torch.float16):
                assert op(ones(dtype=dtype)).dtype == dtype
        assert op.calls == ["kernel", "kernel"] and fallbacks(quiet) == []
    finally:
        unregister_platform("caster")


# Recording


def test_record_tells_what_ran(on_toy, quiet):
    op, other = FakeOp(), FakeOp("other_op", fail=always(RuntimeError("out of registers")))
    with dispatch.record() as ran:
        op(ones())
        with dispatch.record() as inner:
            other(ones())
    assert list(ran) == ["toy_op", "other_op"] and list(inner) == ["other_op"]
    assert ran["toy_op"].backend == "kernel"
    assert ran["other_op"].backend == "reference" and "out of registers" in ran["other_op"].reason
    op(ones(5))
    assert len(ran) == 2


@pytest.mark.parametrize("setting", [{"strict": True}, {"backend": "kernel"}], ids=str)
def test_device_errors_keep_their_type_under_overrides(on_toy, setting):
    error = DEVICE_ERRORS["illegal access"]
    with ntops_mla.use(**setting), pytest.raises(RuntimeError) as caught:
        FakeOp(fail=always(error))(ones())
    assert caught.value is error


def test_an_interrupt_passes(on_toy):
    op = FakeOp(fail=always(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        op(ones())
    assert op.explain(ones()).backend == "kernel"


def test_an_error_of_the_reference_is_the_callers(on_toy, quiet):
    """An argument that only its values show to be bad raises through the fallback as it does without a kernel."""

    def reference(x):
        raise ValueError("toy_op: x must not be negative")

    op = FakeOp(has_kernel=False)
    spec = dataclasses.replace(op.spec, reference=reference)
    with pytest.raises(ValueError, match="x must not be negative"):
        dispatch.call(spec, CPU, (ones(),))


# The environment


def test_the_environment_names_a_backend(on_toy_by_environment, monkeypatch):
    op = FakeOp()
    for value, backend in (("reference", "reference"), (" Kernel ", "kernel"), ("auto", "kernel"), ("", "kernel")):
        monkeypatch.setenv("NTOPS_MLA_BACKEND", value)
        dispatch.reset()
        op(ones(), NOWHERE)
        assert op.calls[-1] == backend
        assert op.explain(ones(), NOWHERE).backend == backend


def test_the_environment_asks_for_strictness(on_toy_by_environment, monkeypatch):
    op = FakeOp(has_kernel=False)
    monkeypatch.setenv("NTOPS_MLA_STRICT", "1")
    dispatch.reset()
    with pytest.raises(StrictFallbackError):
        op(ones(), NOWHERE)
    for value in ("0", ""):
        monkeypatch.setenv("NTOPS_MLA_STRICT", value)
        dispatch.reset()
        op(ones(), NOWHERE)
    assert op.calls == ["reference"] * 2


@pytest.mark.parametrize("name", ["toy", "plaything", " TOY "])
def test_the_environment_names_a_platform(platform, monkeypatch, name):
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", name)
    dispatch.reset()
    op = FakeOp()
    for device in (CPU, NOWHERE):
        assert op.explain(ones(), device).platform == "toy"
        op(ones(), device)
        assert op.platform is platform
    assert op.calls == ["kernel"] * 2


@pytest.mark.parametrize("device", [CPU, NOWHERE], ids=str)
@pytest.mark.parametrize(
    "variable, value, allowed",
    [
        ("NTOPS_MLA_BACKEND", "triton", ("auto", "kernel", "reference")),
        ("NTOPS_MLA_STRICT", "yes", ("0", "1")),
        ("NTOPS_MLA_PLATFORM", "abacus", ("nvidia", "mthreads", "cpu")),
    ],
)
def test_a_wrong_value_in_the_environment_is_named_with_those_allowed(monkeypatch, variable, value, allowed, device):
    monkeypatch.setenv(variable, value)
    dispatch.reset()
    op = FakeOp()
    for ask in (op, op.explain):
        with pytest.raises(ValueError) as caught:
            ask(ones(), device)
        assert all(word in str(caught.value) for word in (variable, value, *allowed)), caught.value
    assert op.calls == []


def test_use_wins_over_the_environment(platform, monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_BACKEND", "reference")
    monkeypatch.setenv("NTOPS_MLA_PLATFORM", "moore")
    dispatch.reset()
    op = FakeOp()
    with ntops_mla.use("auto", platform="toy"):
        op(ones(), NOWHERE)
    assert op.calls == ["kernel"]
    assert op.platform is platform


# use()


def test_use_nests_and_keeps_what_it_does_not_name(platform):
    with ntops_mla.use("reference"):
        with ntops_mla.use(strict=True, platform="plaything"):
            assert dispatch.settings() == dispatch.Settings("reference", True, "toy")
            with ntops_mla.use("kernel", strict=False):
                assert dispatch.settings() == dispatch.Settings("kernel", False, "toy")
            assert dispatch.settings() == dispatch.Settings("reference", True, "toy")
        assert dispatch.settings() == dispatch.Settings("reference", False, None)
    assert dispatch.settings() == dispatch.Settings()


def test_use_is_undone_by_an_exception():
    with pytest.raises(KeyError), ntops_mla.use("reference", strict=True):
        raise KeyError
    assert dispatch.settings() == dispatch.Settings()


@pytest.mark.parametrize(
    "arguments, allowed",
    [({"backend": "triton"}, ("auto", "kernel", "reference")), ({"platform": "abacus"}, ("nvidia", "cpu"))],
)
def test_use_refuses_what_it_does_not_know(arguments, allowed):
    with pytest.raises(ValueError) as caught, ntops_mla.use(**arguments):
        pytest.fail("the block ran")
    assert all(word in str(caught.value) for word in allowed)
    assert dispatch.settings() == dispatch.Settings()


def test_use_stays_in_its_thread(platform):
    seen = {}

    def look(name):
        seen[name] = dispatch.settings().backend

    with ntops_mla.use("reference"):
        # An empty context is what a thread starts with in most Pythons, not in all.
        thread = threading.Thread(target=contextvars.Context().run, args=(look, "other"))
        thread.start()
        thread.join()
        look("own")
    assert seen == {"own": "reference", "other": "auto"}


def test_use_in_another_context_does_not_reach_this_one(on_toy):
    op = FakeOp()

    def inner():
        with ntops_mla.use("reference"):
            op(ones())
            contextvars.copy_context().run(op, ones())

    contextvars.copy_context().run(inner)
    op(ones())
    assert op.calls == ["reference", "reference", "kernel"]


# Devices that no platform claims


def test_an_unknown_device_runs_pytorch_and_says_why(quiet):
    op = FakeOp()
    choice = op.explain(ones(), NOWHERE)
    assert choice[:3] == ("toy_op", "unknown", "reference")
    assert "no platform file recognises this device" in choice.reason and "meta" in choice.reason
    assert torch.equal(op(ones(), NOWHERE), torch.full((2, 4), 2.0))
    assert op.calls == ["reference"]


@pytest.mark.parametrize("by", ["use", "environment"])
@pytest.mark.parametrize("name", ["nvidia", "moore"])
def test_an_accelerators_kernel_is_not_launched_on_cpu_tensors(monkeypatch, name, by, quiet):
    """Named though it is: it would fail, and the failure would be remembered for the tensors that it can take."""
    if by == "environment":
        monkeypatch.setenv("NTOPS_MLA_PLATFORM", name)
        dispatch.reset()
    op = FakeOp()
    with ntops_mla.use(platform=name if by == "use" else None):
        choice = op.explain(ones())
        assert choice[1:3] == (name, "reference")
        assert "tensors on cpu" in choice.reason and name in choice.reason
        op(ones())
        with ntops_mla.use(strict=True), pytest.raises(StrictFallbackError, match="tensors on cpu"):
            op(ones())
        with ntops_mla.use("kernel"), pytest.raises(BackendUnavailableError, match="tensors on cpu"):
            op(ones())
    assert op.calls == ["reference"]
    assert fallbacks(quiet) == []


def test_the_cpu_runs_pytorch_by_its_own_gate():
    op = FakeOp()
    choice = op.explain(ones())
    assert choice[1:3] == ("cpu", "reference")
    assert "gate of cpu" in choice.reason
    with ntops_mla.use(strict=True):
        op(ones())
    assert op.calls == ["reference"]


# explain


@pytest.mark.parametrize("backend", ["auto", "kernel", "reference"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_explain_says_what_runs(on_toy, backend, strict, has_kernel, size, dtype):
    """The whole table: the same implementation, or the same error, and nothing runs for the asking."""
    op = FakeOp(has_kernel=has_kernel, supports=refuse)
    x = ones(size, dtype)
    with ntops_mla.use(backend, strict=strict):
        said = _outcome(lambda: op.explain(x).backend)
        assert op.calls == []
        ran = _outcome(lambda: op(x))
    if isinstance(said, str):
        assert op.calls == [said]
    else:
        assert op.calls == []
        assert (type(said), str(said)) == (type(ran), str(ran))


def _outcome(ask):
    try:
        return ask()
    except (BackendUnavailableError, StrictFallbackError) as error:
        return error


@pytest.mark.parametrize("name", ops.names())
def test_explain_of_a_real_op_leaves_its_arguments_alone(on_toy, monkeypatch, name):
    def kernel(platform, *args):
        pytest.fail("explain ran the kernel")

    op = ops.get(name)
    args = op.example(CPU, torch.bfloat16, tokens=3, heads=2)
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    with_kernel(monkeypatch, name, kernel)
    assert op.explain(*args) == (name, "toy", "kernel", "the platform's kernel")
    for a, b in zip((a for a in args if isinstance(a, torch.Tensor)), before):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["nvidia", "moore", "metax", "iluvatar", "cpu"])
def test_explain_can_pretend_every_platform(name):
    """Also one whose device type this torch has never heard of."""
    op = FakeOp()
    choice = op.explain(ones(dtype=torch.bfloat16), platform=get_platform(name))
    assert choice[1:3] == (name, "reference" if name == "cpu" else "kernel")
    args = ops.get("rms_norm").example(CPU, torch.bfloat16, tokens=2)
    assert ops.rms_norm.explain(*args, platform=get_platform(name)).platform == name
    assert ops.rms_norm.explain(*args, platform=name).platform == name
    assert op.calls == []


def test_explain_can_pretend_another_platform(platform):
    op = FakeOp()
    assert op.explain(ones(), platform=platform)[1:3] == ("toy", "kernel")
    assert op.explain(ones(), NOWHERE, platform=platform)[1:3] == ("toy", "kernel")
    assert op.explain(ones())[1:3] == ("cpu", "reference")
    args = ops.get("rope").example(CPU, torch.float64, tokens=2)
    assert "a toy knows no other dtype" in ops.rope.explain(*args, platform=platform).reason


def test_explain_takes_shapes_without_a_machine(platform):
    """Meta tensors cost nothing: how a large model's call is asked for on a small machine."""
    args = ops.get("mla_decode").example("meta", torch.bfloat16, tokens=512, heads=128)
    assert ops.mla_decode.explain(*args)[1:3] == ("unknown", "reference")
    # as far as the kernel is written
    assert ops.mla_decode.explain(*args, platform=platform).platform == "toy"


@pytest.mark.parametrize("name", ops.names())
def test_a_real_op_launches_on_its_platform(on_toy, monkeypatch, quiet, name):
    """The kernel gets the platform and the function's own arguments, defaults filled in; its result is the op's."""
    op, function = ops.get(name), getattr(ops, name)
    launches = []

    def kernel(platform, *args):
        launches.append((platform, args))
        return op.spec.reference(*args)

    args = op.example(CPU, torch.bfloat16, tokens=3, heads=2)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = op.reference(*copies)
    with_kernel(monkeypatch, name, kernel)
    out = function(*args)
    assert len(launches) == 1 and fallbacks(quiet) == []
    assert launches[0][0].platform is on_toy
    assert len(launches[0][1]) == len(args)
    for given, got in zip(args, launches[0][1]):
        if isinstance(given, torch.Tensor):
            assert (got.data_ptr(), got.shape, got.stride()) == (given.data_ptr(), given.shape, given.stride())
        else:
            assert got == given
    if expected is None:
        out, expected = cache_of(name, args), cache_of(name, copies)
    for a, b in zip(_tensors(out), _tensors(expected)):
        assert torch.equal(a, b)


# The table of decisions


def test_a_decision_is_made_once(on_toy):
    asked = []
    op = FakeOp(supports=lambda *args: asked.append(args))
    for _ in range(10):
        op(ones())
    assert len(asked) == 1
    op(ones(5))
    assert len(asked) == 2


def test_many_sizes_keep_the_table_bounded(on_toy, monkeypatch):
    monkeypatch.setattr(dispatch, "_MAX_DECISIONS", 16)
    op = FakeOp()
    for size in range(1, 100):
        op(ones(size))
        assert 1 <= len(dispatch._decisions) <= 16
    assert op.calls == ["kernel"] * 99


@pytest.mark.parametrize("name", ops.names())
def test_lengths_are_no_part_of_a_decision(name):
    """A server meets ever new numbers of tokens."""
    op, function = ops.get(name), getattr(ops, name)
    for tokens in range(1, 9):
        function(*op.example(CPU, torch.bfloat16, tokens=tokens, heads=2))
    assert len(dispatch._decisions) == 1


def test_a_platform_of_the_same_name_is_asked_anew(platform):
    """A registered platform that is replaced must not live on in the decisions."""
    op = FakeOp()
    with ntops_mla.use(platform="toy"):
        op(ones())
        unregister_platform("toy")
        changed = dataclasses.replace(platform, gates={"*": {"*": Gate("reference", "a toy that broke")}})
        register_platform(changed)
        op(ones())
        assert op.explain(ones()).backend == "reference"
    assert op.calls == ["kernel", "reference"]


def test_dispatch_is_where_the_package_says():
    for name in ("BackendUnavailableError", "Choice", "KernelFallbackWarning", "StrictFallbackError", "use"):
        assert getattr(ntops_mla, name) is getattr(importlib.import_module("ntops_mla.dispatch"), name)
    assert issubclass(BackendUnavailableError, RuntimeError) and issubclass(StrictFallbackError, RuntimeError)
    assert issubclass(KernelFallbackWarning, UserWarning)
