"""mla_prefill's kernel against float64; the tile in the interpreter is 16 rows by 16 keys."""

import random

import pytest
import torch

from ntops_mla import ops
from ntops_mla.testing import assert_close
from tests.interpreted.numerics import DTYPES, by_kernel, check_prefill
from tests.test_ops import LSE, SINGLE, name_of, prefill_inputs

CASES = {
    "one": ([40], None),
    "one token": ([1], None),
    "single tokens": ([1, 1, 1], [1, 30, 17]),
    "a tile exactly": ([16], None),
    "borders": ([15, 16, 17], [15, 16, 17]),
    "empty requests": ([0, 5, 0, 0, 33, 1, 0], None),
    "histories": ([3, 1, 18, 0], [50, 9, 19, 7]),
    "histories at borders": ([16, 17], [32, 33]),
    "fewer keys than rows": ([5, 20, 2, 3], [2, 3, 0, 3]),
    "no key in a whole tile": ([35], [2]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES)
def test_requests(case, causal, dtype):
    check_prefill(prefill_inputs(*CASES[case], dtype=dtype, heads=2), causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("strided", [False, True], ids=["packed", "strided"])
@pytest.mark.parametrize("dqk, dv", [(192, 128), (256, 256)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_head_sizes(dqk, dv, strided, causal, dtype):
    """Strided: k and v as slices of one storage, heads outside in q, cu_seqlens with gaps."""
    args = prefill_inputs([20, 0, 7], [29, 3, 5], heads=2, dqk=dqk, dv=dv, strided=strided, dtype=dtype)
    check_prefill(args, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("heads", [1, 3, 16, 20])
def test_heads(heads, dtype):
    check_prefill(prefill_inputs([9, 4], [9, 6], heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_many_requests(dtype):
    """Each tile finds its own: empty ones in front, between and behind, and more requests than tokens."""
    check_prefill(prefill_inputs([0, 0, 3, 0, 16, 1, 0, 17, 0, 0, 2, 1, 1, 0], heads=1, dtype=dtype))
    check_prefill(prefill_inputs([0] * 9 + [1] + [0] * 7, [2] * 17, heads=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_odd_strides(dtype):
    """Columns that are not adjacent, rows of odd length, k repeated over heads without a copy."""
    q, k, v, *rest = prefill_inputs([7, 18], [20, 18], heads=3, dtype=dtype)
    apart = torch.full((*q.shape, 2), float("nan"), dtype=dtype)
    apart[..., 0] = q
    odd = torch.full((k.shape[0], 3, 193), float("nan"), dtype=dtype)
    odd[..., 1:] = k
    shared = v[:, :1].expand(-1, 3, -1)
    check_prefill((apart[..., 0], odd[..., 1:], shared, *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_flash_mlas_inputs(dtype):
    args = prefill_inputs([33, 5], [40, 5], heads=2, dtype=dtype)
    args[0].div_(10)
    check_prefill(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_keys_and_values_of_unit_variance(dtype):
    """Not in bfloat16, whose rounding of the weights alone is beyond the tolerance for values around 1."""
    args = prefill_inputs([33, 5], [40, 5], heads=2, dtype=dtype)
    args[1].mul_(10)
    args[2].mul_(10)
    check_prefill(args)


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign):
    """Scores of +-2000: nothing overflows; with -2000 the hidden ones must not win."""
    q, k, v, *rest, _ = prefill_inputs([20], [25], heads=1, dtype=torch.float32)
    out, lse = by_kernel(
        ops.mla_prefill, torch.full_like(q, sign * 10.0), torch.full_like(k, 10.0), v, *rest, 2000 / 19200
    )
    seen = torch.arange(6, 26)
    assert_close(lse[0], sign * 2000.0 + seen.log(), LSE)
    means = v.double().cumsum(0)[5:] / seen[:, None, None]
    assert_close(out, means, SINGLE)


def test_nothing(launches):
    args = prefill_inputs([0, 0], dtype=torch.float32)
    assert by_kernel(ops.mla_prefill, *args)[0].shape == (0, 3, 128)
    bounds = torch.zeros(1, dtype=torch.int32)
    assert by_kernel(ops.mla_prefill, *args[:3], bounds, bounds, 1.0)[0].shape == (0, 3, 128)
    assert launches == []
    args = prefill_inputs([0, 0], [5, 3], dtype=torch.float32)
    assert by_kernel(ops.mla_prefill, *args)[1].shape == (3, 0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_no_keys_at_all(causal):
    out, lse = check_prefill(prefill_inputs([3, 20], [0, 0], heads=2, dtype=torch.bfloat16), causal)
    assert not out.any() and (lse == float("-inf")).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_request_after_another_is_a_batch(dtype):
    """Bit for bit: what else is in the batch changes nothing."""
    q, k, v, _, _, scale = prefill_inputs([20, 0, 18], [25, 3, 18], heads=2, dtype=dtype)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    out, lse = by_kernel(ops.mla_prefill, q, k, v, ints(0, 20, 20, 38), ints(0, 25, 28, 46), scale)
    for rows, keys in ((slice(0, 20), slice(0, 25)), (slice(20, 38), slice(28, 46))):
        bounds = ints(0, rows.stop - rows.start), ints(0, keys.stop - keys.start)
        alone, alone_lse = by_kernel(ops.mla_prefill, q[rows], k[keys], v[keys], *bounds, scale)
        assert torch.equal(alone, out[rows]) and torch.equal(alone_lse, lse[:, rows])


def test_inputs_stay_and_the_kernel_takes_them_as_they_are(launches):
    args = prefill_inputs([20], [25], dtype=torch.bfloat16)
    before = [t.clone() for t in args[:5]]
    check_prefill(args)
    assert all(torch.equal(a, b) for a, b in zip(args, before))
    bf16, i32 = torch.bfloat16, torch.int32
    assert launches == [("mla_prefill", (*[bf16] * 5, i32, i32, bf16, torch.float32))]


def test_tokens_far_apart(beyond_int32):
    """q, k and v of more than 2^31 elements."""
    q, k, v, *rest = prefill_inputs([3], heads=2, dtype=torch.float16)
    far = [beyond_int32(t.shape, (2**30 + 8, t.shape[2], 1), t.dtype).copy_(t) for t in (q, k, v)]
    check_prefill((*far, *rest))


def test_heads_far_apart(beyond_int32):
    q, k, v, *rest = prefill_inputs([3], heads=3, dtype=torch.float16)
    far = [beyond_int32(t.shape, (t.shape[2], 2**30 + 8, 1), t.dtype).copy_(t) for t in (q, k, v)]
    check_prefill((*far, *rest))


@pytest.mark.parametrize("number", range(10))
def test_random_calls(number, _seed):
    draw = random.Random(int(torch.randint(1 << 30, ())))
    lengths = [draw.choice([0, 1, draw.randrange(20), draw.randrange(50)]) for _ in range(draw.randint(1, 5))]
    keys = [draw.choice([n, n + draw.randrange(40), draw.randrange(n + 1)]) for n in lengths]
    dqk, dv = draw.choice([(192, 128), (256, 256)])
    strided, heads = draw.random() < 0.5, draw.choice([1, 2, 3])
    args = prefill_inputs(lengths, keys, dtype=draw.choice(DTYPES), heads=heads, dqk=dqk, dv=dv, strided=strided)
    check_prefill(args, draw.random() < 0.7)


def test_without_an_lse():
    args = prefill_inputs([5, 0, 18], [7, 2, 17], heads=2, dtype=torch.bfloat16)
    out, lse = by_kernel(ops.mla_prefill, *args, want_lse=False)
    assert lse.shape == (0,) and torch.equal(out, by_kernel(ops.mla_prefill, *args)[0])
