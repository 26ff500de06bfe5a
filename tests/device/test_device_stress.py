"""Shapes drawn at random for a while. NTOPS_MLA_STRESS_SECONDS: how long (default 30, in the interpreter 5)."""

import os
import random
import time

import pytest
import torch

from ntops_mla import ops
from tests import test_latent_fp8 as fp8
from tests.device.on_device import DTYPES, NAMES, check_outcome, on, outcome, pick
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_mla_sparse import LAYOUTS as SPARSE_LAYOUTS
from tests.test_mla_sparse import sparse_inputs
from tests.test_mla_sparse_fp8 import sparse_fp8_inputs
from tests.test_ops import append_inputs, decode_inputs, name_of, prefill_inputs, turns

pytestmark = pytest.mark.device
SECONDS = float(os.environ.get("NTOPS_MLA_STRESS_SECONDS") or pick(30, 5))
LONGEST = pick(3000, 40)
HEADS = pick((1, 2, 3, 5, 8, 16, 17, 20, 32, 40, 63, 64, 96, 128), (1, 2, 3, 5))
LAYOUTS = ("joined", "rows padded", "apart", "odd strides", "swapped")


def a_length(draw):
    """Mostly short; now and then at a border, empty or long."""
    return draw.choice(
        [0, 1, draw.randrange(20), draw.randrange(LONGEST // 8 + 1), draw.randrange(LONGEST), pick(64, 16)]
    )


def a_schedule(draw, lengths, splits):
    """Of these lengths or of others, now and then."""
    if splits is not None or draw.random() < 0.5:
        return None
    made_of = lengths if draw.random() < 0.5 else [a_length(draw) for _ in lengths]
    return ops.mla_schedule.reference(torch.tensor(made_of, dtype=torch.int32), 16, draw.choice([1, 7, 264]))


def draw_call(name, draw):
    """(words that tell a call, its arguments on the CPU)."""
    dtype, strided = draw.choice(DTYPES), draw.random() < 0.5
    if name == "rms_norm":
        rows, width = draw.randrange(1, pick(400, 5)), draw.choice([1, 7, 100, 512, 1536, 2048, 7168, 16384])
        x = torch.randn(rows, width + 3).to(dtype)[:, 2 : 2 + width] if strided else torch.randn(rows, width).to(dtype)
        return f"{rows} x {width}", [x, torch.randn(width).to(dtype), 10 ** draw.uniform(-6, -2)]
    if name == "rope":
        tokens, heads, width = draw.randrange(1, pick(400, 5)), draw.choice(HEADS), draw.choice([64, 32])
        x = torch.randn(tokens, heads, 3 * width + 1).to(dtype)
        x = x[..., 1 : 1 + width] if strided else x[..., :width].contiguous()
        return f"{tokens} x {heads} x {width}", [x, *turns(tokens, width)]
    if name == "latent_append":
        tokens, page = draw.randrange(1, pick(400, 9)), draw.choice([1, 2, 16, 32, 64, 128])
        sizes = draw.choice([(512, 64), (256, 32)])
        args = append_inputs(tokens, page, dtype, *sizes, -(-tokens // page) + 2, strided)
        args[4][torch.rand(tokens) < draw.choice([0, 0.2])] = -1
        heads, rope = draw.choice([None, *HEADS]), sizes[1]
        q_pe = None if heads is None else torch.randn(tokens, heads, 3 * rope).to(dtype)[..., rope : 2 * rope]
        if heads is not None and not strided:
            q_pe = q_pe.contiguous()
        return f"{tokens} tokens, pages of {page}, {sizes}, {heads} query heads", [*args, 1e-6, q_pe]
    if name in fp8.NAMES:
        tokens, heads = draw.randrange(1, pick(400, 9)), draw.choice([None, *HEADS])
        return f"{tokens} tokens, {heads} query heads", fp8.arguments(name, dtype, tokens, heads)
    if name == "mla_decode":
        lengths = [a_length(draw) for _ in range(draw.randint(1, pick(12, 4)))]
        sizes = dict(heads=draw.choice(HEADS), s_q=draw.choice([1, 1, 2, 3, 4]))
        sizes.update(page_size=draw.choice([16, 32, 64, 128]), layout=draw.choice(LAYOUTS), strided=strided)
        sizes["latent"], sizes["rope"] = draw.choice([(512, 64), (256, 32)])
        causal, splits = draw.random() < 0.7, draw.choice([None, None, 1, 2, 3, 5, 11, 64])
        schedule = a_schedule(draw, lengths, splits)
        words = f"{lengths}, {sizes}, causal {causal}, {splits} splits, schedule {schedule is not None}"
        return words, [*decode_inputs(lengths, dtype=dtype, **sizes), causal, splits, schedule]
    if name == "mla_decode_fp8":
        lengths = [a_length(draw) for _ in range(draw.randint(1, pick(12, 4)))]
        sizes = dict(heads=draw.choice(HEADS), s_q=draw.choice([1, 1, 2, 3, 4]), strided=strided)
        sizes.update(page_size=draw.choice([16, 32, 64, 128]), layout=draw.choice(["packed", "apart"]))
        causal, splits = draw.random() < 0.7, draw.choice([None, None, 1, 2, 3, 5, 11, 64])
        schedule = a_schedule(draw, lengths, splits)
        words = f"{lengths}, {sizes}, causal {causal}, {splits} splits, schedule {schedule is not None}"
        return words, [*fp8_inputs(lengths, dtype=dtype, **sizes), causal, splits, schedule]
    if name == "mla_schedule":
        lengths = [a_length(draw) for _ in range(draw.randint(1, pick(600, 40)))]
        parts = draw.choice([None, 1, 7, 264])
        return f"{lengths}, {parts} parts", [torch.tensor(lengths, dtype=torch.int32), draw.choice(HEADS), parts]
    if name == "mla_sparse_fp8":
        topk, s_q = 1 + a_length(draw), draw.choice([1, 1, 2, 3])
        counts = [draw.randint(0, topk) for _ in range(s_q * draw.randint(1, pick(12, 3)))]
        sizes = dict(heads=draw.choice(HEADS), s_q=s_q, layout=draw.choice(["packed", "apart"]), strided=strided)
        sizes["page_size"], sizes["pages"] = draw.choice([1, 2, 61, 64, 69, 576]), draw.randint(1, 9)
        splits, want_max = draw.choice([None, None, 1, 2, 3, 5, 11, 64]), draw.random() < 0.5
        words = f"{counts} of {topk}, {sizes}, {splits} splits, want_max {want_max}"
        return words, [*sparse_fp8_inputs(counts, topk, dtype=dtype, **sizes), splits, want_max]
    if name == "mla_sparse":
        topk, s_q = 1 + a_length(draw), draw.choice([1, 1, 2, 3])
        counts = [draw.randint(0, topk) for _ in range(s_q * draw.randint(1, pick(12, 3)))]
        sizes = dict(heads=draw.choice(HEADS), s_q=s_q, layout=draw.choice(SPARSE_LAYOUTS), strided=strided)
        sizes["page_size"], sizes["pages"] = draw.choice([1, 2, 61, 64, 69, 576]), draw.randint(1, 9)
        sizes["latent"], sizes["rope"] = draw.choice([(512, 64), (256, 32)])
        sizes["lengths"] = draw.choice([None, [draw.randint(-1, topk + 1) for _ in counts]])
        splits, want_max = draw.choice([None, None, 1, 2, 3, 5, 11, 64]), draw.random() < 0.5
        words = f"{counts} of {topk}, {sizes}, {splits} splits, want_max {want_max}"
        return words, [*sparse_inputs(counts, topk, dtype=dtype, **sizes), splits, want_max]
    lengths = [min(a_length(draw), pick(600, 40)) for _ in range(draw.randint(1, pick(12, 4)))]
    keys = [draw.choice([n, n + a_length(draw), draw.randrange(n + 1)]) for n in lengths]
    sizes = dict(heads=draw.choice([1, 2, 3, 16]) if pick(True, False) else 2, strided=strided)
    sizes["dqk"], sizes["dv"] = draw.choice([(192, 128), (256, 256)])
    causal = draw.random() < 0.7
    words = f"{lengths}, {keys}, {sizes}, causal {causal}"
    return words, [*prefill_inputs(lengths, keys, dtype=dtype, **sizes), causal]


def test_random_calls(device, record_property, _seed):
    """At least two of each op, however long they take to compile."""
    draw = random.Random(int(torch.randint(1 << 30, ())))
    calls, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end or calls < 2 * len(NAMES):
        name = NAMES[calls % len(NAMES)]
        words, args = draw_call(name, draw)
        try:
            check_outcome(name, args, outcome(name, on(device, args)))
        except Exception as error:
            raise AssertionError(f"call {calls}, {name} in {name_of(args[0].dtype)} of {words}: {error}") from error
        calls += 1
    record_property("calls", calls)
