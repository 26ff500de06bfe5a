"""What kernel_source.tidy leaves out of the generated source changes nothing, in the kernels that there are."""

import ast
import importlib

import numpy as np
import pytest
import torch

from ntops_mla import kernel, kernel_source, ops
from tests.interpreted.numerics import by_kernel
from tests.test_latent_fp8 import append_fp8_inputs, dequantize_inputs, quantize_inputs, queries
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_mla_sparse import sparse_inputs
from tests.test_ops import append_inputs, clones, decode_inputs, prefill_inputs, tensors, turns


def scheduled(lengths):
    return ops.mla_schedule.reference(torch.tensor(lengths, dtype=torch.int32), 16, 3)


# Rows, tokens and columns that fill no tile; pages in part; requests without rows, keys or both.
CALLS = {
    "rms_norm": [lambda: (torch.randn(3, 100), torch.randn(100)), lambda: (torch.randn(2, 512), torch.randn(512))],
    "rope": [lambda: (torch.randn(3, 21, 64), *turns(3, 64)), lambda: (torch.randn(2, 1, 32), *turns(2, 32))],
    "latent_append": [
        lambda: append_inputs(5, 16, torch.float32, strided=True),
        lambda: append_inputs(3, 2, torch.float32, 256, 32),
        lambda: (*append_inputs(3, 2, torch.float32), 1e-6, queries(3, 11, torch.float32)),
    ],
    "latent_append_fp8": [
        lambda: append_fp8_inputs(5, 16, torch.float32, strided=True),
        lambda: (*append_fp8_inputs(3, 2, torch.float32), 1e-6, queries(3, 11, torch.float32)),
    ],
    "latent_quantize": [lambda: quantize_inputs(3, 2, torch.float32)],
    "latent_dequantize": [lambda: dequantize_inputs(5, 16, torch.float32)],
    "mla_decode": [
        lambda: (*decode_inputs([33, 0], page_size=32, s_q=2, heads=9, dtype=torch.float32), True, 2),
        lambda: (*decode_inputs([3], page_size=16, latent=256, rope=32, dtype=torch.float32), True, 1),
        lambda: (*decode_inputs([530, 1], page_size=32, heads=3, dtype=torch.float32), True, None, scheduled([530, 1])),
    ],
    "mla_schedule": [lambda: (torch.tensor([300, 0, 7], dtype=torch.int32), 16, 5)],
    "mla_prefill": [
        lambda: prefill_inputs([5, 0, 17, 3], [7, 2, 16, 0], heads=1, dtype=torch.float32),
        lambda: prefill_inputs([3], heads=1, dqk=256, dv=256, dtype=torch.float32),
    ],
    "mla_decode_fp8": [
        lambda: (*fp8_inputs([33, 0], page_size=32, s_q=2, heads=9, dtype=torch.float32), True, 2),
        lambda: (*fp8_inputs([3], page_size=16, layout="apart", dtype=torch.float32), True, 1),
        lambda: (*fp8_inputs([530, 1], heads=3, dtype=torch.float32), True, None, scheduled([530, 1])),
    ],
    # Not mla_sparse_fp8: the untidied source compares int32 numbers with a bound beyond int32.
    "mla_sparse": [
        lambda: (*sparse_inputs([33, 0], 40, page_size=7, heads=9, lengths=[35, 9], dtype=torch.float32), 2, True),
        lambda: (*sparse_inputs([3], 5, page_size=1, latent=256, rope=32, dtype=torch.float32), 1, False),
    ],
}
checked = 0


def always_true(term):
    """Called by the kernels below with each term of a mask that `tidy` drops."""
    global checked
    checked += 1
    assert np.all(term.handle.data if hasattr(term, "handle") else term)
    return term


def forget():
    kernel.make.cache_clear()
    for name in ops.names():
        importlib.import_module(f"ntops_mla.ops.{name}")._made.cache_clear()


@pytest.fixture
def tidied_by(monkeypatch):
    """Makes all kernels anew, their source changed by the given function instead of by `tidy`."""

    def change(function):
        monkeypatch.setattr(kernel, "tidy", function)
        forget()

    yield change
    forget()


def untidied(source, name, loose):
    """Only the name by which the interpreter knows the language."""
    return source.replace("triton.language", "tl").replace("import tl", "import triton.language as tl", 1)


class _Check(ast.NodeTransformer):
    def __init__(self, dropped):
        self.dropped = dropped

    def visit_keyword(self, node):
        if node.arg == "mask":
            for term in ast.walk(node):
                if isinstance(term, ast.BinOp) and ast.unparse(term.right) in self.dropped:
                    term.right = ast.Call(ast.Name("always_true", ast.Load()), [term.right], [])
        return node


def results(name, args):
    args = clones(args)
    out = by_kernel(getattr(ops, name), *args)
    return [*tensors(out), *tensors(args)]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_as_the_source_as_generated(name, tidied_by):
    calls = [make() for make in CALLS[name]]
    tidied = [results(name, args) for args in calls]
    tidied_by(untidied)
    for args, expected in zip(calls, tidied):
        for value, wanted in zip(results(name, args), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_dropped_terms_are_true(name, tidied_by, monkeypatch):
    """Each is kept and looked at, in every program."""
    always, tidy = kernel_source._always, kernel_source.tidy
    dropped = set()

    def keep(term):
        if always(term):
            dropped.add(ast.unparse(term).replace("triton.language", "tl"))
        return isinstance(term, ast.Constant)

    def change(source, *rest):
        dropped.clear()
        tree = ast.parse(tidy(source, *rest))
        tree = ast.fix_missing_locations(_Check(dropped).visit(tree))
        assert dropped
        return f"from {__name__} import always_true\n{ast.unparse(tree)}\n"

    monkeypatch.setattr(kernel_source, "_always", keep)
    tidied_by(change)
    before = checked
    for make in CALLS[name]:
        results(name, make())
    assert checked > before
