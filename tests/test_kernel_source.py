"""kernel_source.tidy on sources made by hand, and what the generated source of every kernel must not hold."""

import ast
import functools
import importlib.util
import json
import operator
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ntops_mla import kernel_source
from ntops_mla.kernel_source import tidy

ROOT = Path(__file__).resolve().parent.parent
LANGUAGE = SimpleNamespace(arange=np.arange, language=SimpleNamespace(arange=np.arange))

# As NineToothed writes it: `{mask}` is where a load's mask goes.
SOURCE = """
import triton
import triton.language

@triton.jit
def scale(ninetoothed_x_pointer, ninetoothed_x_size_0, ninetoothed_x_size_1, ninetoothed_x_stride_0, ninetoothed_x_stride_1, lengths, ninetoothed_lengths_size_0, ninetoothed_lengths_stride_0, ninetoothed_constexpr_prefix_block: triton.language.constexpr, factor):
    ninetoothed_pid = triton.language.program_id(0)
    x_index_0 = ninetoothed_pid // ninetoothed_x_size_1
    x_index_1 = ninetoothed_pid % ninetoothed_x_size_1
    value = triton.language.load(ninetoothed_x_pointer + ADDRESS, mask=MASK, other=0)

def launch_scale(x, lengths, block, factor):
    scale[(1,)](x, x.size(0))
"""  # noqa: E501


def tidied(mask="True", address="x_index_0 * ninetoothed_x_stride_0", loose=()):
    return tidy(SOURCE.replace("ADDRESS", address).replace("MASK", mask), "scale", loose)


def load_of(source):
    """(address, terms of the mask or None, other or None) of the only load, as texts."""
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    call = next(n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "tl.load")
    keywords = {k.arg: k.value for k in call.keywords}
    terms = [ast.unparse(t) for t in kernel_source._terms(keywords["mask"])] if "mask" in keywords else None
    return ast.unparse(call.args[0]), terms, ast.unparse(keywords["other"]) if "other" in keywords else None


ARANGE = "triton.language.arange"
DROPPED = [
    "True",
    "(0 < 1)",
    "(0 >= 0)",
    f"({ARANGE}(0, 16) < 16)",
    f"({ARANGE}(0, 16)[None, ::] >= 0)",
    f"({ARANGE}(0, 64)[::,] + 512 < 576)",
    "(x_index_0 >= 0)",
    "(x_index_0 < ninetoothed_x_size_0 - 1 + 1)",
    "(x_index_1 % ninetoothed_x_size_1 < ninetoothed_x_size_1)",
    f"(x_index_0 * 16 + {ARANGE}(0, 16) >= 0)",
    "(x_index_0 * 0 >= 0)",
    "(x_index_0 * 0 < ninetoothed_x_size_0)",
    f"((x_index_1 * 16 + {ARANGE}(0, 16)[::, None]) // ninetoothed_x_size_1 >= 0)",
]
KEPT = [
    f"({ARANGE}(0, 16) < 15)",
    f"({ARANGE}(0, 16) >= 1)",
    f"({ARANGE}(0, 16) < ninetoothed_x_size_0)",
    f"({ARANGE}(0, 64)[::,] + 513 < 576)",
    f"(x_index_0 * 16 + {ARANGE}(0, 16) < ninetoothed_x_size_0)",
    f"((x_index_1 * 16 + {ARANGE}(0, 16)[::, None]) // ninetoothed_x_size_1 < ninetoothed_x_size_0)",
    f"((x_index_1 * 16 + {ARANGE}(0, 16)) % ninetoothed_x_size_1 < ninetoothed_x_size_0)",
    "(slot >= 0)",
    "(slot < 64)",
    "(factor > 0)",
    "(x_index_0 - 1 >= 0)",
    "(x_index_0 != 3)",
    "(0 > ninetoothed_x_size_0)",
    "(slot % 64 >= 0)",
    "(0 <= slot < 64)",
    "visible",
]


@pytest.mark.parametrize("term", DROPPED)
def test_terms_that_are_always_true_go(term):
    address, terms, other = load_of(tidied(f"True & {term} & {term}"))
    assert terms is None and other is None
    assert "x_index_0" in address


@pytest.mark.parametrize("term", KEPT)
def test_terms_that_may_be_false_stay_once(term):
    _, terms, other = load_of(tidied(f"{DROPPED[4]} & {term} & {term} & (0 < 1) & {term}"))
    wanted = ast.unparse(ast.parse(term.replace("triton.language", "tl"), mode="eval").body)
    assert terms == ["True", wanted] and other == "0"


def test_the_order_of_terms_stays():
    _, terms, _ = load_of(tidied("(slot >= 0) & (0 < 1) & (slot < 64) & (slot >= 0) & visible"))
    assert terms == ["True", "slot >= 0", "slot < 64", "visible"]


def test_an_or_is_one_term():
    _, terms, _ = load_of(tidied("((0 < 1) | visible) & (slot < 64)"))
    assert terms == ["True", "(0 < 1) | visible", "slot < 64"]


def test_sizes_and_loose_strides_are_not_specialised():
    for loose, more in (
        ((), []),
        (("lengths",), ["lengths", "ninetoothed_lengths_stride_0"]),
        (("factor", "x"), ["factor", "ninetoothed_x_stride_0", "ninetoothed_x_stride_1"]),
    ):
        tree = ast.parse(tidied(loose=loose))
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
        (decorator,) = function.decorator_list
        assert ast.unparse(decorator.func) == "triton.jit"
        (keyword,) = decorator.keywords
        assert keyword.arg == "do_not_specialize"
        sizes = ["ninetoothed_x_size_0", "ninetoothed_x_size_1", "ninetoothed_lengths_size_0"]
        assert sorted(ast.literal_eval(keyword.value)) == sorted(sizes + more)


def test_constexpr_arguments_are_never_named():
    source = tidied(loose=("ninetoothed_constexpr_prefix_block", "block"))
    assert "prefix_block" not in source.partition("def scale")[0]
    assert "ninetoothed_constexpr_prefix_block: tl.constexpr" in source


def test_the_language_has_its_short_name_and_the_launch_stays():
    source = tidied()
    assert "import triton.language as tl" in source and "tl.program_id(0)" in source
    assert source.count("triton.language") == 1
    assert source.partition("def launch_scale")[2] == "(x, lengths, block, factor):\n    scale[1,](x, x.size(0))\n"


def test_tidying_twice_changes_nothing():
    once = tidied(" & ".join([*DROPPED, *KEPT]), "(x_index_0 * 0 * 5 + 3 - 1 + 1) * 1 + 0")
    again = tidy(once.replace("tl", "triton.language").replace(" as triton.language", ""), "scale", ())
    assert again == once


# Any expression: values stay, bounds hold, and what is called always true is

# Few random comparisons are always true.
ANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def expressions():
    names = ["a_index_0", "a_index_1", "ninetoothed_a_size_0", "ninetoothed_a_size_1", "slot"]
    aranges = [f"{ARANGE}(0, 4)[::,]", f"{ARANGE}(2, 6)[::,]"]
    leaves = st.one_of(st.sampled_from([*names, *aranges]), st.integers(0, 8).map(str))

    def combine(inner):
        return st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(lambda t: f"({' '.join(t)})")

    return st.recursive(leaves, combine, max_leaves=8)


def environments():
    size = st.integers(0, 40)
    values = {"a_index_0": size, "a_index_1": size, "ninetoothed_a_size_0": size, "ninetoothed_a_size_1": size}
    return st.fixed_dictionaries({**values, "slot": st.integers(-40, 40)})


def value_of(tree, environment):
    code = ast.unparse(tree)
    try:
        with np.errstate(divide="raise"):
            return np.asarray(eval(code, {"triton": LANGUAGE, **environment}))
    except (ZeroDivisionError, FloatingPointError):
        assume(False)


def parsed(text):
    return ast.parse(text, mode="eval").body


def known(look, tree):
    """`look(tree)`; a division by nothing but 0 is no expression that there is."""
    try:
        return look(tree)
    except ZeroDivisionError:
        assume(False)


@settings(ANY)
@given(expressions(), environments())
def test_folding_keeps_values(text, environment):
    before = value_of(parsed(text), environment)
    after = value_of(ast.fix_missing_locations(kernel_source._Folder().visit(parsed(text))), environment)
    assert np.array_equal(np.broadcast_to(after, np.broadcast_shapes(before.shape, after.shape)), before)


@settings(ANY)
@given(expressions(), environments())
def test_bounds_hold(text, environment):
    tree = kernel_source._Folder().visit(parsed(text))
    bounds = known(kernel_source._range, tree)
    assume(bounds is not None)
    value = value_of(tree, environment)
    assert bounds[0] <= value.min() and value.max() <= bounds[1]


@settings(ANY, max_examples=400)
@given(
    expressions(), st.sampled_from(["<", ">="]), st.one_of(expressions(), st.integers(1, 99).map(str)), environments()
)
def test_always_true_is_always_true(left, comparison, right, environment):
    """But for what the grid promises: an index, or 0, is below an extent, and extents are at least 1."""
    tree = kernel_source._Folder().visit(parsed(f"{left} {comparison} {right}"))
    assume(known(kernel_source._always, tree))
    first, second = value_of(tree.left, environment), value_of(tree.comparators[0], environment)
    if comparison == "<":
        promised = isinstance(tree.left, ast.Name) and "_index_" in tree.left.id
        assume(not promised and kernel_source._value(tree.left) != 0 and second.min() > 0)
    assert (operator.lt if comparison == "<" else operator.ge)(first, second).all()


# The kernels' generated source

KERNELS = {
    "rms_norm": [{"width": 1536}, {"width": 512}],
    "rope": [{"block_h": 8}, {"block_h": 16, "width": 32}],
    "latent_append": [{"page_size": 64}, {"page_size": 16, "latent": 256, "rope": 32}],
    "latent_append_rope": [
        {"page_size": 64, "block_h": 16},
        {"page_size": 16, "block_h": 8, "latent": 256, "rope": 32},
    ],
    "latent_append_fp8": [{"page_size": 64}, {"page_size": 1}],
    "latent_append_fp8_rope": [{"page_size": 64, "block_h": 16}, {"page_size": 1, "block_h": 8}],
    "latent_quantize": [{"page_size": 64}, {"page_size": 1}],
    "latent_dequantize": [{"page_size": 64}, {"page_size": 1}],
    "mla_decode": [
        {"page_size": 64, "block_h": 64, "block_n": 64, "block_c": 256},
        {"page_size": 16, "block_h": 16, "block_n": 16, "block_c": 256, "latent": 256, "rope": 32},
        {"page_size": 128, "block_h": 16, "block_n": 32, "block_c": 512},
    ],
    "mla_decode_fp8": [
        {"page_size": 64, "block_h": 64, "block_n": 32, "hardware": 1},
        {"page_size": 16, "block_h": 16, "block_n": 16, "hardware": 0},
    ],
    "mla_sparse_fp8": [
        {"block_h": 32, "block_n": 32, "hardware": 1},
        {"block_h": 16, "block_n": 16, "hardware": 0},
    ],
    "mla_sparse": [
        {"block_h": 64, "block_n": 64, "block_c": 512},
        {"block_h": 16, "block_n": 16, "block_c": 256, "latent": 256, "rope": 32},
        {"block_h": 16, "block_n": 16, "block_c": 256},
    ],
    "mla_schedule": [{}],
    "mla_combine": [{}, {"latent": 256}],
    "mla_prefill": [
        {"block_m": 128, "block_n": 64},
        {"block_m": 16, "block_n": 16, "qk_width": 256, "v_width": 256},
    ],
}
CASES = [(name, index) for name, many in KERNELS.items() for index in range(len(many))]
MISSING = [name for name in ("triton", "ninetoothed") if importlib.util.find_spec(name) is None]
# Whose index along the first dimension can take its product with the stride past 2^31.
LARGE = {
    "rms_norm": {"input", "out"},
    "rope": {"q_pe", "out"},
    "latent_append": {"kv_cache", "pe_cache"},
    "latent_append_rope": {"kv_cache", "pe_cache", "q_pe", "q_out"},
    "latent_append_fp8": {"kv_a_latent", "kv_a_pe", "codes", "scales", "pe_cache"},
    "latent_append_fp8_rope": {"kv_a_latent", "kv_a_pe", "codes", "scales", "pe_cache", "q_pe", "q_out"},
    "latent_quantize": {"latent", "pe", "codes", "scales", "pe_cache"},
    "latent_dequantize": {"latent", "pe", "codes", "scales", "pe_cache"},
    "mla_decode": {"q_nope", "q_pe", "kv_cache", "pe_cache", "out"},
    "mla_sparse_fp8": {"q_nope", "q_pe", "codes", "scales", "pe", "out"},
    "mla_decode_fp8": {"q_nope", "q_pe", "codes", "scales", "pe", "out"},
    "mla_sparse": {"q_nope", "q_pe", "kv_cache", "pe_cache", "out"},
    "mla_schedule": set(),
    "mla_combine": {"part", "out"},
    "mla_prefill": {"q_lo", "q_hi", "k_lo", "k_hi", "v", "out"},
}
REDUCTIONS = {
    "sum",
    "max",
    "min",
    "argmax",
    "argmin",
    "reduce",
    "xor_sum",
    "cumsum",
    "cumprod",
    "associative_scan",
    "sort",
}
needs_ninetoothed = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def test_every_kernel_is_looked_at():
    assert set(KERNELS) == {path.stem for path in (ROOT / "kernels").glob("*.py")}


@functools.cache
def sources():
    """(kernel, index of its parameters) -> generated source, made where a driver that needs no device is active."""
    code = """
        import json, sys
        from ntops_mla import interpreter, kernel
        interpreter.install_driver()
        made = {n: [kernel.make(n, 4, 1, **p).source for p in many] for n, many in json.load(sys.stdin).items()}
        json.dump(made, sys.stdout)
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("NTOPS_MLA_INTERPRET", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        input=json.dumps(KERNELS),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {(name, i): source for name, many in json.loads(done.stdout).items() for i, source in enumerate(many)}


class Look:
    """What follows from the text of a kernel: ranks, which values are booleans, which are of 64 bits."""

    def __init__(self, source, name):
        self.function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
        self.ranks, self.booleans, self.wide = {}, set(), set()
        for _ in range(3):  # loops use what they assign further down
            for node in ast.walk(self.function):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        self._assign(target, node.value)

    def _assign(self, target, value):
        if isinstance(target, ast.Tuple):  # only split gives several
            for part in target.elts:
                self.ranks[part.id] = self.rank(value)
        else:
            self.ranks[target.id] = max(self.ranks.get(target.id, 0), self.rank(value))
            if self.is_boolean(value):
                self.booleans.add(target.id)
            if self.is_wide(value):
                self.wide.add(target.id)

    def calls(self, *names):
        for node in ast.walk(self.function):
            if isinstance(node, ast.Call) and self.called(node) in names:
                yield node

    @staticmethod
    def called(node):
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)

    def rank(self, node):
        if isinstance(node, ast.Name):
            return self.ranks.get(node.id, 0)
        if isinstance(node, ast.Subscript):
            if isinstance(node.value, ast.Tuple):  # a shape, of which one is taken
                return 0
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return len(parts)
        if isinstance(node, ast.Call):
            name = self.called(node)
            if name == "arange":
                return 1
            if name in ("zeros", "full", "reshape", "view"):
                return len(node.args[-1 if name in ("reshape", "view") else 0].elts)
            if name in REDUCTIONS - {"cumsum", "cumprod", "associative_scan", "sort"} or name == "split":
                return self.rank(node.args[0]) - 1
            return max([self.rank(argument) for argument in node.args], default=0)
        if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp)):
            return max((self.rank(child) for child in ast.iter_child_nodes(node)), default=0)
        return 0

    def is_boolean(self, node):
        if isinstance(node, ast.Compare):
            return True
        if isinstance(node, ast.Name):
            return node.id in self.booleans
        if isinstance(node, ast.Subscript):
            return self.is_boolean(node.value)
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.op, ast.Not) or self.is_boolean(node.operand)
        return isinstance(node, ast.BinOp) and self.is_boolean(node.left) and self.is_boolean(node.right)

    def is_wide(self, node):
        if isinstance(node, ast.Name):
            return node.id in self.wide
        if isinstance(node, ast.Subscript):
            return self.is_wide(node.value)
        if isinstance(node, ast.BinOp):
            return self.is_wide(node.left) or self.is_wide(node.right)
        if isinstance(node, ast.Call):
            if self.called(node) == "cast":
                return ast.unparse(node.args[1]) == "tl.int64"
            return self.called(node) in ("where", "minimum", "maximum") and any(map(self.is_wide, node.args))
        return False

    def bad_reductions(self):
        """Along the first axis of a tile, or all of them, of two dimensions."""
        for call in self.calls(*REDUCTIONS):
            axis = next((k.value for k in call.keywords if k.arg == "axis"), None)
            axis = axis or (call.args[1] if len(call.args) > 1 else None)
            value = ast.literal_eval(axis) if axis is not None else None
            if self.rank(call.args[0]) > 1 and value not in (1, -1):
                yield ast.unparse(call)

    def boolean_arithmetic(self):
        """A boolean that is cast or calculated with: MetaX has no cast of one to bfloat16."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.Call) and self.called(node) in ("cast", "to"):
                value = node.func.value if self.called(node) == "to" else node.args[0]
                if self.is_boolean(value):
                    yield ast.unparse(node)
            if isinstance(node, ast.BinOp) and not isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor)):
                if self.is_boolean(node.left) or self.is_boolean(node.right):
                    yield ast.unparse(node)

    def first_indices(self):
        """(tensor, index) of every product of an index and a tensor's first stride."""
        for node in ast.walk(self.function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Name):
                stride = kernel_source._STRIDE.match(node.right.id)
                if stride and stride[2] == "0":
                    yield stride[1], node.left


def look(body):
    return Look(f"def f(x_pointer):\n{textwrap.indent(textwrap.dedent(body), '    ')}", "f")


def test_the_look_sees_what_it_looks_for():
    tile = "s = tl.load(x_pointer + tl.arange(0, 16)[:, None] * 4 + tl.arange(0, 8)[None, :])\n"
    for bad in (
        "tl.sum(s, axis=0)",
        "tl.max(s * 2, 0)",
        "tl.sum(s)",
        "tl.sum(tl.exp(s - tl.max(s, axis=1)[:, None]), 0)",
    ):
        assert len(list(look(f"{tile}r = {bad}").bad_reductions())) == 1, bad
    for good in ("tl.sum(s, axis=1)", "tl.sum(tl.sum(s, axis=1), axis=0)", "tl.max(tl.arange(0, 4), 0)"):
        assert not list(look(f"{tile}r = {good}").bad_reductions()), good
    for bad in ("tl.cast(s < 3, tl.bfloat16)", "(s < 3) * s", "(s < 3).to(tl.float32)", "s + (visible & (s > 1))"):
        assert list(look(f"{tile}visible = s < 2\nr = {bad}").boolean_arithmetic()), bad
    assert not list(look(f"{tile}r = tl.where((s < 3) & (s > 1), s, 0)").boolean_arithmetic())
    wide = look("i = tl.cast(tl.load(x_pointer), tl.int64)\nr = tl.where(i > 0, i // 4, -1) * ninetoothed_x_stride_0")
    assert [wide.is_wide(index) for _, index in wide.first_indices()] == [True]
    narrow = look("i = tl.load(x_pointer)\nr = (i + 1) * ninetoothed_x_stride_0")
    assert [narrow.is_wide(index) for _, index in narrow.first_indices()] == [False]


@needs_ninetoothed
@pytest.mark.parametrize("name, index", CASES)
def test_nothing_that_a_platform_lacks(name, index):
    source = sources()[name, index]
    seen = Look(source, name)
    if name in ("mla_decode_fp8", "mla_sparse_fp8"):  # a code's bits are called a small float, and widened at once
        source, number = re.subn(
            r"tl\.cast\((\w+|tl\.cast\(\w+, tl\.int16\)), tl\.float(16|8e4nv), bitcast=True\), tl\.float32",
            "float32",
            source,
        )
        assert number
    assert not list(seen.bad_reductions())
    assert not list(seen.boolean_arithmetic())
    for word in (
        "float64",
        "fp64",
        "descriptor",
        "block_ptr",
        "libdevice",
        "inline_asm",
        "atomic",
        "float8",
        "tl.extra",
    ):
        assert word not in source, word
    # Types are the tensors' own, float32 or integers: nothing is computed in two bytes.
    assert "bfloat16" not in source and "float16" not in source


@needs_ninetoothed
@pytest.mark.parametrize("name, index", CASES)
def test_large_dimensions_are_indexed_in_64_bits(name, index):
    seen = Look(sources()[name, index], name)
    indexed = {}
    for tensor, expression in seen.first_indices():
        indexed.setdefault(tensor, []).append(seen.is_wide(expression))
    assert LARGE[name] <= set(indexed)
    for tensor in LARGE[name]:
        assert all(indexed[tensor]), f"{tensor}: {indexed[tensor]}"


@needs_ninetoothed
@pytest.mark.parametrize("name, index", CASES)
def test_what_counts_as_a_grid_index_is_one(name, index):
    """`tidy` knows them by their names, and that they are not negative."""
    function = Look(sources()[name, index], name).function
    names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and "_index_" in n.id}
    assigned = {}
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.For)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id in names:
                    assigned.setdefault(target.id, []).append(node)
    assert set(assigned) == names and names
    for nodes in assigned.values():
        (node,) = nodes
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        assert "ninetoothed_pid" in used
        assert all(n == "ninetoothed_pid" or kernel_source._SIZE.match(n) for n in used)


@needs_ninetoothed
@pytest.mark.parametrize("name, index", CASES)
def test_the_generated_source_is_tidy(name, index):
    """No mask has a term twice, nor one that is always true but the leading True; sizes are not specialised."""
    function = Look(sources()[name, index], name).function
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "mask":
            leading, *terms = kernel_source._terms(node.value)
            assert ast.unparse(leading) == "True" and terms
            assert not any(kernel_source._always(term) for term in terms)
            assert len({ast.unparse(term) for term in terms}) == len(terms)
    (decorator,) = function.decorator_list
    loose = set(ast.literal_eval(decorator.keywords[0].value))
    sizes = {a.arg for a in function.args.args if kernel_source._SIZE.match(a.arg)}
    assert sizes <= loose and not {a.arg for a in function.args.args if a.annotation is not None} & loose
    wide = {f"ninetoothed_{tensor}_stride_{i}" for tensor in LARGE[name] for i in range(4)}
    assert not wide & loose
