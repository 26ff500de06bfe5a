"""What a launch owes to its surroundings: graphs, streams, other devices, and the same bits every time."""

import pytest
import torch

from ntops_mla import flash_mla, ops
from ntops_mla.devices import detect, device_module, side_stream, synchronize
from tests.device.on_device import (
    DTYPES,
    NAMES,
    NAN,
    agree_decode,
    arguments,
    capture,
    check_outcome,
    on,
    outcome,
    pick,
    run,
    scaled,
)
from tests.test_ops import GARBAGE_PAGE, decode_inputs, name_of, norm64, rope64, turns

pytestmark = pytest.mark.device

PAGE, PAGES = pick(64, 16), pick(40, 6)  # slots of a page, pages of the longest request
MOST = PAGE * PAGES
# One step after the other: they grow within a page, into new pages and splits, are replaced, and end.
ROUNDS = [
    [1, 0, PAGE - 1, 2 * PAGE],
    [2, 1, PAGE, 2 * PAGE + 1],
    [PAGE + 1, 2, PAGE + 1, MOST - 1],
    [MOST // 2, PAGE * 3, 0, MOST - 1],
    [MOST - 1, MOST - 2, MOST - 3, MOST - 1],
    [0, 0, 0, 0],
    [3, MOST - 1, 0, 1],
]


class Buffers:
    """What a captured step reads, all on the device and in place for ever; `load` brings other requests into it."""

    def __init__(self, device, dtype, s_q, heads):
        self.device, self.dtype, self.s_q, self.heads = device, dtype, s_q, heads
        batch = len(ROUNDS[0])
        self.q = torch.zeros(batch, s_q, heads, 576, dtype=dtype, device=device)
        self.cache = torch.zeros(batch * PAGES + 2, PAGE, 576, dtype=dtype, device=device)
        self.table = torch.zeros(batch, PAGES, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)

    def load(self, lengths):
        """Fresh values of requests of these lengths; returns mla_decode's arguments on the CPU."""
        inputs = decode_inputs(lengths, s_q=self.s_q, heads=self.heads, page_size=PAGE, dtype=self.dtype)
        q_nope, q_pe, kv, pe, table, seq_lens, scale = inputs
        wide = torch.full(self.table.shape, GARBAGE_PAGE, dtype=torch.int32)
        columns = min(table.shape[1], PAGES)
        wide[:, :columns] = table[:, :columns]
        cache = torch.full(self.cache.shape, NAN, dtype=self.dtype)
        cache[: len(kv)] = torch.cat([kv, pe], -1)
        self.q.copy_(torch.cat([q_nope, q_pe], -1))
        self.cache.copy_(cache)
        self.table.copy_(wide)
        self.seq_lens.copy_(seq_lens)
        return q_nope, q_pe, cache[..., :512], cache[..., 512:], wide, seq_lens, scale

    def schedule(self):
        return run(ops.mla_schedule, self.seq_lens, self.s_q * self.heads, 7)

    def decode(self, schedule=None):
        q, cache = self.q, self.cache
        args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], self.table, self.seq_lens, 576**-0.5
        # Chosen on a device, where the table has room for several; the interpreter's is too narrow for that.
        splits = pick(None, 3) if schedule is None else None
        return list(run(ops.mla_decode, *args, num_splits=splits, schedule=schedule))


def replayed(captured, device):
    for result in captured.result:
        result.fill_(NAN)
    captured.replay()
    synchronize(device)
    return captured.result


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("s_q, heads", [(1, 16), (2, 3), (1, 128)])
def test_a_graph_of_decode_is_replayed_with_other_lengths(device, s_q, heads, dtype):
    heads = min(heads, pick(128, 3))
    buffers = Buffers(device, dtype, s_q, heads)
    buffers.load(ROUNDS[0])
    captured = capture(device, buffers.decode)
    for lengths in ROUNDS:
        args = buffers.load(lengths)
        agree_decode(args, *replayed(captured, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("stale", [False, True], ids=["scheduled in the graph", "scheduled before"])
def test_a_graph_of_scheduled_decode_is_replayed_with_other_lengths(device, stale, dtype):
    """The schedule follows the lengths; one of the first lengths is as exact."""
    buffers = Buffers(device, dtype, 1, pick(16, 3))
    buffers.load(ROUNDS[0])
    before = buffers.schedule()
    captured = capture(device, lambda: buffers.decode(before if stale else buffers.schedule()))
    for lengths in ROUNDS:
        args = buffers.load(lengths)
        agree_decode(args, *replayed(captured, device))


def test_a_graph_of_flash_mla_is_replayed_with_other_lengths(device):
    """Two layers with one pair of metadata, whose schedule is made within the graph."""
    buffers = Buffers(device, torch.bfloat16, 1, pick(16, 3))
    buffers.load(ROUNDS[0])

    def layers():
        meta, splits = flash_mla.get_mla_metadata()
        given = buffers.q, buffers.cache[:, :, None], buffers.table, buffers.seq_lens, 512, meta, splits
        results = [flash_mla.flash_mla_with_kvcache(*given, causal=True) for _ in range(2)]
        return [value for result in results for value in result]

    captured = capture(device, layers)
    for lengths in ROUNDS:
        args = buffers.load(lengths)
        results = replayed(captured, device)
        for out, lse in (results[:2], results[2:]):
            agree_decode(args, out, lse.masked_fill(lse == float("inf"), float("-inf")))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_graph_of_append_and_decode_is_replayed_with_grown_lengths(device, dtype):
    """A step writes the new token's row and attends over it, all lengths and slots read on the device."""
    buffers = Buffers(device, dtype, 1, pick(16, 3))
    batch = len(ROUNDS[0])
    kv_a = torch.zeros(batch, 576, dtype=dtype, device=device)
    # Rows about as large as those of the cache, whatever kv_a is.
    weight = (torch.rand(512) / 5).to(dtype)
    device_weight = weight.to(device)
    cos, sin = (torch.zeros(batch, 32, device=device) for _ in range(2))
    slots = torch.zeros(batch, dtype=torch.int64, device=device)

    def step():
        run(ops.latent_append, kv_a, device_weight, cos, sin, slots, buffers.cache, 1e-6)
        return buffers.decode()

    def load(lengths):
        """`lengths` are those before the step; 0 stays empty and is skipped. -> the arguments with the rows in."""
        after = [length + 1 if length else 0 for length in lengths]
        args = buffers.load(after)
        cache, table = torch.cat(args[2:4], -1), args[4]
        new, turn = torch.randn(batch, 576), turns(batch, 64)
        new[:, 512:] /= 10
        new = new.to(dtype)
        rows = torch.cat([norm64(new[:, :512], weight, 1e-6), rope64(new[:, 512:], *turn)], -1).to(dtype)
        where = torch.full((batch,), -1)
        for b, length in enumerate(lengths):
            if length:
                page = int(table[b, length // PAGE])
                where[b] = page * PAGE + length % PAGE
                cache[page, length % PAGE] = NAN  # as it is before the step
        buffers.cache.copy_(cache)
        for b, slot in enumerate(where.tolist()):
            if slot >= 0:
                cache.view(-1, 576)[slot] = rows[b]
        for target, value in zip((kv_a, cos, sin, slots), (new, *turn, where)):
            target.copy_(value)
        return *args[:2], cache[..., :512], cache[..., 512:], *args[4:]

    load(ROUNDS[0])
    captured = capture(device, step)
    for lengths in ROUNDS:
        args = load(lengths)
        agree_decode(args, *replayed(captured, device))
        # And nothing but the new rows was written.
        whole = torch.cat(args[2:4], -1)
        assert torch.equal(buffers.cache.isnan().cpu(), whole.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(device, name, dtype):
    args = arguments(name, dtype)
    first = outcome(name, on(device, args))
    for _ in range(pick(20, 2)):
        for result, again in zip(first, outcome(name, on(device, args)), strict=True):
            torch.testing.assert_close(again, result, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_of_a_large_decode(device):
    """Programs of all processors, in splits."""
    lengths = torch.randint(0, pick(3000, 40), (pick(64, 4),)).tolist()
    args = on(device, decode_inputs(lengths, heads=pick(128, 3), dtype=torch.bfloat16))
    out, lse = run(ops.mla_decode, *args, num_splits=4)
    for _ in range(pick(50, 2)):
        again, lse_again = run(ops.mla_decode, *args, num_splits=4)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)


def keep_busy(device):
    """Some milliseconds of work in the current stream."""
    x = torch.ones(pick(4096, 16), pick(4096, 16), device=device)
    for _ in range(20):
        x = x @ x / x.shape[0]
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_a_second_stream(device, name, dtype):
    """The inputs come late, in the stream that is current at the call: whoever launches elsewhere reads NaN."""
    args = arguments(name, dtype)
    given = on(device, args)
    late = on(device, args)
    outcome(name, on(device, args))  # compiles, and keeps a launch that the default stream was current for
    for value in late:
        if isinstance(value, torch.Tensor):
            value.fill_(NAN if value.is_floating_point() else 0)
    synchronize(device)
    with side_stream(device):
        keep_busy(device)
        for value, source in zip(late, given):
            if isinstance(value, torch.Tensor):
                value.copy_(source)
        results = outcome(name, late)
    synchronize(device)
    check_outcome(name, args, results)


@pytest.mark.parametrize("name", NAMES)
def test_another_device_than_the_current_one(device, name):
    module = device_module(device)
    if module.device_count() < 2:
        pytest.skip("one device only")
    other = torch.device(device.type, (device.index + 1) % module.device_count())
    if detect(other).platform is not detect(device).platform:
        pytest.skip(f"{other} is of another platform")
    args = arguments(name, torch.bfloat16)
    with module.device(device):
        for target in (other, device, other):
            results = outcome(name, on(target, args))
            assert {result.device for result in results} == {target}
            check_outcome(name, args, results)
            assert module.current_device() == device.index


def test_lengths_change_between_calls_without_a_graph(device):
    """The cached launch holds sizes and never lengths."""
    buffers = Buffers(device, torch.bfloat16, 1, pick(20, 3))
    for lengths in ROUNDS:
        args = buffers.load(lengths)
        agree_decode(args, *buffers.decode())
    # Nor the tensors: other ones of the same sizes, at other addresses.
    for _ in range(3):
        args = decode_inputs(scaled(300, 17), dtype=torch.bfloat16)
        agree_decode(args, *run(ops.mla_decode, *on(device, args)))
