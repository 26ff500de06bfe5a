"""MLAConfig and RoPE's table: fields, config.json in its spellings, and the numbers against transformers."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch

from ntops_mla import MLAConfig
from ntops_mla.rope_table import RopeTable, attention_factor, inverse_frequencies

SIZES = {
    "hidden_size": 64,
    "num_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# A config.json as DeepSeek-R1 has it: the old spelling.
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def written(tmp_path, config):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return tmp_path


# Fields


def test_defaults():
    cfg = MLAConfig(**SIZES)
    assert (cfg.q_lora_rank, cfg.rope_theta, cfg.rope_scaling) == (None, 10000.0, None)
    assert (cfg.rope_interleave, cfg.attention_bias) == (True, False)
    assert (cfg.max_position_embeddings, cfg.rms_norm_eps) == (4096, 1e-6)
    assert (cfg.qk_head_dim, cfg.latent_dim) == (192, 576)
    assert cfg.softmax_scale == 192**-0.5


@pytest.mark.parametrize(
    "cfg, scale",
    [
        (MLAConfig.deepseek_r1(), 0.1352337788608801),
        (MLAConfig.deepseek_v2_lite(), 0.1147213867929),
        (MLAConfig(**SIZES, rope_scaling={**YARN, "mscale_all_dim": None}), 192**-0.5),
        (MLAConfig(**SIZES, rope_scaling={**YARN, "mscale_all_dim": 0}), 192**-0.5),
        (MLAConfig(**SIZES, rope_scaling={**YARN, "factor": 1.0}), 192**-0.5),
        (MLAConfig(**SIZES, rope_scaling={**YARN, "mscale": None}), 0.1352337788608801),
    ],
)
def test_softmax_scale(cfg, scale):
    assert cfg.softmax_scale == pytest.approx(scale, rel=1e-12)


BAD_FIELDS = [
    *[({name: 0}, ValueError, f"{name} must be positive, got 0") for name in SIZES],
    *[({name: 1.5}, TypeError, f"{name} must be an int, got 1.5") for name in SIZES],
    ({"num_heads": True}, TypeError, "num_heads"),
    ({"hidden_size": None}, TypeError, "hidden_size"),
    ({"max_position_embeddings": -1}, ValueError, "max_position_embeddings"),
    ({"q_lora_rank": -1}, ValueError, "q_lora_rank"),
    ({"q_lora_rank": 1.0}, TypeError, "q_lora_rank"),
    ({"q_lora_rank": False}, TypeError, "q_lora_rank"),
    ({"qk_rope_head_dim": 63}, ValueError, "qk_rope_head_dim must be even"),
    ({"rope_interleave": 1}, TypeError, "rope_interleave"),
    ({"attention_bias": None}, TypeError, "attention_bias"),
    ({"rope_theta": 0}, ValueError, "rope_theta"),
    ({"rope_theta": math.inf}, ValueError, "rope_theta"),
    ({"rope_theta": "1e4"}, TypeError, "rope_theta"),
    ({"rms_norm_eps": math.nan}, ValueError, "rms_norm_eps"),
    ({"rms_norm_eps": True}, TypeError, "rms_norm_eps"),
    ({"rope_scaling": "yarn"}, TypeError, "rope_scaling must be None or a dict"),
    ({"rope_scaling": {**YARN, "factor": -1}}, ValueError, "factor"),
    ({"rope_scaling": {**YARN, "factor": "40"}}, ValueError, "factor"),
    ({"rope_scaling": {**YARN, "beta_fast": True}}, ValueError, "beta_fast"),
    ({"rope_scaling": {**YARN, "mscale": "1"}}, ValueError, "mscale"),
    ({"rope_scaling": {**YARN, "mscale_all_dim": [1]}}, ValueError, "mscale_all_dim"),
    ({"rope_scaling": {**YARN, "attention_factor": "1"}}, ValueError, "attention_factor"),
    ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, ValueError, "original_max_position"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0, "factor": None}}, ValueError, "original_max"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": "1", "factor": None}}, ValueError, "original_max"),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, ValueError, "rope_theta must be above 1 .*yarn.*got 1.0"),
    ({"rope_scaling": YARN, "rope_theta": 0.5}, ValueError, "rope_theta must be above 1"),
    ({"rope_scaling": {"full_attention": YARN, "sliding_attention": YARN}}, ValueError, "full_attention"),
]


@pytest.mark.parametrize("change, kind, message", BAD_FIELDS)
def test_a_bad_field_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        MLAConfig(**{**SIZES, **change})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3", "proportional", 7])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_another_scaling_is_named(kind, key):
    with pytest.raises(ValueError, match=f"{kind}.*not supported.*yarn"):
        MLAConfig(**SIZES, rope_scaling={key: kind, "factor": 2.0})


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 5.0}])
def test_no_scaling(scaling):
    assert MLAConfig(**SIZES, rope_scaling=scaling).rope_scaling is None


@pytest.mark.parametrize("kind", ["yarn", "default"])
def test_a_factor_that_yarn_does_not_know_is_named(kind):
    """Mistral's multiplies the queries, whatever the type: leaving it out would be wrong without a sound."""
    with pytest.raises(ValueError, match="llama_4_scaling_beta"):
        MLAConfig(**SIZES, rope_scaling={**YARN, "rope_type": kind, "llama_4_scaling_beta": 0.1})


def test_q_lora_rank_zero_is_none():
    assert MLAConfig(**SIZES, q_lora_rank=0).q_lora_rank is None
    assert MLAConfig(**SIZES, q_lora_rank=0) == MLAConfig(**SIZES)


@pytest.mark.parametrize("cfg", [MLAConfig.deepseek_r1(), MLAConfig(**SIZES)])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cfg: pickle.loads(pickle.dumps(cfg))])
def test_a_config_is_a_value(cfg, way):
    other = way(cfg)
    assert other == cfg and hash(other) == hash(cfg) and len({other, cfg}) == 1
    assert other.softmax_scale == cfg.softmax_scale
    changed = dataclasses.replace(cfg, max_position_embeddings=77)
    assert changed != cfg and changed.rope_scaling == cfg.rope_scaling


def test_a_config_does_not_change():
    scaling = dict(YARN)
    cfg = MLAConfig(**SIZES, rope_scaling=scaling)
    scaling["factor"] = 2.0
    assert cfg.rope_scaling["factor"] == 40.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.num_heads = 3


# config.json


def test_the_old_spelling_is_deepseek_r1(tmp_path):
    assert MLAConfig.from_pretrained(written(tmp_path, R1)) == MLAConfig.deepseek_r1()
    assert MLAConfig.from_pretrained(str(tmp_path / "config.json")) == MLAConfig.deepseek_r1()


def test_the_new_spelling_is_the_same(tmp_path):
    new = without(R1, "rope_scaling", "rope_theta")
    new["rope_parameters"] = {**YARN, "rope_theta": 10000.0}
    assert MLAConfig.from_pretrained(written(tmp_path, new)) == MLAConfig.deepseek_r1()


def test_text_config_is_entered(tmp_path):
    outer = {"model_type": "kimi_vl", "hidden_size": 5, "text_config": R1, "vision_config": {"hidden_size": 3}}
    assert MLAConfig.from_pretrained(written(tmp_path, outer)) == MLAConfig.deepseek_r1()


BARE = without(R1, "rope_scaling", "rope_theta")


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {"rope_theta": 10000.0, "rope_scaling": None}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5, "rope_scaling": None}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta": 1e6, "rope_scaling": None}),
        ({"rope_parameters": None, "rope_theta": 7.0}, {"rope_theta": 7.0}),
        ({"model_type": "minicpm3"}, {"rope_interleave": False}),
        ({"model_type": "minicpm3", "rope_interleave": True}, {"rope_interleave": True}),
        ({"rope_interleave": False}, {"rope_interleave": False}),
        ({"rope_interleave": None}, {"rope_interleave": True}),
        ({"attention_bias": True}, {"attention_bias": True}),
        ({"attention_bias": None}, {"attention_bias": False}),
        ({"q_lora_rank": None}, {"q_lora_rank": None}),
        ({"q_lora_rank": 0}, {"q_lora_rank": None}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}),
        ({"max_position_embeddings": 99}, {"max_position_embeddings": 99}),
        ({"mla_scale_q_lora": False, "mla_scale_kv_lora": None, "mla_use_nope": False}, {}),
    ],
)
def test_keys_of_config_json(change, expected):
    cfg = MLAConfig.from_dict({**BARE, **change})
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize("key", ["qk_nope_head_dim", "num_attention_heads", "v_head_dim", "hidden_size"])
def test_missing_keys_are_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"'deepseek_v3' is not an MLA model: it lacks .*{key}"):
        MLAConfig.from_pretrained(written(tmp_path, without(R1, key)))


def test_all_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"'llama'.*kv_lora_rank.*qk_nope_head_dim.*qk_rope_head_dim.*v_head_dim"):
        MLAConfig.from_dict({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mla_scale_q_lora": True}, "mla_scale_q_lora"),
        ({"mla_scale_kv_lora": 1.5}, "mla_scale_kv_lora"),
        ({"mla_use_nope": True}, "mla_use_nope"),
        ({"model_type": "kimi_linear"}, "kimi_linear.*no rotary embedding"),
        ({"model_type": "longcat_flash"}, "longcat_flash.*multiplies q and kv"),
        ({"model_type": "longcat_flash_ngram"}, "longcat_flash_ngram.*multiplies q and kv"),
        ({"model_type": "hy_v4"}, "hy_v4.*sinks"),
        ({"model_type": "axk2"}, "axk2.*gates"),
        ({"model_type": "bailing_hybrid"}, "bailing_hybrid.*gates"),
        ({"model_type": "dots3_note_text"}, "dots3_note_text.*factors"),
        ({"model_type": "glm5_next_text"}, "glm5_next_text.*no rotary embedding"),
        ({"model_type": "mistral_large4_text"}, "mistral_large4_text.*by position"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "yarn", **without(YARN, "rope_type"), "llama_4_scaling_beta": 1}}, "llama_4"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {}, "rope_parameters": 5}, "rope_(scaling|parameters) must be a dict"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_dict({**BARE, **change})


@pytest.mark.parametrize("inner, outer", [("kimi_linear", "kimi_vl"), ("deepseek_v3", "longcat_flash_omni")])
def test_a_variant_in_a_multimodal_config_is_named(inner, outer):
    with pytest.raises(ValueError, match=r"kimi_linear|longcat_flash_omni"):
        MLAConfig.from_dict({"model_type": outer, "text_config": {**BARE, "model_type": inner}})


def test_rope_theta_of_one_without_scaling():
    assert MLAConfig(**SIZES, rope_theta=1.0).rope_theta == 1.0


def test_sparse_selection_warns():
    with pytest.warns(UserWarning, match="index_topk 2048"):
        cfg = MLAConfig.from_dict({**R1, "index_topk": 2048})
    assert cfg == MLAConfig.deepseek_r1()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MLAConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MLAConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, message", [("{", "not valid JSON"), ("", "not valid JSON"), ("[1]", "list")])
def test_a_broken_config_json(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_pretrained(written(tmp_path, content))


def test_weights_in_place_of_a_config_json(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors' is not valid JSON, as a config\.json is"):
        MLAConfig.from_pretrained(path)


# Numbers, against transformers

# scaling (None: default), theta, RoPE's columns
ROPES = {
    "r1": (YARN, 10000.0, 64),
    "v2_lite": ({**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, 10000.0, 64),
    "unequal mscale": ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, 10000.0, 64),
    "no mscale": (without(YARN, "mscale", "mscale_all_dim"), 10000.0, 64),
    "mscale alone": (without(YARN, "mscale_all_dim"), 10000.0, 64),
    "not truncated": ({**YARN, "truncate": False}, 10000.0, 64),
    "truncate null": ({**YARN, "truncate": None}, 10000.0, 64),
    "factor null": ({**YARN, "factor": None}, 10000.0, 64),
    "factor null, no mscale": ({**without(YARN, "mscale", "mscale_all_dim"), "factor": None}, 10000.0, 64),
    "factor below 1": ({**YARN, "factor": 0.5}, 10000.0, 64),
    "attention_factor": ({**YARN, "attention_factor": 0.83}, 10000.0, 64),
    "betas": ({**YARN, "beta_fast": 8, "beta_slow": 2}, 10000.0, 64),
    "betas null": ({**YARN, "beta_fast": None, "beta_slow": None}, 10000.0, 64),
    "ramp of no length": ({**YARN, "beta_fast": 1e9, "beta_slow": 1e8}, 10000.0, 64),
    "theta 1e6, 32 columns": (YARN, 1e6, 32),
    "default": (None, 10000.0, 64),
    "default, theta 1e6": (None, 1000000, 32),
}


def theirs(scaling, theta, dim):
    pytest.importorskip("transformers", minversion="5.15")
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    return DeepseekV3RotaryEmbedding(
        DeepseekV3Config(rope_parameters=parameters, qk_rope_head_dim=dim, max_position_embeddings=163840)
    )


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_tables_are_transformers(name):
    scaling, theta, dim = ROPES[name]
    rotary = theirs(scaling, theta, dim)
    sizes = {**SIZES, "qk_rope_head_dim": dim}
    cfg = MLAConfig(**sizes, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=163840)
    inverse = inverse_frequencies(dim, theta, cfg.rope_scaling)
    assert inverse.dtype == torch.float32 and torch.equal(inverse, rotary.inv_freq)
    assert attention_factor(cfg.rope_scaling) == pytest.approx(rotary.attention_scaling, rel=1e-15)
    positions = torch.tensor([0, 1, 2, 1023, 1024, 4095, 4096, 70000, 163839])
    table = RopeTable(dim, theta, cfg.rope_scaling, 163840, torch.device("cpu"))
    cos, sin = table.rows(positions, 163840)
    expected = rotary(torch.zeros(1), positions[None])
    for value, reference in zip((cos, sin), expected):
        assert value.shape == (9, dim // 2) and value.dtype == torch.float32
        torch.testing.assert_close(value, reference[0, :, : dim // 2], rtol=0, atol=2e-7)


def test_the_table_grows_and_keeps_its_values():
    cfg = MLAConfig.deepseek_r1()
    table = RopeTable(64, cfg.rope_theta, cfg.rope_scaling, 163840, torch.device("cpu"))
    whole = RopeTable(64, cfg.rope_theta, cfg.rope_scaling, 163840, torch.device("cpu"))
    all_cos, all_sin = whole.rows(torch.arange(9000), 9000)
    for length in (1, 1024, 1025, 5, 3000, 9000):
        positions = torch.randint(0, length, (20,))
        cos, sin = table.rows(positions, length)
        assert torch.equal(cos, all_cos[positions]) and torch.equal(sin, all_sin[positions])


@pytest.mark.parametrize(
    "spellings",
    [
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5.0, "rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_scaling": YARN, "rope_theta": 7.0},
        {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 9.0}},
        {"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 9.0}},
    ],
)
def test_of_several_spellings_the_one_that_transformers_reads(spellings):
    pytest.importorskip("transformers", minversion="5.15")
    from transformers import DeepseekV3Config

    cfg = MLAConfig.from_dict({**BARE, **copy.deepcopy(spellings)})
    read = DeepseekV3Config(**{**without(BARE, "architectures", "model_type"), **copy.deepcopy(spellings)})
    kind = "default" if cfg.rope_scaling is None else cfg.rope_scaling["rope_type"]
    assert (kind, cfg.rope_theta) == (read.rope_parameters["rope_type"], read.rope_parameters["rope_theta"])


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"])
def test_what_transformers_saves_is_read(tmp_path, model_type):
    pytest.importorskip("transformers", minversion="5.15")
    from transformers import AutoConfig

    try:
        saved = AutoConfig.for_model(model_type)
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {model_type}")
    saved.save_pretrained(tmp_path)
    cfg = MLAConfig.from_pretrained(tmp_path)
    assert cfg.num_heads == saved.num_attention_heads
    assert cfg.rope_interleave == (model_type != "minicpm3")
    assert cfg.max_position_embeddings == saved.max_position_embeddings
