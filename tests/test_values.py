"""NTOPS_MLA_CHECK=1: ops look at the values of tables, lengths, slots and bounds, and name the first wrong one."""

import pytest
import torch

from ntops_mla import dispatch, ops
from ntops_mla.ops import _inspect


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()


def decode_args(table, lengths):
    """Of a cache of 5 pages of 16 slots."""
    q, cache = torch.randn(len(lengths), 1, 2, 576), torch.randn(5, 16, 576)
    table, lengths = torch.tensor(table, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    return q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, lengths, 0.1


@pytest.mark.parametrize(
    "table, lengths, words",
    [
        ([[0, 1], [2, 5]], [3, 17], "block_table must hold pages from 0 to 4, got 5 for request 1, position 1"),
        ([[0, 1], [-1, 2]], [3, 1], "block_table must hold pages from 0 to 4, got -1 for request 1, position 0"),
        ([[0, 1], [2, 3]], [3, 33], "seq_lens must be from 0 to 32, .* 2 pages, got 33 for request 1"),
        ([[0, 1], [2, 3]], [-2, 3], "seq_lens must be from 0 to 32, .* got -2 for request 0"),
    ],
)
def test_tables_and_lengths(checked, table, lengths, words):
    with pytest.raises(ValueError, match=f"^mla_decode: {words}"):
        ops.mla_decode(*decode_args(table, lengths))


def test_what_is_not_read_may_hold_anything(checked):
    out, _ = ops.mla_decode(*decode_args([[0, 2147480000], [2147480000, -7]], [16, 0]))
    assert (out[1] == 0).all()


def test_slots(checked):
    kv_a, weight, turns, cache = torch.randn(3, 576), torch.randn(512), torch.randn(3, 32), torch.zeros(2, 16, 576)
    for slots, words in (([0, 32, 1], "got 32 for token 1"), ([0, 1, -2], "got -2 for token 2")):
        with pytest.raises(ValueError, match=f"^latent_append: slots must be -1 or from 0 to 31, .*{words}"):
            ops.latent_append(kv_a, weight, turns, turns, torch.tensor(slots), cache)
    assert not cache.any()
    ops.latent_append(kv_a, weight, turns, turns, torch.tensor([0, -1, 31]), cache)
    assert cache.view(-1, 576)[[0, 31]].any(-1).all()


@pytest.mark.parametrize("name", ["latent_append_fp8", "latent_quantize", "latent_dequantize"])
def test_slots_of_an_fp8_cache(checked, name):
    args = list(ops.get(name).example("cpu", torch.float32, tokens=3, page_size=16))
    at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype == torch.int64)
    for slots, words in (([0, 32, 1], "got 32 for token 1"), ([0, 1, -2], "got -2 for token 2")):
        args[at] = torch.tensor(slots)
        with pytest.raises(ValueError, match=f"^{name}: slots must be -1 or from 0 to 31, .*{words}"):
            getattr(ops, name)(*args)


def test_bounds(checked):
    q, v, good = torch.randn(4, 2, 192), torch.randn(4, 2, 128), torch.tensor([0, 1, 4], dtype=torch.int32)
    bad = torch.tensor([0, 5, 4], dtype=torch.int32)
    ops.mla_prefill(q, q, v, good, good, 0.1)
    for name, bounds in (("cu_seqlens_q", (bad, good)), ("cu_seqlens_k", (good, bad))):
        with pytest.raises(ValueError, match=f"^mla_prefill: {name} must rise from 0 to 4, got"):
            ops.mla_prefill(q, q, v, *bounds, 0.1)


def test_indices():
    value = torch.tensor([[[0, -1, 9], [3, 2, 1]], [[0, 1, 2], [3, 10, 1]]], dtype=torch.int32)
    _inspect.indices("op", "indices", value, 11)
    with pytest.raises(
        ValueError, match=r"indices must be -1 or from 0 to 9, .*got 10 for request 1, token 1, position 1"
    ):
        _inspect.indices("op", "indices", value, 10)
    value[0, 0, 1] = -2
    with pytest.raises(ValueError, match="got -2 for request 0, token 0, position 1"):
        _inspect.indices("op", "indices", value, 11)


def test_nobody_looks_unless_asked(monkeypatch):
    def fail(*_):
        raise AssertionError("looked")

    monkeypatch.setattr(_inspect, "table", fail)
    ops.mla_decode(*decode_args([[0, 1]], [3]))
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()
    with pytest.raises(AssertionError, match="looked"):
        ops.mla_decode(*decode_args([[0, 1]], [3]))


def test_the_variable_is_0_or_1(monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_CHECK", "yes")
    dispatch.reset()
    with pytest.raises(ValueError, match="NTOPS_MLA_CHECK must be 0 or 1, got 'yes'"):
        ops.mla_decode(*decode_args([[0, 1]], [3]))
