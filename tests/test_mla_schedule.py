"""mla_schedule: its reference against the formula in Python's integers, what decode takes, and what is stale."""

import itertools
import random

import pytest
import torch

from ntops_mla import dispatch, ops
from ntops_mla.ops.mla_schedule import decode_schedule
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_ops import decode_inputs

OPEN = 2**31 - 1
BATCHES = {
    "one": [1000],
    "one empty": [0],
    "all empty": [0, 0, 0],
    "short": [1, 127, 128, 129, 255, 256, 257],
    "one long": [100_000, 5, 0, 300],
    "the long one last": [5, 0, 300, 100_000],
    "alike": [4096] * 16,
    "more than any table holds": [2**31 - 1, 300, 2**31 - 128, 2**31 - 1, 5],
    "negative, which counts as empty": [-5, 700],
    "random": [random.Random(0).randrange(5000) for _ in range(300)],
}


def wanted(lengths, parts):
    """(rows (request, first key, key behind the last one), first) of the docstring's formula."""
    blocks = [min(-(-max(length, 0) // 128), 2**30 // len(lengths)) for length in lengths]
    share = max(-(-sum(blocks) // parts), 2)
    rows, first = [], [0]
    for request, own in enumerate(blocks):
        splits = max(1, -(-own // share))
        keys = -(-own // splits) * 128
        ends = [(split + 1) * keys for split in range(splits - 1)] + [OPEN]
        rows += [(request, split * keys, end) for split, end in enumerate(ends)]
        first.append(len(rows))
    return rows, first


def check(schedule, lengths, parts):
    assert (schedule.shape, schedule.dtype) == ((len(lengths) + parts, 4), torch.int32)
    rows, first = wanted(lengths, parts)
    assert len(rows) <= len(schedule)
    assert schedule[: len(rows), :3].tolist() == [list(row) for row in rows]
    assert schedule[len(rows) :, :3].tolist() == [[-1, 0, 0]] * (len(schedule) - len(rows))
    assert schedule[:, 3].tolist() == first + [0] * (len(schedule) - len(first))


def lists(lengths):
    return torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("parts", [1, 2, 7, 264])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_reference(lengths, parts):
    check(ops.mla_schedule(lists(lengths), 16, parts), lengths, parts)


def test_no_requests():
    check(ops.mla_schedule(lists([]), 16, 3), [], 3)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_what_the_formula_promises(lengths):
    """Every key once, no split longer than the share, none empty but an empty request's."""
    for parts in (1, 3, 16, 500):
        schedule = ops.mla_schedule(lists(lengths), 16, parts)
        rows = schedule[schedule[:, 0] >= 0][:, :3].tolist()
        share = 128 * max(-(-sum(-(-max(n, 0) // 128) for n in lengths) // parts), 2)
        for request, length in enumerate(lengths):
            own = [(start, min(end, max(length, 0))) for b, start, end in rows if b == request]
            assert own[0][0] == 0 and own[-1][1] == max(length, 0)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(own))
            assert all(0 < end - start <= share for start, end in own) or length <= 0


@pytest.mark.parametrize(
    "lengths, rows, parts, error, words",
    [
        ([1, 2], 16, 4, TypeError, "seq_lens must be a tensor"),
        (torch.zeros(2, 2, dtype=torch.int32), 16, 4, ValueError, r"seq_lens must be \[B\]"),
        (torch.zeros(2), 16, 4, TypeError, "seq_lens must be of int32"),
        (lists([1]), 16, 0, ValueError, "num_parts must be at least 1, got 0"),
        (lists([1]), 16, 1.5, TypeError, "num_parts must be an integer, got 1.5"),
        (lists([1]), -1, None, ValueError, "rows must be at least 0, got -1"),
        (lists([1]), None, 4, TypeError, "rows must be an integer, got None"),
    ],
)
def test_bad_arguments(lengths, rows, parts, error, words):
    with pytest.raises(error, match=words):
        ops.mla_schedule(lengths, rows, parts)


# What decode takes


INPUTS = {"mla_decode": decode_inputs, "mla_decode_fp8": fp8_inputs}


@pytest.mark.parametrize("name", INPUTS)
def test_a_schedule_changes_nothing_in_pytorch(name):
    args = INPUTS[name]([300, 0, 1], heads=2, dtype=torch.float32)
    schedule = ops.mla_schedule(lists([300, 0, 1]), 16, 5)
    for one, other in zip(getattr(ops, name)(*args), getattr(ops, name)(*args, schedule=schedule)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "schedule, error, words",
    [
        ([1], TypeError, "schedule must be a tensor"),
        (torch.zeros(8, dtype=torch.int32), ValueError, r"schedule must be \[n, 4\]"),
        (torch.zeros(8, 3, dtype=torch.int32), ValueError, "with 4 in dimension 1"),
        (torch.zeros(8, 4), TypeError, "schedule must be of int32"),
        (torch.zeros(2, 4, dtype=torch.int32), ValueError, r"schedule must be one for 2 requests.*\[2, 4\]"),
        (torch.zeros(8, 4, dtype=torch.int32, device="meta"), ValueError, "schedule must be on the device of q_nope"),
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_bad_schedules(name, schedule, error, words):
    args = INPUTS[name]([3, 1], heads=2, dtype=torch.float32)
    with pytest.raises(error, match=words):
        getattr(ops, name)(*args, schedule=schedule)


@pytest.mark.parametrize("name", INPUTS)
def test_a_number_of_splits_and_a_schedule_are_refused(name):
    args = INPUTS[name]([3, 1], heads=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="num_splits must be None with a schedule, got 2"):
        getattr(ops, name)(*args, num_splits=2, schedule=ops.mla_schedule(args[-2], 16, 4))


@pytest.mark.parametrize("name", INPUTS)
def test_a_stale_schedule_is_named_where_values_are_looked_at(name, monkeypatch):
    args = INPUTS[name]([900, 40, 700], heads=2, dtype=torch.float32)
    seq_lens = args[-2]
    schedule = ops.mla_schedule(seq_lens, 16, 9)
    getattr(ops, name)(*args, schedule=ops.mla_schedule(lists([1, 1, 1]), 16, 9))  # unfair, and nobody asks
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()
    getattr(ops, name)(*args, schedule=schedule)
    seq_lens[2] = 1
    with pytest.raises(
        ValueError, match=f"{name}: schedule must be made of these seq_lens.*request 2 has 3 splits in it, and 1 by"
    ):
        getattr(ops, name)(*args, schedule=schedule)
    seq_lens[2] = 700
    schedule[1, 2] += 128
    with pytest.raises(ValueError, match=f"{name}: schedule must be made of these seq_lens.*row 1, column 2 is"):
        getattr(ops, name)(*args, schedule=schedule)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_scheduled_where_no_kernel_runs(device):
    assert decode_schedule(lists([5000, 10]).to(device), 16, 5000) is None


def test_nothing_waits_for_the_device():
    """The reference too: it runs where a board has no gate for the kernel."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
            return function(*args, **(kwargs or {}))

    with Refuse():
        ops.mla_schedule.reference(lists([300, 0, 1]), 16, 5)
