"""LatentCache of kv_format "fp8", and MLA over it: FlashMLA's bytes, and float64's results over what they hold."""

import dataclasses

import pytest
import torch

import ntops_mla
from ntops_mla import CacheFull, LatentCache, MLAConfig, dispatch, ops
from ntops_mla.decode_graph import DecodeGraph
from ntops_mla.ops import _fp8
from ntops_mla.testing import Float64MLA, History, cos_diff
from tests.test_decode_graph import Replayed
from tests.test_latent_fp8 import bytes_of
from tests.test_mla import BF16, F32, FORMS, assert_same, cache_for, history, layer, run, tokens
from tests.test_ops import name_of

CFG = MLAConfig(
    hidden_size=32, num_heads=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64,
    v_head_dim=16, max_position_embeddings=400,
)  # fmt: skip
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}


def make(num_pages=8, page_size=16, num_layers=1, dtype=BF16, cfg=CFG, **keys):
    return LatentCache(cfg, num_pages, page_size, num_layers, dtype=dtype, **{"kv_format": "fp8", **keys})


def fp8_for(mla, num_pages=64, page_size=16, num_layers=1):
    return make(num_pages, page_size, num_layers, mla.o_proj.weight.dtype, mla.cfg)


def rows(length, dtype=BF16):
    return torch.randn(length, 512).to(dtype), torch.randn(length, 64).to(dtype)


def slots_of(cache, request, length=None):
    length = cache.length(request) if length is None else length
    pages = torch.tensor(cache._requests[request].pages)
    slots = (pages[:, None] * cache.page_size + torch.arange(cache.page_size)).flatten()
    return slots[:length].to(cache.device)


def held(cache, request, layer=0):
    """A request's bytes in a layer."""
    return cache.storage[layer].flatten(0, 1)[slots_of(cache, request)]


# The storage


def test_656_bytes_a_token():
    cache = make(3, 16, 2)
    assert (cache.kv_format, cache.dtype, cache.bytes_per_token) == ("fp8", BF16, 656)
    assert [(s.shape, s.dtype, s.is_contiguous()) for s in cache.storage] == [((3, 16, 656), torch.uint8, True)] * 2
    assert sum(s.untyped_storage().nbytes() for s in cache.storage) == 2 * 3 * 16 * 656
    assert not any(s.any() for s in cache.storage)
    assert cache.storage[0].untyped_storage().data_ptr() != cache.storage[1].untyped_storage().data_ptr()
    with torch.inference_mode():
        assert not make(1).storage[0].is_inference()


def test_flash_mla_view():
    cache = make(3, 64, 2)
    view = cache.flash_mla_view(1)
    assert (view.shape, view.dtype) == ((3, 64, 1, 656), torch.float8_e4m3fn)
    view.view(torch.uint8).fill_(5)
    assert (cache.storage[1] == 5).all() and not cache.storage[0].any()


def test_there_are_no_views_of_latents():
    cache = make()
    for name in ("kv_cache", "pe_cache"):
        with pytest.raises(AttributeError, match=rf"{name}: .*kv_format 'fp8'.*rows\(slots, layer\)"):
            getattr(cache, name)
    plain = LatentCache(CFG, 2, dtype=BF16)
    assert plain.kv_format is None and plain.kv_cache[0].shape == (2, 64, 512) and plain.pe_cache[0].shape[2] == 64


@pytest.mark.parametrize(
    "keys, kind, message",
    [
        ({"kv_format": "int8"}, ValueError, "kv_format must be None or 'fp8', got 'int8'"),
        ({"kv_format": True}, TypeError, "kv_format must be None or 'fp8', got True"),
        ({"kv_format": torch.float8_e4m3fn}, TypeError, "kv_format must be None or 'fp8', got torch.float8_e4m3fn"),
        (
            {"cfg": dataclasses.replace(CFG, kv_lora_rank=256, qk_rope_head_dim=32)},
            ValueError,
            "kv_format 'fp8' is for kv_lora_rank 512 and qk_rope_head_dim 64, got a cfg of 256 and 32",
        ),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be one of"),
    ],
)
def test_bad_arguments(keys, kind, message):
    with pytest.raises(kind, match=message):
        make(**keys)


# A request's life


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, torch.float64], ids=name_of)
def test_fill_quantises_from_bfloat16(dtype):
    cache = make(dtype=dtype, num_layers=2)
    latent, pe = rows(37, dtype)
    cache.fill(7, latent, pe, layer=1)
    assert cache.length(7) == 37
    assert torch.equal(held(cache, 7, 1), bytes_of(latent.bfloat16(), pe.bfloat16())) and not cache.storage[0].any()
    read = cache.rows(slots_of(cache, 7), 1)
    assert read.dtype == dtype and torch.equal(read, _fp8.dequantize(held(cache, 7, 1), dtype))


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_rows(kv_format):
    cache = make(kv_format=kv_format, dtype=F32)
    latent, pe = rows(20, F32)
    cache.fill(1, latent, pe)
    order = torch.tensor([19, 0, 0, 3])
    read = cache.rows(slots_of(cache, 1)[order])
    expected = torch.cat([latent, pe], -1)[order]
    if kv_format is None:
        assert torch.equal(read, expected)
    else:
        assert cos_diff(read, expected) < 1e-3 and torch.equal(read[:, 512:], expected[:, 512:].bfloat16().float())
    with pytest.raises(ValueError, match="layer must be between 0 and 0"):
        cache.rows(order, 1)


def test_pages_go_and_come_back():
    cache = make(4)
    first, second = rows(40), rows(17)
    cache.fill(0, *first)
    with pytest.raises(CacheFull):
        cache.fill(1, *rows(33))
    before = [s.clone() for s in cache.storage]
    cache.truncate(0, 20)
    assert all(torch.equal(a, b) for a, b in zip(cache.storage, before))
    cache.fill(1, *second)
    assert torch.equal(held(cache, 0), bytes_of(*first)[:20]) and torch.equal(held(cache, 1), bytes_of(*second))
    cache.free(0)
    cache.free(1)
    assert cache.num_free_pages == 4


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (lambda latent, pe: (latent.float(), pe.float()), TypeError, "latent must be of the cache's dtype"),
        (lambda latent, pe: (latent[:, :256], pe), ValueError, r"latent must be \[p, 512\]"),
        (lambda latent, pe: (latent, pe[:2]), ValueError, "pe must have latent's 5 tokens"),
    ],
)
def test_a_bad_fill_writes_nothing(change, kind, message):
    cache = make()
    with pytest.raises(kind, match=message):
        cache.fill(0, *change(*rows(5)))
    assert not cache.storage[0].any() and cache.requests == () and cache.num_free_pages == 8


# MLA over it


def over_what_is_held(mla, cache, requests, xs):
    """float64's outputs of the newest tokens over the cache's rows, dequantised."""
    reference = Float64MLA(mla.cfg, mla.state_dict())
    held = (cache.rows(slots_of(cache, request), mla.layer_idx).double() for request in requests)
    return [reference(x, cached=History(*whole.split([512, 64], -1)))[0] for x, whole in zip(xs, held, strict=True)]


def compared(mla, cache, requests, xs, form):
    with dispatch.record() as ran:
        outs = run(mla, cache, requests, xs, form)
    true = over_what_is_held(mla, cache, requests, xs)
    if mla.o_proj.weight.dtype == F32:
        assert_same(outs, true)
    else:  # as over the plain cache
        assert_same(outs, true, 0.05)
        assert cos_diff(torch.cat(outs), torch.cat(true)) < 1e-4
    return outs, set(ran)


# A prompt beside a decode and a chunk after a history; unequal and equal numbers of new tokens
SHAPES = [[(0, 9), (40, 1), (21, 5)], [(33, 1), (16, 1), (7, 1)], [(20, 3), (0, 3)]]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_step(shapes, form, dtype):
    mla = layer("r1", dtype, **SMALL)
    cache = fp8_for(mla)
    for request, (past, _) in enumerate(shapes):
        if past:
            cache.fill(request, *history(mla, past))
    xs = [tokens(mla, new) for _, new in shapes]
    outs, ran = compared(mla, cache, range(len(shapes)), xs, form)
    assert "latent_append_fp8" in ran and not ran & {"latent_append", "rope", "mla_decode"}
    assert ("latent_dequantize" in ran) == ("mla_prefill" in ran)
    assert {"absorbed": {"mla_decode_fp8"}, "expanded": {"mla_prefill"}}.get(form, set()) <= ran
    for value, past in zip(outs, shapes):
        assert value.shape == (past[1], 64) and value.dtype == dtype


@pytest.mark.parametrize("model", ["r1", "r1_halves", "r1_bias", "v2_lite", "glm"])
def test_models(model):
    mla = layer(model, F32, **SMALL)
    cache = fp8_for(mla)
    cache.fill(0, *history(mla, 19))
    compared(mla, cache, [0, 1], [tokens(mla, 2), tokens(mla, 6)], None)


def test_forms_agree():
    mla = layer("r1", F32, **SMALL)
    xs, outs = [tokens(mla, 6), tokens(mla, 1)], []
    past = history(mla, 30)
    for form in FORMS:
        cache = fp8_for(mla)
        cache.fill(0, *past)
        outs.append(run(mla, cache, [0, 1], xs, form))
    assert_same(outs[1], outs[0])
    assert_same(outs[2], outs[0])


def test_a_long_past_in_pieces(monkeypatch):
    """Expanded in chunks that are merged; the limit is counted in the module's dtype, not in the cache's bytes."""
    mla = layer("r1", F32, **SMALL)
    columns = mla.cfg.qk_nope_head_dim + mla.cfg.v_head_dim + mla.cfg.qk_head_dim
    monkeypatch.setattr(ntops_mla.plan, "EXPANSION_BYTES", 20 * mla.cfg.num_heads * columns * 4)
    cache = fp8_for(mla)
    cache.fill(0, *history(mla, 50))
    step = cache.step([0], [7])
    assert [len(chunk.slots) for chunk in step.plan("expanded").chunks] == [20, 20, 17]
    compared(mla, cache, [0], [tokens(mla, 7)], "expanded")


def test_steps_one_after_another():
    """Prompts, decodes, a truncation, a request that ends: always float64's result over what is held."""
    mla = layer("r1", BF16, **SMALL)
    cache = fp8_for(mla, 12)
    for requests, lengths in (([0, 1], [19, 3]), ([1, 0], [1, 1]), ([0, 1], [1, 1])):
        compared(mla, cache, requests, [tokens(mla, n) for n in lengths], None)
    cache.truncate(0, 10)
    compared(mla, cache, [0, 2], [tokens(mla, 2), tokens(mla, 4)], None)
    cache.free(1)
    compared(mla, cache, [0, 2], [tokens(mla, 1), tokens(mla, 1)], None)
    assert [cache.length(r) for r in (0, 2)] == [13, 5]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
def test_a_step_leaves_the_bytes_that_filling_with_a_plain_caches_rows_does(dtype):
    mla = layer("r1", dtype, **SMALL)
    x = [tokens(mla, 21)]
    plain, appended, filled = cache_for(mla), fp8_for(mla), fp8_for(mla)
    run(mla, plain, [0], x)
    run(mla, appended, [0], x)
    filled.fill(0, *plain.rows(slots_of(plain, 0)).split([512, 64], -1))
    assert torch.equal(held(appended, 0), held(filled, 0))


def test_near_the_plain_cache():
    """Quantising moves a latent by at most a sixteenth; outputs are averages, and move less."""
    mla = layer("r1", F32, **SMALL)
    past, xs = history(mla, 60), [tokens(mla, 4)]
    outs = []
    for cache in (cache_for(mla), fp8_for(mla)):
        cache.fill(0, *past)
        outs += run(mla, cache, [0], xs)
    assert 0 < cos_diff(outs[1], outs[0]) < 2e-3


def test_queries_are_rotated_once():
    """The module's own rotation of q reaches both forms of one step."""
    mla = layer("r1", F32, **SMALL)
    cache = fp8_for(mla)
    cache.fill(0, *history(mla, 300))  # one token behind it is absorbed, a prompt is expanded
    step = cache.step([0, 1], [1, 30])
    assert step.plan().absorbed and step.plan().expanded is not None
    del step
    _, ran = compared(mla, cache, [0, 1], [tokens(mla, 1), tokens(mla, 30)], None)
    assert {"mla_decode_fp8", "mla_prefill", "latent_dequantize"} <= ran


def test_a_failed_step_can_be_used_again(monkeypatch):
    mla = layer("r1", F32, **SMALL)
    cache = fp8_for(mla)
    step = cache.step([0], [3])
    x = tokens(mla, 3)

    def broken(*args, **keys):
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr(ops, "mla_decode_fp8", broken)
        with pytest.raises(RuntimeError, match="broken"):
            mla(x, step, "absorbed")
    assert cache.length(0) == 0
    assert_same([mla(x, step, "absorbed")], over_what_is_held(mla, cache, [0], [x]))


def test_layers_have_their_own_storage():
    layers = [layer("r1", F32, layer_idx, **SMALL) for layer_idx in (0, 1)]
    cache = fp8_for(layers[0], num_layers=2)
    step, x = cache.step([0], [5]), tokens(layers[0], 5)
    outs = [mla(x, step) for mla in layers]
    for mla, out in zip(layers, outs):
        assert_same([out], over_what_is_held(mla, cache, [0], [x]))


def test_in_a_decode_graph(monkeypatch):
    """Padded rows have no slot: their bytes are nowhere."""
    replayed = Replayed(monkeypatch)
    mla = layer("r1", F32, **SMALL)
    cache, other = fp8_for(mla), fp8_for(mla)
    graph = DecodeGraph(mla, cache, 4)
    for request, length in enumerate((17, 5, 40)):
        past = history(mla, length)
        cache.fill(request, *past)
        other.fill(request, *past)
    for requests in ([0, 1, 2], [2, 0], [1, 2, 0]):
        x = tokens(mla, len(requests))
        lengths = [1] * len(requests)
        out, expected = graph(x, cache.step(requests, lengths)), mla(x, other.step(requests, lengths))
        assert_same([out], [expected])
        assert torch.equal(cache.storage[0], other.storage[0])
    assert replayed.replays == 3 and graph.reason is None


def test_compiled():
    mla = layer("r1", F32, **SMALL)
    cache, other = fp8_for(mla), fp8_for(mla)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, step: mla(x, step), backend="aot_eager")
    for lengths in ([5, 2], [1, 1]):
        x = tokens(mla, sum(lengths))
        assert_same([compiled(x, cache.step([0, 1], lengths))], [mla(x, other.step([0, 1], lengths))])
    assert torch.equal(cache.storage[0], other.storage[0])
