"""modules/linear: both orders of the operands give x W^T, and when which is taken."""

import pytest
import torch
import torch.nn.functional as F

from ntops_mla.modules import linear as module
from ntops_mla.modules.linear import linear, linear_with_room
from tests.test_ops import name_of


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 128, 129])
@pytest.mark.parametrize("columns", [64, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("amx", [True, False], ids=["amx", "no amx"])
def test_product(tokens, columns, dtype, amx, monkeypatch):
    monkeypatch.setattr(module, "_has_amx", lambda: amx)
    x, weight = torch.randn(tokens, columns).to(dtype), (torch.randn(40, columns) / columns**0.5).to(dtype)
    plain = []
    monkeypatch.setattr(F, "linear", lambda *args, own=F.linear: plain.append(args) or own(*args))
    out = linear(x, weight)
    few = amx and dtype == torch.bfloat16 and 2 <= tokens <= 128 and columns >= 1024
    assert len(plain) == (not few)
    exact = x.double() @ weight.double().t()
    # Rounded once, from sums of float32 at least
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == (tokens, 40)


def test_a_view_of_rows_and_a_bias():
    x, weight, bias = torch.randn(8, 2100).bfloat16()[:, 20:1044], torch.randn(24, 1024).bfloat16(), torch.randn(24)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x, weight, bias.bfloat16()), F.linear(x, weight, bias.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
def test_room_behind_the_result(dtype):
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(48, 64).to(dtype)
    with torch.no_grad():
        out = linear_with_room(x, weight, 16)
    assert torch.equal(out, F.linear(x, weight)) and out.is_contiguous()
    assert out.untyped_storage().nbytes() >= (out.numel() + 16) * out.element_size()


def test_where_gradients_are_recorded():
    x, weight = torch.randn(5, 64), torch.nn.Parameter(torch.randn(48, 64))
    linear_with_room(x, weight, 16).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(48, 64))


def test_compiled():
    x, weight = torch.randn(4, 1024).bfloat16(), torch.randn(24, 1024).bfloat16()
    for function in (linear, lambda *args: linear_with_room(*args, 8)):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, weight), F.linear(x, weight))
