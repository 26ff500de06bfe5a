"""rope's kernel against float64."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel
from tests.test_ops import ROPE_VIEWS, ROUNDED, name_of, rope64, turns


def check(x, cos, sin):
    out = by_kernel(ops.rope, x, cos, sin)
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert_close(out, rope64(x, cos, sin), ROUNDED[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("heads", range(1, 21))
def test_heads(heads, width, dtype):
    check(torch.randn(3, heads, width).to(dtype), *turns(3, width))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("view", ROPE_VIEWS.values(), ids=ROPE_VIEWS)
def test_strided_input(view, dtype):
    """A head of 193 columns makes all strides odd."""
    for width in (192, 193):
        x = view(torch.randn(4, 9, width).to(dtype))
        x = x[..., :64] if x.shape[-1] > 64 else x
        check(x, *turns(x.shape[0], 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strided_cos_and_sin(dtype):
    """Halves of one table, and every second row of it; their size is not 1."""
    table = torch.randn(6, 64)[::2]
    check(torch.randn(3, 2, 64).to(dtype), table[:, :32], table[:, 32:])


@pytest.mark.parametrize("shape", [(0, 16, 64), (3, 0, 64)], ids=str)
def test_nothing(shape, launches):
    assert by_kernel(ops.rope, torch.empty(shape), *turns(shape[0], 64)).shape == shape
    assert launches == []


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    x, (cos, sin) = torch.randn(3, 5, 64).half(), turns(3, 64)
    before = [t.clone() for t in (x, cos, sin)]
    check(x, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip((x, cos, sin), before))
    assert launches == [("rope", (torch.float16, torch.float32, torch.float32, torch.float16))]


def test_tokens_far_apart(beyond_int32):
    x = beyond_int32((3, 2, 64), (2**30 + 8, 64, 1), torch.bfloat16)
    x.copy_(torch.randn(3, 2, 64))
    check(x, *turns(3, 64))


def test_heads_far_apart(beyond_int32):
    x = beyond_int32((2, 3, 64), (64, 2**30 + 8, 1), torch.bfloat16)
    x.copy_(torch.randn(2, 3, 64))
    check(x, *turns(2, 64))
