"""mla_schedule's kernel against Python's integers, and mla_decode and mla_decode_fp8 by its schedule."""

import copy
import importlib
import pickle

import pytest
import torch

import ntops_mla
from ntops_mla import MLA, LatentCache, MLAConfig, dispatch, flash_mla, ops
from ntops_mla.decode_graph import _Buffers
from ntops_mla.ops import _split
from ntops_mla.ops.mla_schedule import decode_schedule
from tests.interpreted.numerics import DTYPES, by_kernel, check_decode
from tests.interpreted.test_mla_decode_fp8 import check as check_fp8
from tests.test_mla_decode_fp8 import fp8_inputs
from tests.test_mla_schedule import BATCHES, check, lists
from tests.test_ops import decode64, decode_inputs, name_of


@pytest.mark.parametrize("parts", [1, 7, 264])
@pytest.mark.parametrize("lengths", [n for n in BATCHES.values() if len(n) < 20], ids=str)
def test_schedule(lengths, parts):
    check(by_kernel(ops.mla_schedule, lists(lengths), 16, parts), lengths, parts)


@pytest.mark.parametrize("parts", [3, 400])
def test_more_requests_and_splits_than_a_program_reads_at_once(parts):
    lengths = [40_000 if i == 256 else i % 3 for i in range(259)]
    check(by_kernel(ops.mla_schedule, lists(lengths), 16, parts), lengths, parts)


def test_strided_lengths(launches):
    lengths = [300, 7, 900]
    wide = torch.full((3, 2), 77_777, dtype=torch.int32)
    wide[:, 0] = lists(lengths)
    check(by_kernel(ops.mla_schedule, wide[:, 0], 16, 5), lengths, 5)
    assert launches == [("mla_schedule", (torch.int32, torch.int32))]


# Decode by a schedule: of the lengths, of others, and of the same in the last column alone

LENGTHS = [530, 0, 1, 300, 257, 256]
SCHEDULED = {
    "own": LENGTHS,
    "longer": [900, 5, 400, 300, 600, 300],
    "shorter": [10, 0, 1, 128, 0, 129],
    "none": [0] * 6,
}


@pytest.mark.parametrize("made_of", SCHEDULED.values(), ids=SCHEDULED)
@pytest.mark.parametrize("s_q, heads, page_size", [(1, 16, 16), (2, 3, 64), (3, 7, 128)])
def test_decode(s_q, heads, page_size, made_of, launches):
    args = decode_inputs(LENGTHS, heads=heads, s_q=s_q, page_size=page_size, dtype=torch.float32)
    check_decode(args, schedule=by_kernel(ops.mla_schedule, lists(made_of), 16, 5))
    assert [name for name, _ in launches] == ["mla_schedule", "mla_decode", "mla_combine"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [True, False])
def test_decode_in_all_dtypes(dtype, causal):
    args = decode_inputs(LENGTHS, heads=4, s_q=2, dtype=dtype)
    check_decode(args, causal, schedule=by_kernel(ops.mla_schedule, args[5], 16, 9))


def test_decode_of_smaller_heads():
    args = decode_inputs([300, 2], latent=256, rope=32, heads=5, dtype=torch.float32)
    check_decode(args, schedule=by_kernel(ops.mla_schedule, args[5], 16, 3))


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_a_request_that_is_not_cut_has_no_part(fp8, monkeypatch):
    """Its out is written where it belongs, and what lies in its part is not looked at; its lse is the part's."""
    name, make, check_results = ("mla_decode_fp8", fp8_inputs, check_fp8) if fp8 else INPUTS
    args = make([200, 700, 0, 256, 1], heads=3, s_q=2, dtype=torch.float32)
    made = noted_parts(monkeypatch, name, lambda *given: [x.fill_(float("nan")) for x in _split.parts(*given)])
    schedule = by_kernel(ops.mla_schedule, args[-2], 16, 4)
    check_results(args, schedule=schedule)
    (written,) = ({i for i in range(len(part)) if not part[i].isnan().any()} for part, _ in made)
    # 700 keys are 6 blocks, and a share is 3 of the 11 blocks
    assert schedule[:, 0].tolist() == [0, 1, 1, 2, 3, 4, -1, -1, -1] and written == {1, 2}
    assert made[0][0][[0, 3, 4, 5]].isnan().all()


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_parts_further_apart_than_int32_reaches(fp8, monkeypatch, beyond_int32):
    name, make, check_results = ("mla_decode_fp8", fp8_inputs, check_fp8) if fp8 else INPUTS
    args = make([1, 700], heads=3, dtype=torch.float32)

    def far(out, splits, schedule):
        part, part_lse = _split.parts(out, splits, schedule)
        return beyond_int32(part.shape, (2**30, *part.stride()[1:]), part.dtype), part_lse

    made = noted_parts(monkeypatch, name, far)
    check_results(args, schedule=by_kernel(ops.mla_schedule, args[-2], 16, 3))
    assert len(made) == 1


INPUTS = "mla_decode", decode_inputs, check_decode


def noted_parts(monkeypatch, name, make):
    """The list of what `make` gave the op in place of `_split.parts`."""
    made = []
    # ops.mla_decode is the op
    module = importlib.import_module(f"ntops_mla.ops.{name}")
    monkeypatch.setattr(module, "parts", lambda *given: made.append(make(*given)) or made[-1])
    return made


def test_rows_of_nobody_are_not_looked_at():
    """A schedule of many parts, whose unused rows hold anything but a request."""
    args = decode_inputs([300, 2], heads=3, dtype=torch.float32)
    schedule = by_kernel(ops.mla_schedule, args[5], 16, 6)
    schedule[schedule[:, 0] < 0, 1:3] = 2_000_000_000
    schedule[3:, 3] = 2_000_000_000
    check_decode(args, schedule=schedule)


@pytest.mark.parametrize("filler", [2_000_000_000, -7, 1, "rising"])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_a_schedule_that_was_never_written_leads_nowhere(fp8, filler, launches):
    """As another graph's may be before its first replay: any result, and no access outside a tensor."""
    op, make = (ops.mla_decode_fp8, fp8_inputs) if fp8 else (ops.mla_decode, decode_inputs)
    # "rising": each request looks like one that is not cut
    rising = torch.arange(5, dtype=torch.int32)[:, None].expand(5, 4).contiguous()
    schedule = rising if filler == "rising" else torch.full((5, 4), filler, dtype=torch.int32)
    by_kernel(op, *make([300, 2], heads=3, dtype=torch.float32), schedule=schedule)
    assert [name for name, _ in launches] == [op.__name__, "mla_combine"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("made_of", SCHEDULED.values(), ids=SCHEDULED)
def test_decode_over_the_fp8_cache(made_of, dtype, launches):
    args = fp8_inputs(LENGTHS, heads=3, s_q=2, dtype=dtype)
    check_fp8(args, schedule=by_kernel(ops.mla_schedule, lists(made_of), 16, 5))
    assert [name for name, _ in launches] == ["mla_schedule", "mla_decode_fp8", "mla_combine"]


# Who makes schedules


def test_when_a_schedule_is_made():
    long = lists([700, 5])
    assert decode_schedule(long, 16, 704).shape == (2 + 8, 4)  # two programs on each of the interpreter's 4 processors
    assert decode_schedule(long, 128, 704).shape == (2 + 4, 4)  # which are two blocks of rows each
    assert decode_schedule(long[:1], 16, 704) is None and decode_schedule(long, 16, 256) is None
    # So many requests for each part are shares small enough.
    assert decode_schedule(long.repeat(15), 16, 704) is not None and decode_schedule(long.repeat(16), 16, 704) is None
    assert decode_schedule(long.repeat(3), 256, 704) is not None and decode_schedule(long.repeat(4), 256, 704) is None
    with ntops_mla.use("reference"):
        assert decode_schedule(long, 16, 704) is None


@pytest.fixture
def layers():
    cfg = MLAConfig(
        hidden_size=64, num_heads=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64,
        v_head_dim=32, rope_theta=1e4, rope_scaling=None, max_position_embeddings=2048,
    )  # fmt: skip
    return [MLA(cfg, layer_idx=i, dtype=torch.float32) for i in range(2)]


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_a_step_makes_one_for_all_its_layers(layers, kv_format):
    cfg = layers[0].cfg
    cache = LatentCache(cfg, num_pages=16, num_layers=2, dtype=torch.float32, kv_format=kv_format)
    for layer in range(2):
        for request, length in enumerate((400, 5)):
            cache.fill(request, torch.randn(length, 512), torch.randn(length, 64), layer)
    step, x = cache.step([0, 1], [1, 1]), torch.randn(2, 64)
    made = []

    def noted(spec, device, args, call=dispatch.call):
        if spec.name == "mla_schedule":
            made.append(args)
        return call(spec, device, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "call", noted)
        for mla in layers:
            x = mla(x, step)
    assert len(made) == 1
    (group,) = step.plan().absorbed
    check(group.schedule(2, 64), [401, 6], 8)


def test_each_pass_of_a_graphs_buffers_makes_one(layers):
    """What is captured computes the schedule of the lengths that each replay finds, once for all layers."""
    cache = LatentCache(layers[0].cfg, num_pages=16, num_layers=2, dtype=torch.float32)
    for layer in range(2):
        cache.fill(0, torch.randn(600, 512), torch.randn(600, 64), layer)
        cache.fill(1, torch.randn(5, 512), torch.randn(5, 64), layer)
    buffers, seen = _Buffers(cache, 2, 16, 64, torch.float32), []

    def both(x, step):
        for mla in layers:
            x = mla(x, step)
            seen.append(step.plan().absorbed[0].schedule(2, 64))
        return x

    for requests, lengths in (([0, 1], [601, 6]), ([1, 0], [6, 601])):
        x, step = torch.randn(2, 64), cache.step(requests, [1, 1])
        buffers.fill(x, step)
        out = buffers.run(both)
        first, second = seen[-2:]
        assert first is second
        check(first, lengths, 8)
        held = [storage.clone() for storage in cache.storage]
        with ntops_mla.use("reference"):
            torch.testing.assert_close(out, buffers.run(both), rtol=1e-4, atol=1e-5)
        for storage, before in zip(cache.storage, held):
            torch.testing.assert_close(storage, before, rtol=1e-4, atol=1e-5)
        del seen[-2:]
    assert len({id(schedule) for schedule in seen}) == 2


def metadata_call(meta, lengths, heads=2):
    q_nope, q_pe, kv, pe, table, seq_lens, _ = decode_inputs(lengths, heads=heads, dtype=torch.float32)
    given = {
        "q": torch.cat([q_nope, q_pe], -1),
        "k_cache": torch.cat([kv, pe], -1)[:, :, None],
        "block_table": table,
        "cache_seqlens": seq_lens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": meta,
        "causal": True,
    }
    expected = decode64(q_nope, q_pe, kv, pe, table, seq_lens, 576**-0.5)[0]
    return given, expected


def test_metadata_keeps_a_schedule_until_the_lengths_change():
    meta, _ = flash_mla.get_mla_metadata()
    given, expected = metadata_call(meta, [700, 3, 0])
    with dispatch.record() as ran:
        out, _ = flash_mla.flash_mla_with_kvcache(**given)
    assert ran["mla_decode"].backend == ran["mla_schedule"].backend == "kernel"
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    first = meta.tile_scheduler_metadata
    check(first, [700, 3, 0], 8)
    assert meta.num_splits.tolist() == first[:4, 3].tolist()
    flash_mla.flash_mla_with_kvcache(**given)
    assert meta.tile_scheduler_metadata is first  # another layer
    given["cache_seqlens"][0] = 260
    flash_mla.flash_mla_with_kvcache(**given)
    check(meta.tile_scheduler_metadata, [260, 3, 0], 8)  # written in place
    flash_mla.flash_mla_with_kvcache(**{**given, "cache_seqlens": lists([5, 600, 2])})
    check(meta.tile_scheduler_metadata, [5, 600, 2], 8)  # another tensor


def test_stale_metadata_is_named_where_values_are_looked_at(monkeypatch):
    """Only writes that PyTorch does not count leave metadata stale."""
    meta, _ = flash_mla.get_mla_metadata()
    given, _ = metadata_call(meta, [700, 3, 0])
    flash_mla.flash_mla_with_kvcache(**given)
    given["cache_seqlens"].data[0] = 1
    unfair, _ = flash_mla.flash_mla_with_kvcache(**given)
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()
    with pytest.raises(ValueError, match="tile_scheduler_metadata must be made of these cache_seqlens"):
        flash_mla.flash_mla_with_kvcache(**given)
    given["tile_scheduler_metadata"], _ = flash_mla.get_mla_metadata()
    torch.testing.assert_close(flash_mla.flash_mla_with_kvcache(**given)[0], unfair, rtol=1e-4, atol=1e-5)


def test_lengths_of_inference_mode_are_scheduled_anew_in_each_call(monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()
    with torch.inference_mode():
        meta, _ = flash_mla.get_mla_metadata()
        given, _ = metadata_call(meta, [700, 3, 0])
        for length in (700, 1, 300):
            given["cache_seqlens"][0] = length
            with dispatch.record() as ran:
                flash_mla.flash_mla_with_kvcache(**given)
            assert ran["mla_schedule"].backend == "kernel"


def test_used_metadata_can_be_sent_to_another_process():
    meta, _ = flash_mla.get_mla_metadata()
    given, _ = metadata_call(meta, [700, 3, 0])
    flash_mla.flash_mla_with_kvcache(**given)
    for other in (pickle.loads(pickle.dumps(meta)), copy.deepcopy(meta)):
        assert other == meta
        flash_mla.flash_mla_with_kvcache(**{**given, "tile_scheduler_metadata": other})
