"""MLA: against transformers and float64; forms, batches, histories and weights, put together in every way."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntops_mla import MLA, CacheFull, LatentCache, MLAConfig, ops, plan
from ntops_mla.testing import Float64MLA, History, cos_diff

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
R1 = {
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_parameters": YARN,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MINICPM3 = {
    **R1,
    "model_type": "minicpm3",
    "hidden_size": 160,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "rope_parameters": DEFAULT,
}
# name -> (transformers' family, the keys of config.json)
MODELS = {
    "r1": ("deepseek_v3.DeepseekV3", R1),
    "r1_halves": ("deepseek_v3.DeepseekV3", {**R1, "rope_interleave": False}),
    "r1_bias": ("deepseek_v3.DeepseekV3", {**R1, "attention_bias": True}),
    "v2_lite": (
        "deepseek_v2.DeepseekV2",
        {
            **R1,
            "model_type": "deepseek_v2",
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "glm": (
        "glm4_moe_lite.Glm4MoeLite",
        {
            **R1,
            "model_type": "glm4_moe_lite",
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {**DEFAULT, "rope_theta": 1e6},
        },
    ),
    "minicpm3": ("minicpm3.MiniCPM3", {**MINICPM3, "rms_norm_eps": 1e-5}),
}
# Small enough for property tests.
TINY = {**MINICPM3, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24}
TINY["rope_interleave"] = True
FORMS = (None, "absorbed", "expanded")
F32, BF16 = torch.float32, torch.bfloat16


def config(model, **changes):
    keys = MODELS[model][1] if isinstance(model, str) else model
    return MLAConfig.from_dict({**keys, **changes})


def layer(model="r1", dtype=F32, layer_idx=0, **changes):
    """An MLA with weights that keep every intermediate near unit variance, so that the softmax has something to do."""
    mla = MLA(config(model, **changes), layer_idx, dtype=dtype).requires_grad_(False)
    for name, parameter in mla.named_parameters():
        if "layernorm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return mla


def cache_for(mla, num_pages=64, page_size=16, num_layers=1):
    return LatentCache(mla.cfg, num_pages, page_size, num_layers, dtype=mla.o_proj.weight.dtype)


def history(mla, length):
    cfg, dtype = mla.cfg, mla.o_proj.weight.dtype
    return History(torch.randn(length, cfg.kv_lora_rank).to(dtype), torch.randn(length, cfg.qk_rope_head_dim).to(dtype))


def tokens(mla, length):
    return torch.randn(length, mla.cfg.hidden_size).to(mla.o_proj.weight.dtype)


def batch(mla, shapes):
    """[(past, new)] -> (histories, new tokens), one entry per request."""
    return [history(mla, past) for past, _ in shapes], [tokens(mla, new) for _, new in shapes]


def run(mla, cache, requests, xs, form=None):
    step = cache.step(requests, [len(x) for x in xs])
    return list(mla(torch.cat(xs), step, form).split([len(x) for x in xs]))


def run_filled(mla, histories, xs, form=None, page_size=16):
    """One step of all requests after their histories, in a cache of its own."""
    total = sum(-(-(len(h.latent) + len(x)) // page_size) for h, x in zip(histories, xs))
    cache = cache_for(mla, total, page_size, mla.layer_idx + 1)
    for request, past in enumerate(histories):
        if len(past.latent):
            cache.fill(request, *past, layer=mla.layer_idx)
    return run(mla, cache, range(len(xs)), xs, form)


def exact(mla, histories, xs):
    reference = Float64MLA(mla.cfg, mla.state_dict())
    return [reference(x, past)[0] for x, past in zip(xs, histories)]


def error(value, reference):
    """Largest difference in units of the largest reference."""
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def assert_same(values, references, allowed=1e-5):
    for index, (value, reference) in enumerate(zip(values, references, strict=True)):
        assert value.shape == reference.shape
        # "not <" so that NaN fails
        assert not error(value, reference) >= allowed and not value.isnan().any(), (
            f"request {index}: error {error(value, reference):.2g}, allowed {allowed:.2g}"
        )


# transformers


class Theirs:
    """A transformers attention with its rotary embedding, run a request at a time."""

    def __init__(self, model, dtype=F32, layer_idx=0, **changes):
        pytest.importorskip("transformers", minversion="5.15")
        module, family = MODELS[model][0].split(".")
        try:
            module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        except ImportError:
            pytest.skip(f"this transformers has no {module}")
        keys = {key: value for key, value in {**MODELS[model][1], **changes}.items() if key != "model_type"}
        keys["rope_parameters"] = dict(keys["rope_parameters"])  # transformers writes into it
        self.config = getattr(module, f"{family}Config")(**keys)
        self.config._attn_implementation = "sdpa"
        self.attention = getattr(module, f"{family}Attention")(self.config, layer_idx).to(dtype).eval()
        self.rotary = getattr(module, f"{family}RotaryEmbedding")(self.config)
        # DeepSeek-V2's code keeps pairs in its cache, the others halves.
        self.pairs = family == "DeepseekV2"

    @torch.no_grad()
    def __call__(self, x, past):
        from transformers import DynamicCache

        p, n = len(past.latent), len(x)
        cache = DynamicCache(config=self.config)
        if p:
            pe = past.pe if self.pairs else past.pe.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            cache.update(past.latent[None, None], pe[None, None], self.attention.layer_idx)
        rotation = self.rotary(x[None], torch.arange(p, p + n)[None])
        mask = torch.ones(n, p + n, dtype=torch.bool).tril(p)[None, None]
        return self.attention(
            hidden_states=x[None], position_embeddings=rotation, attention_mask=mask, past_key_values=cache
        )[0][0]


# (past, new): prefills, decodes and both at once, around the borders of pages of 16
MIXED = [(0, 5), (130, 1), (0, 1), (7, 70), (16, 16), (65, 3), (15, 1), (0, 33)]


@pytest.mark.parametrize("limit, calls", [(1, 7), (2, 4), (3, 3), (4, 1)])
def test_a_few_heads_at_a_time_on_a_cpu(monkeypatch, limit, calls):
    """As many as fit, and all of them where they are no more than twice that; never a head twice, none left out."""
    mla = layer(num_attention_heads=7, num_key_value_heads=7)
    cfg = mla.cfg
    histories, xs = batch(mla, [(5, 9), (0, 11)])
    monkeypatch.setattr(plan, "CPU_BUFFER_BYTES", limit * 25 * (cfg.qk_nope_head_dim + cfg.v_head_dim) * 4)
    ran = []
    prefill = ops.mla_prefill
    monkeypatch.setattr(ops, "mla_prefill", lambda *args, **kw: ran.append(args[0]) or prefill(*args, **kw))
    assert_same(run_filled(mla, histories, xs, "expanded"), exact(mla, histories, xs))
    assert len(ran) == calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_transformers_and_float64_in_float32(model, form):
    mla, theirs = layer(model), Theirs(model)
    theirs.attention.load_state_dict(mla.state_dict())
    histories, xs = batch(mla, MIXED)
    ours = run_filled(mla, histories, xs, form)
    assert_same(ours, [theirs(x, past) for x, past in zip(xs, histories)], 2e-5)
    assert_same(ours, exact(mla, histories, xs), 2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_as_exact_as_transformers(model, form):
    """flash-attention's rule: at most twice the error that the same formula in bfloat16 PyTorch has."""
    mla, theirs = layer(model, BF16), Theirs(model, BF16)
    theirs.attention.load_state_dict(mla.state_dict())
    histories, xs = batch(mla, MIXED)
    ours, hf, true = (
        torch.cat(outs)
        for outs in (
            run_filled(mla, histories, xs, form),
            [theirs(x, past) for x, past in zip(xs, histories)],
            exact(mla, histories, xs),
        )
    )
    assert ours.dtype == BF16
    assert error(ours, true) <= 2 * error(hf, true)
    assert cos_diff(ours, true) <= max(2 * cos_diff(hf, true), 1e-5)


def test_float64_is_exact_to_the_angles():
    mla = layer("r1", torch.float64)
    histories, xs = batch(mla, MIXED)
    for form in FORMS:
        assert_same(run_filled(mla, histories, xs, form), exact(mla, histories, xs), 1e-6)


@pytest.mark.parametrize("model", ["r1", "r1_bias", "v2_lite", "glm"])
def test_from_module_shares_the_weights(model):
    theirs = Theirs(model, layer_idx=2)
    mla = MLA.from_module(theirs.attention)
    assert mla.layer_idx == 2
    for name, parameter in mla.named_parameters():
        assert parameter is theirs.attention.get_parameter(name), name
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    assert_same(run_filled(mla, histories, xs), [theirs(x, past) for x, past in zip(xs, histories)])
    # What is changed in one is seen in the other, in both forms.
    with torch.no_grad():
        theirs.attention.kv_b_proj.weight.mul_(2)
        theirs.attention.kv_a_proj_with_mqa.weight.mul_(-1)
    for form in ("absorbed", "expanded"):
        outs = run_filled(mla, histories, xs, form)
        assert_same(outs, [theirs(x, past) for x, past in zip(xs, histories)])


@pytest.mark.parametrize("model", ["r1_halves", "minicpm3"])
def test_from_module_permutes_copies_where_halves_rotate(model):
    theirs = Theirs(model)
    before = copy.deepcopy(theirs.attention.state_dict())
    mla = MLA.from_module(theirs.attention)
    assert not mla.cfg.rope_interleave
    for name, parameter in mla.named_parameters():
        copied = name.split(".")[0] in ("q_b_proj", "kv_a_proj_with_mqa")
        assert (parameter is theirs.attention.get_parameter(name)) != copied, name
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    assert_same(run_filled(mla, histories, xs), [theirs(x, past) for x, past in zip(xs, histories)])
    for name, value in theirs.attention.state_dict().items():
        assert torch.equal(value, before[name]) and torch.equal(mla.state_dict()[name], value), name


def test_from_module_takes_the_norms_eps_not_the_blocks():
    theirs = Theirs("glm")
    assert theirs.config.rms_norm_eps == 1e-5
    assert MLA.from_module(theirs.attention).cfg.rms_norm_eps == 1e-6
    for norm in (theirs.attention.q_a_layernorm, theirs.attention.kv_a_layernorm):
        norm.variance_epsilon = 0.5
    mla = MLA.from_module(theirs.attention)
    histories, xs = batch(mla, [(0, 9)])
    assert_same(run_filled(mla, histories, xs), [theirs(xs[0], histories[0])])


@pytest.mark.parametrize("attention", [torch.nn.Linear(4, 4), None, 3])
def test_from_module_refuses_what_is_no_mla(attention):
    with pytest.raises(ValueError, match="attention must be"):
        MLA.from_module(attention)


def test_from_module_refuses_another_softmax_scale():
    theirs = Theirs("r1")
    theirs.attention.scaling *= 1.5
    with pytest.raises(ValueError, match="scales its scores"):
        MLA.from_module(theirs.attention)


def with_a_gate(attention):
    attention.g_proj = torch.nn.Linear(128, 4, bias=False)


def with_sinks(attention):
    attention.sinks = torch.nn.Parameter(torch.zeros(4))


def with_an_unknown_bias(attention):
    attention.o_proj.bias = torch.nn.Parameter(torch.zeros(128))


def with_a_factor(attention):
    attention.mla_scale_q_lora = 1.5


def without_a_projection(attention):
    del attention.q_a_proj


def with_none_for_a_projection(attention):
    attention.q_b_proj = None


def with_another_shape(attention):
    attention.o_proj.weight = torch.nn.Parameter(torch.zeros(128, 256))


def with_packed_weights(attention):
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.to(torch.uint8), requires_grad=False)


def without_a_config(attention):
    attention.config = None


@pytest.mark.parametrize(
    "change, message",
    [
        (with_a_gate, r"DeepseekV3Attention has parameters that MLA does not have: g_proj\.weight$"),
        (with_sinks, "does not have: sinks$"),
        (with_an_unknown_bias, r"does not have: o_proj\.bias$"),
        (with_a_factor, "factors that MLA does not have: mla_scale_q_lora$"),
        (without_a_projection, r"lacks parameters .*: q_a_proj\.weight$"),
        (with_none_for_a_projection, r"lacks parameters .*: q_b_proj\.weight$"),
        (with_another_shape, r"o_proj\.weight must be \[128, 512\].*got \[128, 256\]"),
        (with_packed_weights, r"o_proj\.weight must be .*bfloat16.*got .*uint8"),
        (without_a_config, "attention must have its model's config"),
    ],
)
def test_from_module_refuses_what_computes_something_else(change, message):
    attention = Theirs("r1").attention
    change(attention)
    with pytest.raises(ValueError, match=message):
        MLA.from_module(attention)


def test_from_module_leaves_an_indexer_out():
    theirs = Theirs("r1")
    theirs.attention.indexer = torch.nn.Linear(128, 4)
    mla = MLA.from_module(theirs.attention)
    assert not any(name.startswith("indexer") for name, _ in mla.named_parameters())
    histories, xs = batch(mla, [(0, 9)])
    assert_same(run_filled(mla, histories, xs), [theirs(xs[0], histories[0])])


# transformers' attentions with MLA's numbers in their configuration, and what this library does not compute of them
VARIANTS = {
    "longcat_flash": ("LongcatFlashMLA", "LongcatFlashConfig", "multiplies q and kv"),
    "kimi_linear": ("KimiLinearAttention", "KimiLinearConfig", "no rotary embedding"),
    "hy_v4": ("HYV4Attention", "HYV4Config", "sinks"),
}


@pytest.mark.parametrize("model_type", VARIANTS)
def test_from_module_refuses_variants_by_name(model_type):
    pytest.importorskip("transformers", minversion="5.15")
    attention, configuration, reason = VARIANTS[model_type]
    try:
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    except ImportError:
        pytest.skip(f"this transformers has no {model_type}")
    keys = {key: value for key, value in R1.items() if key not in ("model_type", "rope_parameters")}
    sizes = {"num_hidden_layers": 2, "pad_token_id": None, "rope_parameters": dict(DEFAULT)}
    theirs = getattr(module, attention)(getattr(module, configuration)(**keys, **sizes), 0)
    with pytest.raises(ValueError, match=f"{model_type}.*{reason}"):
        MLA.from_module(theirs)


# Forms, chunks and batches


def test_forms_agree_where_both_are_chosen():
    """A prefill without a past runs expanded and a decode absorbed; None gives each what forcing it gives."""
    mla = layer()
    histories, xs = batch(mla, [(0, 40), (50, 1)])
    chosen, absorbed, expanded = (run_filled(mla, histories, xs, form) for form in FORMS)
    assert_same(chosen, [expanded[0], absorbed[1]], 1e-6)
    assert_same(absorbed, expanded)
    step = cache_for(mla).step([0, 1], [40, 1])
    assert [group.s_q for group in step.plan().absorbed] == [1]
    assert step.plan().expanded == slice(0, 40)


@pytest.mark.parametrize("limit", [1, 7, 16, 33, 90])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_expansion_in_chunks_gives_the_same(monkeypatch, limit, dtype):
    """Pieces end within the past, within the new tokens and at their border; short requests go together."""
    mla = layer("r1", dtype)
    cfg = mla.cfg
    histories, xs = batch(mla, [(0, 3), (33, 20), (0, 4), (0, 2), (16, 7), (0, 40), (21, 1), (7, 9)])
    whole = run_filled(mla, histories, xs, "expanded")
    columns = cfg.qk_nope_head_dim + cfg.v_head_dim + cfg.qk_head_dim
    monkeypatch.setattr(plan, "EXPANSION_BYTES", limit * cfg.num_heads * columns * xs[0].element_size())
    cut = run_filled(mla, histories, xs, "expanded")
    true = exact(mla, histories, xs)
    if dtype == F32:
        assert_same(cut, whole)
        assert_same(cut, true)
    else:
        assert error(torch.cat(cut), torch.cat(true)) <= 1.5 * error(torch.cat(whole), torch.cat(true))
    # The same where only some of the step's requests are expanded.
    assert_same(run_filled(mla, histories, xs), true, 1e-5 if dtype == F32 else 0.05)


ROWS = [(0, 3), (33, 20), (16, 1), (0, 4), (21, 1), (7, 9)]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unequal_lengths_as_a_row_per_token(monkeypatch, dtype):
    """What devices other than the CPU run for absorbed requests: one call, exact; alone and beside expanded ones."""
    mla = layer("r1", dtype)
    histories, xs = batch(mla, ROWS)
    true = exact(mla, histories, xs)
    monkeypatch.setattr(plan, "_goes_by_row", lambda *args: True)
    calls = []
    decode = ops.mla_decode
    monkeypatch.setattr(
        ops, "mla_decode", lambda *args, **kwargs: calls.append(args[0].shape[:2]) or decode(*args, **kwargs)
    )
    allowed = 1e-5 if dtype == F32 else 0.05
    assert_same(run_filled(mla, histories, xs, "absorbed"), true, allowed)
    assert calls == [(38, 1)]
    assert_same(run_filled(mla, histories, xs), true, allowed)


def test_rows_of_unequal_lengths_on_a_device():
    """Not scattered tokens only: requests that stand together in the pack stay a slice."""
    cfg = config(TINY)
    cache = LatentCache(cfg, 64, 16, dtype=F32, device="meta")
    (group,) = cache.step([0, 1, 2], [3, 20, 1]).plan("absorbed").absorbed
    assert (group.s_q, group.tokens) == (1, slice(0, 24))
    assert group.block_table.shape == (24, 2) and group.seq_lens.shape == (24,)
    assert group.seq_lens.dtype == group.block_table.dtype == torch.int32
    (group,) = cache.step([3, 4], [5, 5]).plan("absorbed").absorbed
    assert (group.s_q, group.tokens) == (5, slice(0, 10)) and group.seq_lens.shape == (2,)


def test_a_table_of_rows_does_not_grow_without_bound(monkeypatch):
    """One run among single tokens: 24 rows of 2 columns."""
    cache = LatentCache(config(TINY), 64, 16, dtype=F32, device="meta")
    for limit, groups in ((24 * 2 * 4, 1), (24 * 2 * 4 - 1, 3)):
        monkeypatch.setattr(plan, "ROW_TABLE_BYTES", limit)
        assert len(cache.step([0, 1, 2], [3, 20, 1]).plan("absorbed").absorbed) == groups


def test_chunks_keep_within_the_limit(monkeypatch):
    mla = layer()
    cfg = mla.cfg
    per_key = cfg.num_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim + cfg.qk_head_dim) * 4
    monkeypatch.setattr(plan, "EXPANSION_BYTES", 25 * per_key)
    cache = cache_for(mla)
    cache.fill(1, *history(mla, 33))
    chunks = cache.step([0, 1, 2, 3], [10, 20, 15, 11]).plan("expanded").chunks
    assert [len(chunk.slots) for chunk in chunks] == [10, 25, 25, 3, 15, 11]
    assert [chunk.merged for chunk in chunks] == [False, True, True, True, False, False]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["r1", "minicpm3"])
def test_decode_fed_back_over_page_borders(model, form):
    mla = layer(model)
    cache = cache_for(mla, num_pages=24, page_size=4)
    reference = Float64MLA(mla.cfg, mla.state_dict())
    pasts, xs = [None] * 3, [tokens(mla, new) for new in (3, 1, 6)]
    for _ in range(22):
        outs = run(mla, cache, [5, 6, 7], xs, form)
        for i, (out, x) in enumerate(zip(outs, xs)):
            true, pasts[i] = reference(x, pasts[i])
            assert_same([out], [true], 2e-5)
        xs = [out[-1:] / out[-1:].std() for out in outs]
    assert [cache.length(r) for r in (5, 6, 7)] == [24, 22, 27]


def test_layers_share_one_cache_and_step():
    layers = [layer(layer_idx=index) for index in range(3)]
    cache = cache_for(layers[0], num_layers=3)
    references = [Float64MLA(mla.cfg, mla.state_dict()) for mla in layers]
    pasts = {}
    for requests, lengths in (([1, 2], [17, 3]), ([2, 1, 9], [1, 1, 20]), ([9, 2], [1, 16])):
        xs = [tokens(layers[0], new) for new in lengths]
        step = cache.step(requests, lengths)
        ours, true = torch.cat(xs), [x.double() for x in xs]
        for mla, reference in zip(layers, references):
            ours = mla(ours, step)
            for i, request in enumerate(requests):
                true[i], pasts[mla.layer_idx, request] = reference(true[i], pasts.get((mla.layer_idx, request)))
        assert_same(ours.split(lengths), true, 5e-5)


def test_the_cache_holds_the_reference_rows():
    """Latents after the norm and RoPE's columns in pairs, whichever order the checkpoint has: FlashMLA's cache."""
    for model in ("r1", "r1_halves", "minicpm3"):
        mla = layer(model)
        cache, x = cache_for(mla), tokens(mla, 20)
        step = cache.step([3], [20])
        mla(x, step)
        _, rows = Float64MLA(mla.cfg, mla.state_dict())(x)
        stored = cache.storage[0].view(-1, mla.cfg.latent_dim)[step.slots]
        assert_same([stored], [torch.cat(rows, -1)], 2e-6)
        untouched = torch.ones(cache.num_pages * cache.page_size, dtype=torch.bool)
        untouched[step.slots] = False
        assert not cache.storage[0].view(-1, mla.cfg.latent_dim)[untouched].any()


@pytest.mark.parametrize("form", FORMS)
def test_what_no_request_holds_is_never_read(form):
    mla = layer()
    histories, xs = batch(mla, [(20, 3), (0, 9), (31, 1), (16, 1)])
    clean = run_filled(mla, histories, xs, form)
    cache = cache_for(mla, 20)
    # A request came and went: its pages are used again; all that is not written is NaN.
    run(mla, cache, [77], [tokens(mla, 50)])
    cache.free(77)
    cache.storage[0].fill_(float("nan"))
    for request, past in enumerate(histories):
        if len(past.latent):
            cache.fill(request, *past)
    outs = run(mla, cache, range(4), xs, form)
    assert all(torch.equal(out, reference) for out, reference in zip(outs, clean))


# (requests, new tokens) per step, or a verb with its request
SCHEDULE = [
    ([1, 2], [20, 3]),
    ([2, 1], [1, 1]),
    ([3], [33]),
    ("truncate", 1, 13),
    ([1, 2, 3], [1, 9, 1]),
    ("free", 2),
    ([4, 1], [5, 1]),
    ("truncate", 3, 32),
    ([3, 4], [1, 1]),
    ("truncate", 4, 0),
    ([2, 4, 1, 3], [7, 18, 2, 1]),
]


@pytest.mark.parametrize("model", ["r1", "v2_lite", "minicpm3"])
def test_a_request_does_not_see_the_others(model):
    """Entering, leaving and shortened in any order, each request is as if it were alone."""
    mla = layer(model)
    shared = cache_for(mla, 10)
    alone = {request: cache_for(mla, 10) for request in range(1, 5)}
    for event in SCHEDULE:
        if event[0] == "truncate":
            shared.truncate(*event[1:])
            alone[event[1]].truncate(*event[1:])
        elif event[0] == "free":
            shared.free(event[1])
            alone[event[1]].free(event[1])
        else:
            requests, lengths = event
            xs = [tokens(mla, new) for new in lengths]
            outs = run(mla, shared, requests, xs)
            assert_same(outs, [run(mla, alone[r], [r], [x])[0] for r, x in zip(requests, xs)])


def test_the_order_of_requests_is_free():
    mla = layer()
    histories, xs = batch(mla, MIXED)
    order = torch.randperm(len(xs)).tolist()
    outs = run_filled(mla, histories, xs)
    shuffled = run_filled(mla, [histories[i] for i in order], [xs[i] for i in order])
    assert_same(shuffled, [outs[i] for i in order], 1e-6)


SHAPES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    shapes=SHAPES,
    form=st.sampled_from(FORMS),
    page_size=st.sampled_from([1, 4, 16, 64]),
    limit=st.sampled_from([1, 5, 17, 1 << 30]),
    interleave=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_any_batch_equals_float64(shapes, form, page_size, limit, interleave, seed):
    torch.manual_seed(seed)
    mla = layer(TINY, rope_interleave=interleave)
    cfg = mla.cfg
    histories, xs = batch(mla, shapes)
    with pytest.MonkeyPatch.context() as patch:
        columns = cfg.qk_nope_head_dim + cfg.v_head_dim + cfg.qk_head_dim
        patch.setattr(plan, "EXPANSION_BYTES", limit * cfg.num_heads * columns * 4)
        outs = run_filled(mla, histories, xs, form, page_size)
    assert_same(outs, exact(mla, histories, xs), 2e-5)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 25), min_size=1, max_size=6), seed=st.integers(0, 1 << 30))
def test_a_prompt_may_come_in_any_pieces(cuts, seed):
    torch.manual_seed(seed)
    mla = layer(TINY)
    x = tokens(mla, sum(cuts))
    cache = cache_for(mla, 40, 4)
    pieces = torch.cat([run(mla, cache, [0], [piece])[0] for piece in x.split(cuts)])
    assert_same([pieces], run(mla, cache_for(mla, 40, 4), [0], [x]))


def test_a_request_may_reach_the_last_position():
    mla = layer(TINY, max_position_embeddings=40)
    cache = cache_for(mla, 8, 8)
    reference = Float64MLA(mla.cfg, mla.state_dict())
    x = tokens(mla, 40)
    outs = [run(mla, cache, [0], [part])[0] for part in x.split([38, 1, 1])]
    assert_same([torch.cat(outs)], [reference(x)[0]], 2e-5)
    with pytest.raises(ValueError, match="max_position_embeddings is 40"):
        cache.step([0], [1])
    assert cache.length(0) == 40


def test_positions_beyond_the_original_context_are_yarns():
    mla = layer()
    histories, xs = batch(mla, [(6000, 2)])
    assert_same(run_filled(mla, histories, xs), exact(mla, histories, xs), 2e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_grad_mode(mode):
    mla = layer().requires_grad_(True)
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    true = exact(mla, histories, xs)
    with mode():
        outs = run_filled(mla, histories, [x.clone().requires_grad_(not x.is_inference()) for x in xs])
    assert_same(outs, true, 2e-5)
    assert not any(out.requires_grad for out in outs)


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_grad_modes_may_change_between_steps(modes):
    """Absorption weights, RoPE's table and plans made in one mode serve in the other."""
    mla = layer()
    cache = cache_for(mla)
    reference = Float64MLA(mla.cfg, mla.state_dict())
    past = None
    for mode, new in zip(modes * 2, (5, 1, 7, 1)):
        x = tokens(mla, new)
        with mode():
            out = run(mla, cache, [0], [x])[0]
        true, past = reference(x, past)
        assert_same([out], [true], 2e-5)


def test_requests_that_came_in_inference_mode_go_on_outside():
    """More of them than the block table was made for: it grows in inference mode."""
    mla = layer(TINY)
    cache = cache_for(mla, 100, 4)
    xs = [tokens(mla, 1) for _ in range(40)]
    with torch.inference_mode():
        first = run(mla, cache, range(40), xs)
    assert_same(first, exact(mla, [None] * 40, xs), 2e-5)
    with torch.no_grad():
        outs = run(mla, cache, range(40), [tokens(mla, 5) for _ in xs])
    assert len(outs) == 40 and cache.num_free_pages == 20


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
def test_the_default_dtype_does_not_matter(monkeypatch, default_dtype, dtype):
    """DeepSeek's own scripts set bfloat16: what merges pieces must not be kept in it."""
    mla = layer()
    histories, xs = batch(mla, [(70, 30), (0, 9), (33, 1)])
    monkeypatch.setattr(plan, "EXPANSION_BYTES", 1 << 17)
    for form in FORMS:
        default_dtype(F32)
        expected = run_filled(mla, histories, xs, form)
        default_dtype(dtype)
        assert_same(run_filled(mla, histories, xs, form), expected, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_default_device_does_not_matter(form):
    """The host's tables stay on the host, and the rest where the cache is."""
    mla = layer()
    histories, xs = batch(mla, [(70, 30), (0, 9), (33, 1), (2, 9)])
    expected = run_filled(mla, histories, xs, form)
    with torch.device("meta"):
        cache = LatentCache(mla.cfg, 20, 16, device="cpu", dtype=F32)
        for request, past in enumerate(histories):
            if len(past.latent):
                cache.fill(request, *past)
        outs = run(mla, cache, range(4), xs, form)
    assert_same(outs, expected, 1e-6)


def test_what_inference_mode_made_serves_outside():
    with torch.inference_mode():
        mla = layer()
        cache = cache_for(mla)
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    true = exact(mla, histories, xs)
    cache.fill(0, *histories[0])
    assert_same(run(mla, cache, [0, 1], xs), true, 2e-5)


def test_a_history_that_records_gradients_does_not_reach_the_cache():
    mla = layer()
    past = history(mla, 20)
    true = exact(mla, [past], xs := [tokens(mla, 2)])
    cache = cache_for(mla)
    cache.fill(0, past.latent.requires_grad_(), past.pe)
    assert not cache.storage[0].requires_grad
    assert_same(run(mla, cache, [0], xs), true, 2e-5)


def test_hidden_states_may_be_strided():
    mla = layer()
    x = tokens(mla, 9)
    wide = torch.randn(9, 2 * mla.cfg.hidden_size)
    wide[:, ::2] = x
    assert_same(run(mla, cache_for(mla), [0], [wide[:, ::2]]), run(mla, cache_for(mla), [0], [x]))


def test_hidden_states_are_not_changed():
    mla = layer("v2_lite")
    x = tokens(mla, 9)
    before = x.clone()
    run(mla, cache_for(mla), [0], [x])
    assert torch.equal(x, before)


# Weights


def both_forms(mla, histories, xs):
    return [out for form in ("absorbed", "expanded") for out in run_filled(mla, histories, xs, form)]


@pytest.mark.parametrize("model", MODELS)
def test_parameters_bear_the_checkpoints_names(model):
    theirs = Theirs(model).attention
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in layer(model).state_dict().items()} == shapes


@pytest.mark.parametrize("model", MODELS)
def test_state_dict_comes_back(model):
    mla = layer(model)
    state = {name: value.clone() for name, value in mla.state_dict().items()}
    given_state = dict(state)
    other = layer(model)
    other.load_state_dict(given_state)
    assert list(given_state) == list(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]) and torch.equal(given_state[name], state[name]), name
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    assert_same(both_forms(other, histories, xs), both_forms(mla, histories, xs), 1e-6)


def test_state_dict_within_a_larger_module():
    one, two = layer("minicpm3"), layer("minicpm3", layer_idx=1)
    block = torch.nn.ModuleDict({"first": torch.nn.ModuleList([one]), "second": two})
    state = {name: value.clone() for name, value in block.state_dict().items()}
    assert "first.0.q_b_proj.weight" in state
    for parameter in block.parameters():
        parameter.zero_()
    block.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("model", ["r1", "minicpm3"])
def test_load_state_dict_may_assign(model):
    mla, other = layer(model), layer(model)
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    both_forms(other, histories, xs)
    other.load_state_dict({name: value.clone() for name, value in mla.state_dict().items()}, assign=True)
    assert_same(both_forms(other, histories, xs), both_forms(mla, histories, xs), 1e-6)


def test_a_wrong_state_dict_is_refused():
    mla = layer("minicpm3")
    state = mla.state_dict()
    with pytest.raises(RuntimeError, match=r"kv_b_proj\.weight"):
        mla.load_state_dict({name: value for name, value in state.items() if name != "kv_b_proj.weight"})
    for name in ("o_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight"):  # two whose rows are permuted
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            mla.load_state_dict({**state, name: state[name][:-1]})


def torch_saved(mla):
    file = io.BytesIO()
    torch.save(mla, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda mla: pickle.loads(pickle.dumps(mla)),
    "torch.save": torch_saved,
    "to and back": lambda mla: mla.double().float(),
    "to nothing new": lambda mla: mla.to(F32),
    "share_memory": lambda mla: mla.share_memory(),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("model", ["r1", "r1_bias", "v2_lite", "minicpm3"])
def test_copies_compute_the_same(model, way):
    mla = layer(model)
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    before = both_forms(mla, histories, xs)
    state = {name: value.clone() for name, value in mla.state_dict().items()}
    copied = COPIES[way](mla)
    assert_same(both_forms(copied, histories, xs), before, 1e-6)
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
    # The joined projection of the copy follows the copy's own weights.
    for name in ("kv_a_proj_with_mqa", "q_proj" if mla.cfg.q_lora_rank is None else "q_a_proj"):
        copied.get_submodule(name).weight.mul_(1.5)
    assert_same(both_forms(copied, histories, xs), 2 * exact(copied, histories, xs), 2e-5)
    if copied is not mla:
        assert_same(both_forms(mla, histories, xs), before, 1e-6)


def test_a_saved_module_holds_its_weights_only():
    """Not what was derived from them for the absorbed form, which would add kv_b_proj a second time."""
    mla = layer()
    before = len(pickle.dumps(mla))
    both_forms(mla, *batch(mla, [(3, 1)]))
    assert len(pickle.dumps(mla)) < before + 10_000


@pytest.mark.parametrize("model", ["r1", "minicpm3"])
def test_to_another_dtype(model):
    mla = layer(model)
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    run_filled(mla, histories, xs)
    reference = layer(model, BF16)
    reference.load_state_dict(mla.state_dict())
    mla.to(BF16)
    assert mla.o_proj.weight.dtype == BF16
    histories = [History(*(x.to(BF16) for x in past)) for past in histories]
    xs = [x.to(BF16) for x in xs]
    assert all(map(torch.equal, both_forms(mla, histories, xs), both_forms(reference, histories, xs)))


def test_to_empty_from_meta():
    mla = layer()
    made = MLA(mla.cfg, device="meta", dtype=F32).to_empty(device="cpu").requires_grad_(False)
    made.load_state_dict(mla.state_dict())
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    assert_same(both_forms(made, histories, xs), both_forms(mla, histories, xs), 1e-6)


def in_place(mla):
    mla.kv_b_proj.weight.mul_(-2)


def in_place_in_inference_mode(mla):
    with torch.inference_mode():
        mla.kv_b_proj.weight.mul_(-2)


def by_load_state_dict(mla):
    mla.load_state_dict({**mla.state_dict(), "kv_b_proj.weight": mla.kv_b_proj.weight * -2})


def by_a_new_parameter(mla):
    mla.kv_b_proj.weight = torch.nn.Parameter(mla.kv_b_proj.weight * -2, requires_grad=False)


def by_new_data(mla):
    mla.kv_b_proj.weight.data = mla.kv_b_proj.weight * -2


@pytest.mark.parametrize(
    "change", [in_place, in_place_in_inference_mode, by_load_state_dict, by_a_new_parameter, by_new_data]
)
def test_a_change_of_kv_b_proj_is_seen(change):
    """The absorbed form works on copies of kv_b_proj's halves: they must follow it."""
    mla = layer()
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    before = both_forms(mla, histories, xs)
    change(mla)
    after = both_forms(mla, histories, xs)
    assert error(after[0], before[0]) > 0.1
    assert_same(after, 2 * exact(mla, histories, xs), 2e-5)


def by_a_write_that_is_not_counted(mla):
    mla.kv_b_proj.weight.data.copy_(mla.kv_b_proj.weight * -2)


def by_numpy(mla):
    mla.kv_b_proj.weight.numpy()[:] *= -2


@pytest.mark.parametrize("change", [by_a_write_that_is_not_counted, by_numpy])
def test_weights_changed_makes_uncounted_writes_seen(change):
    mla = layer()
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    both_forms(mla, histories, xs)
    change(mla)
    mla.weights_changed()
    assert_same(both_forms(mla, histories, xs), 2 * exact(mla, histories, xs), 2e-5)


def test_a_new_kv_b_proj_at_the_old_ones_address_is_seen():
    """What an allocator does with memory just given back: same address, same version, another content."""
    mla = layer()
    histories, xs = batch(mla, [(20, 3), (0, 9)])
    memory = mla.kv_b_proj.weight.numpy().copy()
    for factor in (1, -2):
        memory *= factor
        mla.kv_b_proj.weight = torch.nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        assert_same(both_forms(mla, histories, xs), 2 * exact(mla, histories, xs), 2e-5)


def test_load_state_dict_is_seen_where_versions_are_not_counted():
    with torch.inference_mode():
        mla, other = layer(), layer()
        histories, xs = batch(mla, [(20, 3), (0, 9)])
        both_forms(mla, histories, xs)
        mla.load_state_dict(other.state_dict())
        assert_same(both_forms(mla, histories, xs), both_forms(other, histories, xs), 1e-6)


# Bad calls


def bad_width(mla, cache, x, step):
    return {"hidden_states": x[:, :-1], "step": step}


def bad_rank(mla, cache, x, step):
    return {"hidden_states": x[None], "step": step}


def bad_tokens(mla, cache, x, step):
    return {"hidden_states": x[:-1], "step": step}


def bad_dtype(mla, cache, x, step):
    return {"hidden_states": x.double(), "step": step}


def bad_device(mla, cache, x, step):
    return {"hidden_states": x.to("meta"), "step": step}


def no_tensor(mla, cache, x, step):
    return {"hidden_states": x.tolist(), "step": step}


def no_step(mla, cache, x, step):
    return {"hidden_states": x, "step": cache}


def bad_form(mla, cache, x, step):
    return {"hidden_states": x, "step": step, "form": "x"}


def other_cache(**changes):
    def call(mla, cache, x, step):
        other = LatentCache(config("r1", **changes), 8, dtype=F32)
        return {"hidden_states": x, "step": other.step([0], [len(x)])}

    return call


def other_dtype(mla, cache, x, step):
    return {"hidden_states": x, "step": LatentCache(mla.cfg, 8, dtype=BF16).step([0], [len(x)])}


def form_in_a_list(mla, cache, x, step):
    return {"hidden_states": x, "step": step, "form": ["absorbed"]}


BAD = {
    "width": (bad_width, ValueError, r"hidden_states.*128.*127"),
    "rank": (bad_rank, ValueError, r"hidden_states.*\[1, 7, 128\]"),
    "tokens": (bad_tokens, ValueError, "hidden_states.*7.*6"),
    "dtype": (bad_dtype, TypeError, "hidden_states.*float32.*float64"),
    "device": (bad_device, ValueError, "hidden_states.*cpu.*meta"),
    "no tensor": (no_tensor, TypeError, "hidden_states.*list"),
    "no step": (no_step, TypeError, "step.*LatentCache"),
    "form": (bad_form, ValueError, "form.*absorbed.*expanded.*'x'"),
    "form in a list": (form_in_a_list, TypeError, r"form.*absorbed.*expanded.*\['absorbed'\]"),
    "cache dtype": (other_dtype, ValueError, "step.*float32.*bfloat16"),
    "kv_lora_rank": (other_cache(kv_lora_rank=256), ValueError, "kv_lora_rank 256.*512"),
    "qk_rope_head_dim": (other_cache(qk_rope_head_dim=32), ValueError, "qk_rope_head_dim 32.*64"),
    "rope_theta": (other_cache(rope_parameters={**YARN, "rope_theta": 5e5}), ValueError, "rope_theta 500000.*10000"),
    "rope_scaling": (other_cache(rope_parameters=DEFAULT), ValueError, "rope_scaling None.*yarn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_named_and_changes_nothing(name):
    make, kind, message = BAD[name]
    mla = layer()
    first, second = tokens(mla, 20), tokens(mla, 7)
    caches = cache_for(mla), cache_for(mla)
    for cache in caches:
        run(mla, cache, [0, 1], [first, second])
    step = caches[0].step([0, 2], [3, 4])
    x = tokens(mla, 7)
    before = caches[0].storage[0].clone(), caches[0].num_free_pages, caches[0].requests
    with pytest.raises(kind, match=message):
        mla(**make(mla, caches[0], x, step))
    assert torch.equal(caches[0].storage[0], before[0])
    assert (caches[0].num_free_pages, caches[0].requests) == before[1:]
    assert caches[0].length(0) == 20
    # The step is as good as before.
    assert torch.equal(mla(x, step), mla(x, caches[1].step([0, 2], [3, 4])))
    assert torch.equal(caches[0].storage[0], caches[1].storage[0])


def test_a_cache_on_another_device_is_named():
    mla = layer()
    step = LatentCache(mla.cfg, 8, dtype=F32, device="meta").step([0], [7])
    with pytest.raises(ValueError, match=r"step.*cpu.*meta"):
        mla(tokens(mla, 7), step)


def test_a_layer_outside_the_cache_is_named():
    mla = layer(layer_idx=1)
    step = cache_for(mla).step([0], [2])
    with pytest.raises(ValueError, match=r"layer_idx 1.*num_layers 1"):
        mla(tokens(mla, 2), step)


def test_a_stale_or_used_step_is_refused_and_nothing_written():
    mla = layer()
    cache = cache_for(mla)
    old = cache.step([0], [2])
    step = cache.step([0], [3])
    with pytest.raises(ValueError, match=r"stale.*newer step"):
        mla(tokens(mla, 2), old)
    assert not cache.storage[0].any()
    mla(tokens(mla, 3), step)
    before = cache.storage[0].clone()
    with pytest.raises(ValueError, match="already used by layer 0"):
        mla(tokens(mla, 3), step)
    assert torch.equal(cache.storage[0], before)


def test_a_layer_without_the_history_is_refused():
    mla, cache = layer(layer_idx=1), cache_for(layer(), num_layers=2)
    past = history(mla, 9)
    cache.fill(0, *past, layer=0)
    step = cache.step([0], [2])
    with pytest.raises(ValueError, match="layer 1 holds 0 rows of request 0"):
        mla(tokens(mla, 2), step)
    cache.fill(0, *past, layer=1)
    xs = [tokens(mla, 2)]
    assert_same(run(mla, cache, [0], xs), exact(mla, [past], xs), 2e-5)


def test_a_failure_half_way_leaves_the_step_usable(monkeypatch):
    mla = layer()
    histories, xs = batch(mla, [(20, 1), (0, 9)])
    cache = cache_for(mla)
    cache.fill(0, *histories[0])
    step = cache.step([0, 1], [1, 9])
    with monkeypatch.context() as patch:
        patch.setattr(mla, "_attend", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mla(torch.cat(xs), step)
    assert (cache.length(0), cache.length(1)) == (20, 0)
    assert_same(mla(torch.cat(xs), step).split([1, 9]), exact(mla, histories, xs), 2e-5)
    assert (cache.length(0), cache.length(1)) == (21, 9)


def test_a_full_cache_goes_on():
    mla = layer()
    cache = cache_for(mla, 2, 16)
    xs = [tokens(mla, 20)]
    run(mla, cache, [0], xs)
    with pytest.raises(CacheFull):
        cache.step([0, 1], [1, 1])
    more = [tokens(mla, 12)]
    outs = run(mla, cache, [0], more)
    assert_same(outs, [exact(mla, [history(mla, 0)], [torch.cat(xs + more)])[0][20:]], 2e-5)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"cfg": R1}, TypeError, "cfg must be an MLAConfig"),
        ({"layer_idx": -1}, ValueError, "layer_idx"),
        ({"layer_idx": True}, TypeError, "layer_idx"),
        ({"layer_idx": "0"}, TypeError, "layer_idx"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of .*bfloat16.*got torch.int8"),
        ({"dtype": "bfloat16"}, TypeError, "dtype must be one of .*got 'bfloat16'"),
        ({"device": "nosuch"}, ValueError, "device must be .*got 'nosuch'"),
        ({"device": 1.5}, ValueError, "device must be .*got 1.5"),
    ],
)
def test_bad_arguments_of_the_module(arguments, kind, message):
    with pytest.raises(kind, match=message):
        MLA(**{"cfg": config(TINY), **arguments})


# Memory

# form, heads, past, new and what a call may allocate, in MiB: what was measured and half as much again. 16384 keys of
# 16 heads, expanded at once, would take 448 MiB, and PyTorch's scores and padded copies more; the mask of 16384 new
# tokens at once 1280 MiB.
MEMORY = [
    ("absorbed", 16, 16384, 4, 75),
    ("expanded", 16, 16384, 4, 105),
    ("absorbed", 2, 0, 16384, 670),
]

# Not ru_maxrss, which a child inherits from the process that started it.
_MEMORY = """
import re, sys, torch
from ntops_mla import MLA, LatentCache, MLAConfig
torch.set_num_threads(1)
form, heads, past, new = sys.argv[1], *map(int, sys.argv[2:])
cfg = MLAConfig(hidden_size=64, num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128, max_position_embeddings=1 << 16)
mla = MLA(cfg, dtype=torch.float32)
cache = LatentCache(cfg, num_pages=(past + new) // 64 + 2, dtype=torch.float32)
cache.storage[0].normal_()
if past:  # a history without its tensors, which would raise the peak before the call
    cache.step([0], [past]).commit(0)
run = lambda request, new: mla(torch.randn(new, 64), cache.step([request], [new]), form)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
run(1, 2)  # what the first call loads is not counted
before = peak()
assert run(0, new).isfinite().all()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("form, heads, past, new, mebibytes", MEMORY)
def test_memory_is_bounded(form, heads, past, new, mebibytes):
    arguments = [form, *map(str, (heads, past, new))]
    done = subprocess.run([sys.executable, "-c", _MEMORY, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < mebibytes
