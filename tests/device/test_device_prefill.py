"""mla_prefill on the device against float64."""

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.device.on_device import DTYPES, NAN, check_prefill, on, pick, run, scaled
from tests.test_ops import LSE, SINGLE, name_of, prefill_inputs

pytestmark = pytest.mark.device
# New tokens and keys of each request; a tile of a device has up to 128 rows, one of the interpreter 16.
CASES = {
    "one": ([scaled(300)[0]], None),
    "one token": ([1], None),
    "single tokens": ([1, 1, 1], [1, 30, 17]),
    "a tile exactly": (scaled(128), None),
    "borders": (scaled(127, 128, 129, 63, 65), None),
    "empty requests": ([0, 5, 0, 0, 33, 1, 0], None),
    "histories": ([*scaled(30), 1, *scaled(140), 0], [*scaled(400), 9, *scaled(150), 7]),
    "histories at borders": (scaled(128, 136), scaled(256, 264)),
    "fewer keys than rows": ([5, 20, 2, 3], [2, 3, 0, 3]),
    "no key in a whole tile": (scaled(280), [2]),
    "no keys at all": ([3, 20], [0, 0]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES)
def test_requests(device, case, causal, dtype):
    check_prefill(device, prefill_inputs(*CASES[case], dtype=dtype, heads=2), causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("dqk, dv", [(192, 128), (256, 256)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_head_sizes(device, dqk, dv, strided, causal, dtype):
    """Strided: k and v as slices of one storage, heads outside in q, cu_seqlens with gaps."""
    lengths = scaled(160, 0, 56), scaled(232, 24, 40)
    check_prefill(device, prefill_inputs(*lengths, heads=2, dqk=dqk, dv=dv, strided=strided, dtype=dtype), causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 63, 64, 128])
def test_heads(device, heads, dtype):
    lengths = [pick(90, 3), pick(40, 2)], [pick(90, 3), pick(60, 4)]
    check_prefill(device, prefill_inputs(*lengths, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_many_requests(device, dtype):
    """Each tile finds its own: empty ones in front, between and behind, and more requests than tokens."""
    check_prefill(device, prefill_inputs([0, 0, 3, 0, 16, 1, 0, 17, 0, 0, 2, 1, 1, 0], heads=1, dtype=dtype))
    check_prefill(device, prefill_inputs([0] * 9 + [1] + [0] * 7, [2] * 17, heads=1, dtype=dtype))
    lengths = torch.randint(0, pick(60, 4), (pick(300, 12),)).tolist()
    check_prefill(device, prefill_inputs(lengths, heads=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_odd_strides(device, dtype):
    """Columns that are not adjacent, rows of odd length, v repeated over heads without a copy."""
    q, k, v, *rest = prefill_inputs(scaled(56, 144), scaled(160, 144), heads=3, dtype=dtype)
    apart = torch.full((*q.shape, 2), NAN, dtype=dtype)
    apart[..., 0] = q
    odd = torch.full((k.shape[0], 3, 193), NAN, dtype=dtype)
    odd[..., 1:] = k
    check_prefill(device, (apart[..., 0], odd[..., 1:], v[:, :1].expand(-1, 3, -1), *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_long_request(device, dtype):
    check_prefill(device, prefill_inputs([pick(2000, 50)], [pick(5000, 90)], heads=2, dtype=dtype))


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(device, sign):
    """Scores of +-2000: nothing overflows; with -2000 the hidden ones must not win."""
    args = list(prefill_inputs([40], heads=2, dtype=torch.float32))
    args[0].fill_(sign * 10.0)
    args[1].fill_(10.0)
    args[5] = 2000 / (192 * 100)
    out, lse = run(ops.mla_prefill, *on(device, args))
    assert_close(lse, (sign * 2000.0 + torch.arange(1, 41).double().log()).expand(2, -1), LSE)
    values = args[2].double().cumsum(0) / torch.arange(1, 41)[:, None, None]
    assert_close(out, values, SINGLE)


def test_nothing(device):
    args = on(device, prefill_inputs([0, 0], dtype=torch.bfloat16))
    assert run(ops.mla_prefill, *args)[0].shape == (0, 3, 128)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    assert run(ops.mla_prefill, *args[:3], bounds, bounds, 1.0)[0].shape == (0, 3, 128)
    args = on(device, prefill_inputs([0, 0], [5, 3], dtype=torch.bfloat16))
    assert run(ops.mla_prefill, *args)[1].shape == (3, 0)


def test_inputs_stay(device):
    args = prefill_inputs([20], [25], dtype=torch.bfloat16)
    given = on(device, args)
    run(ops.mla_prefill, *given)
    for value, before in zip(given[:5], args):
        assert torch.equal(value.cpu(), before)
