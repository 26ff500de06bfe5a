"""rms_norm's kernel against float64."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel
from tests.test_ops import HALF, ROUNDED, name_of, norm64


def check(x, weight, eps=1e-6):
    out = by_kernel(ops.rms_norm, x, weight, eps)
    assert out.dtype == x.dtype and out.shape == x.shape and out.is_contiguous()
    assert_close(out, norm64(x, weight, eps), ROUNDED[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", [1, 2, 32, 100, 512, 1536, 7168, 16384])
def test_widths(width, dtype):
    """Powers of two and others, whose tile is wider than the row."""
    check(torch.randn(3, width).to(dtype), torch.randn(width).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 3:515],  # as kv_a's latent: a larger row stride, an odd place
        lambda x: x[:, 1::2],
        lambda x: x[::2],
        lambda x: x.t(),
        lambda x: x.view(3, 2, 1024)[:, :, :100],
        lambda x: x[None, 3:4],
        lambda x: x[0],
    ],
    ids=["columns", "every second column", "every second row", "transposed", "three dimensions", "one row", "a vector"],
)
def test_strided_input(view, dtype):
    x = view(torch.randn(6, 1024).to(dtype))
    check(x, torch.randn(2 * x.shape[-1]).to(dtype)[::2])


@pytest.mark.parametrize("shape", [(0, 512), (3, 0, 512)], ids=str)
def test_no_tokens(shape, launches):
    assert by_kernel(ops.rms_norm, torch.empty(shape), torch.randn(512)).shape == shape
    assert launches == []


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_eps(dtype, eps):
    """Tiny rows are governed by it."""
    check((torch.randn(2, 512) * 1e-3).to(dtype), torch.randn(512).to(dtype), eps)
    if eps:
        assert torch.equal(by_kernel(ops.rms_norm, torch.zeros(2, 512), torch.ones(512), eps), torch.zeros(2, 512))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_squares_are_summed_in_float32(dtype):
    """300^2 is past float16, and a bfloat16 sum of 2048 squares stops growing."""
    check(torch.full((2, 2048), 300.0, dtype=dtype), torch.ones(2048, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_and_infinity_stay_in_their_row(dtype):
    x, weight = torch.randn(3, 100).to(dtype), torch.randn(100).to(dtype)
    x[1, 7] = float("nan")
    out = by_kernel(ops.rms_norm, x, weight)
    assert out[1].isnan().all()
    assert_close(out[[0, 2]], norm64(x[[0, 2]], weight, 1e-6), ROUNDED[dtype])


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    x, weight = torch.randn(3, 100).bfloat16(), torch.randn(100).bfloat16()
    before = x.clone(), weight.clone()
    check(x, weight)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    assert launches == [("rms_norm", (torch.bfloat16,) * 3)]


def test_rows_far_apart(beyond_int32):
    x = beyond_int32((3, 64), (2**30 + 8, 1), torch.bfloat16)
    x.copy_(torch.randn(3, 64))
    check(x, torch.randn(64).bfloat16())
