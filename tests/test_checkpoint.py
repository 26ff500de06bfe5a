"""Checkpoints in Hugging Face's format, written small and read back: sharded, whole, FP8 with scales, broken."""

import json

import pytest
import torch

from ntops_mla import MLA, LatentCache, MLAConfig, checkpoint
from ntops_mla.testing import Float64MLA

save_file = pytest.importorskip("safetensors.torch").save_file

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 160,
    "num_attention_heads": 2,
    "q_lora_rank": 72,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
FP8 = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
BF16, F32 = torch.bfloat16, torch.float32


def attention(config=CONFIG, dtype=BF16):
    """One layer's tensors in the checkpoint's names."""
    state = MLA(MLAConfig.from_dict(config)).state_dict()
    return {
        name: (torch.rand(value.shape) + 0.5 if "layernorm" in name else torch.randn(value.shape) / 12).to(dtype)
        for name, value in state.items()
    }


def quantised(weights, block=(128, 128)):
    """FP8 weights with weight_scale_inv, as DeepSeek's; norms and biases stay. Also: what they mean, in float32."""
    stored, meant = {}, {}
    for name, value in weights.items():
        if value.dim() != 2:
            stored[name], meant[name] = value, value.float()
            continue
        grid = tuple(-(-size // edge) for size, edge in zip(value.shape, block))
        scale = torch.rand(grid) + 0.5
        fp8 = value.float().to(torch.float8_e4m3fn)
        spread = torch.empty(value.shape)
        for i in range(value.shape[0]):
            for j in range(grid[1]):
                spread[i, j * block[1] : (j + 1) * block[1]] = scale[i // block[0], j]
        stored[name], stored[name + "_scale_inv"] = fp8, scale
        meant[name] = fp8.float() * spread
    return stored, meant


def named(weights, layer, prefix="model."):
    return {f"{prefix}layers.{layer}.self_attn.{name}": value.contiguous() for name, value in weights.items()}


OTHERS = {
    "model.embed_tokens.weight": torch.zeros(2, 2),
    "model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2),
    "model.norm.weight": torch.zeros(2),
}


def write(path, tensors, config=CONFIG, shards=2):
    """shards: 0, one file without an index; else an index over so many files, tensors dealt out in turn."""
    (path / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(tensors, path / "model.safetensors")
        return path
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name, at in weight_map.items() if at == file}, path / file)
    (path / checkpoint.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def assert_computes(mla, weights, allowed):
    """The module's output is that of `weights`, plainly computed."""
    dtype = mla.o_proj.weight.dtype
    cache = LatentCache(mla.cfg, 8, 16, mla.layer_idx + 1, dtype=dtype)
    x = torch.randn(20, mla.cfg.hidden_size).to(dtype)
    true, _ = Float64MLA(mla.cfg, weights)(x)
    for request, form in enumerate(("absorbed", "expanded")):
        out = mla(x, cache.step([request], [20]), form)
        assert (out - true).abs().max() < allowed * true.abs().max()


def assert_holds(mla, weights):
    state = mla.state_dict()
    assert sorted(state) == sorted(weights)
    for name, value in state.items():
        assert torch.equal(value, weights[name].to(value.dtype)), name


# Whole checkpoints


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "", "model.language_model."])
def test_bfloat16_is_read_as_it_is(tmp_path, shards, prefix):
    one, two = attention(), attention()
    write(tmp_path, {**OTHERS, **named(one, 0, prefix), **named(two, 11, prefix)}, shards=shards)
    assert checkpoint.layers(tmp_path) == (0, 11)
    for layer, weights in ((0, one), (11, two)):
        mla = MLA.from_pretrained(tmp_path, layer=layer)
        assert mla.layer_idx == layer and mla.cfg == MLAConfig.from_dict(CONFIG)
        assert {parameter.dtype for parameter in mla.parameters()} == {BF16}
        assert not any(parameter.requires_grad for parameter in mla.parameters())
        assert_holds(mla, weights)
        assert_holds(MLA.from_pretrained(str(tmp_path), layer=layer, dtype=F32), weights)
    assert_computes(MLA.from_pretrained(tmp_path, layer=11, dtype=F32), two, 1e-5)


def test_several_files_without_an_index(tmp_path):
    one, two = attention(), attention()
    write(tmp_path, named(one, 0), shards=0)
    save_file(named(two, 1), tmp_path / "more.safetensors")
    assert checkpoint.layers(tmp_path) == (0, 1)
    assert_holds(MLA.from_pretrained(tmp_path, layer=1), two)


@pytest.mark.parametrize(
    "change",
    [
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"rope_interleave": False},
        {"model_type": "minicpm3", "q_lora_rank": None, "attention_bias": True},
    ],
)
def test_kinds_of_attention(tmp_path, change):
    config = {**CONFIG, **change}
    weights = attention(config)
    write(tmp_path, named(weights, 3), config)
    mla = MLA.from_pretrained(tmp_path, layer=3, dtype=F32)
    assert_holds(mla, weights)
    assert_computes(mla, weights, 1e-5)


def test_layer_and_layer_idx(tmp_path):
    write(tmp_path, {**named(attention(), 0), **named(attention(), 5)})
    assert MLA.from_pretrained(tmp_path).layer_idx == 0
    assert MLA.from_pretrained(tmp_path, layer=5).layer_idx == 5
    assert MLA.from_pretrained(tmp_path, layer=5, layer_idx=1).layer_idx == 1
    assert MLA.from_pretrained(tmp_path, layer=5, layer_idx=0).layer_idx == 0


def test_a_multimodal_config(tmp_path):
    weights = attention()
    write(tmp_path, named(weights, 0, "language_model.model."), {"model_type": "kimi_vl", "text_config": CONFIG})
    assert_holds(MLA.from_pretrained(tmp_path), weights)


def test_the_projections_are_joined(tmp_path):
    """What is read must run as one product, as in a fresh module: both weights in one storage."""
    write(tmp_path, named(attention(), 0))
    mla = MLA.from_pretrained(tmp_path)
    first, second = mla.q_a_proj.weight, mla.kv_a_proj_with_mqa.weight
    assert second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()


def test_norms_of_another_dtype_are_cast(tmp_path):
    weights = attention()
    weights["kv_a_layernorm.weight"] = weights["kv_a_layernorm.weight"].float()
    write(tmp_path, named(weights, 0))
    mla = MLA.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in mla.parameters()} == {BF16}
    assert_holds(mla, weights)


def test_an_indexer_is_left_out(tmp_path):
    """DeepSeek-V3.2's sparse selection stands beside the attention, FP8 and with a bias in its norm."""
    stored, meant = quantised(attention())
    extra = {
        "indexer.wq_b.weight": torch.randn(64, 72).to(torch.float8_e4m3fn),
        "indexer.wq_b.weight_scale_inv": torch.ones(1, 1),
        "indexer.weights_proj.weight": torch.randn(2, 160).to(BF16),
        "indexer.k_norm.weight": torch.ones(32),
        "indexer.k_norm.bias": torch.zeros(32),
        "rotary_emb.inv_freq": torch.ones(16),
    }
    write(tmp_path, named({**stored, **extra}, 0), FP8)
    assert_holds(MLA.from_pretrained(tmp_path, dtype=F32), meant)


# FP8


@pytest.mark.parametrize("shards", [0, 2])
def test_fp8_is_multiplied_by_its_scales(tmp_path, shards):
    """576, 160 and 72 are no multiples of 128: the last blocks are partial ones."""
    stored, meant = quantised(attention())
    write(tmp_path, named(stored, 4), FP8, shards)
    mla = MLA.from_pretrained(tmp_path, layer=4, dtype=F32)
    assert_holds(mla, meant)
    assert_computes(mla, meant, 1e-5)


def test_fp8_becomes_bfloat16_rounded_once(tmp_path):
    stored, meant = quantised(attention())
    write(tmp_path, named(stored, 4), FP8)
    mla = MLA.from_pretrained(tmp_path, layer=4)
    assert {parameter.dtype for parameter in mla.parameters()} == {BF16}
    assert_holds(mla, {name: value.to(BF16) for name, value in meant.items()})


@pytest.mark.parametrize(
    "config, block",
    [
        ({**CONFIG, "quantization_config": {"weight_block_size": [64, 32]}}, (64, 32)),
        ({**CONFIG, "quantization_config": {"weight_block_size": None}}, (128, 128)),
        (CONFIG, (128, 128)),
        ({"text_config": {**CONFIG, "quantization_config": {"weight_block_size": [96, 80]}}}, (96, 80)),
        ({"text_config": CONFIG, "quantization_config": {"weight_block_size": [96, 80]}}, (96, 80)),
    ],
)
def test_the_block_size_is_the_configs(tmp_path, config, block):
    stored, meant = quantised(attention(), block)
    write(tmp_path, named(stored, 0), config)
    assert_holds(MLA.from_pretrained(tmp_path, dtype=F32), meant)


def test_fp8_of_a_model_that_rotates_halves(tmp_path):
    config = {**FP8, "rope_interleave": False}
    stored, meant = quantised(attention(config))
    write(tmp_path, named(stored, 0), config)
    mla = MLA.from_pretrained(tmp_path, dtype=F32)
    assert_holds(mla, meant)
    assert_computes(mla, meant, 1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 127), (300, 40)])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_dequantise(shape, dtype):
    stored, meant = quantised({"w": torch.randn(shape)})
    value = checkpoint.dequantise(stored["w"], stored["w_scale_inv"], dtype=dtype)
    assert value.dtype == dtype and torch.equal(value, meant["w"].to(dtype))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 2), (2,)])
def test_scales_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[200, 256\].*\[128, 128\] must be \[2, 2\]"):
        checkpoint.dequantise(torch.zeros(200, 256).to(torch.float8_e4m3fn), torch.ones(shape))


@pytest.mark.parametrize("block", [[128], [128, 0], [128, 128, 1], ["128", 128], 128, [True, True], {}])
def test_a_bad_block_size_is_named(tmp_path, block):
    stored, _ = quantised(attention())
    write(tmp_path, named(stored, 0), {**CONFIG, "quantization_config": {"weight_block_size": block}})
    with pytest.raises(ValueError, match=r"weight_block_size .*two positive ints"):
        MLA.from_pretrained(tmp_path)


def test_a_block_size_is_not_asked_for_without_fp8(tmp_path):
    weights = attention()
    write(tmp_path, named(weights, 0), {**CONFIG, "quantization_config": {"weight_block_size": [64]}})
    assert_holds(MLA.from_pretrained(tmp_path), weights)


# What is missing or wrong


@pytest.mark.parametrize("name", ["g_proj.weight", "sinks", "k_rope_only_layernorm.weight", "q_proj.input_scale"])
@pytest.mark.parametrize("dtype", [None, F32])
def test_a_tensor_that_mla_does_not_have(tmp_path, name, dtype):
    """A gate, sinks, another norm: what an MLA of another kind multiplies with."""
    write(tmp_path, named({**attention(), name: torch.zeros(2)}, 7))
    with pytest.raises(ValueError, match=f"layer 7 of .*does not have.*: {name}$"):
        MLA.from_pretrained(tmp_path, layer=7, dtype=dtype)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
@pytest.mark.parametrize("shards", [0, 2])
def test_a_damaged_file_is_named(tmp_path, shards, damage):
    write(tmp_path, named(attention(), 0), shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = {"cut": file.read_bytes()[:-100], "empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n"}
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match=rf"{file.name}' is not a valid safetensors file"):
        MLA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({"dtype": "bf16"}, TypeError, "dtype must be one of .*got 'bf16'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of .*got torch.int32"),
        ({"device": "nosuch"}, ValueError, "device must be .*got 'nosuch'"),
    ],
)
def test_a_bad_argument_is_named(tmp_path, arguments, kind, message):
    write(tmp_path, named(attention(), 0))
    with pytest.raises(kind, match=message):
        MLA.from_pretrained(tmp_path, **arguments)


def test_a_layer_that_does_not_exist(tmp_path):
    write(tmp_path, {**named(attention(), 0), **named(attention(), 5)})
    for layer in (1, -1, 50):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist in .*; its layers with MLA: 0, 5"):
            MLA.from_pretrained(tmp_path, layer=layer)


@pytest.mark.parametrize("layer", ["0", 0.0, True, None])
def test_a_layer_is_an_int(tmp_path, layer):
    write(tmp_path, named(attention(), 0))
    with pytest.raises(TypeError, match="layer must be an int"):
        MLA.from_pretrained(tmp_path, layer=layer)


def test_no_mla_at_all(tmp_path):
    write(tmp_path, OTHERS)
    assert checkpoint.layers(tmp_path) == ()
    with pytest.raises(ValueError, match="its layers with MLA: none"):
        MLA.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path):
    write(tmp_path, named(attention(), 0), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors.*self_attn"):
        MLA.from_pretrained(tmp_path)


def test_only_the_layers_shards_are_read(tmp_path):
    write(tmp_path, named(attention(), 0), shards=1)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    index["weight_map"].update(dict.fromkeys(named(attention(), 1), "elsewhere.safetensors"))
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    assert MLA.from_pretrained(tmp_path).layer_idx == 0
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        MLA.from_pretrained(tmp_path, layer=1)


@pytest.mark.parametrize("dtype", [None, F32])
@pytest.mark.parametrize("name", ["kv_b_proj.weight", "q_a_layernorm.weight", "o_proj.weight"])
def test_a_missing_tensor(tmp_path, name, dtype):
    weights = attention()
    del weights[name]
    write(tmp_path, named(weights, 7))
    with pytest.raises(KeyError, match=f"layer 7 of .*self_attn.{name}"):
        MLA.from_pretrained(tmp_path, layer=7, dtype=dtype)


def test_a_missing_bias(tmp_path):
    write(tmp_path, named(attention(), 0), {**CONFIG, "attention_bias": True})
    with pytest.raises(KeyError, match=r"q_a_proj\.bias"):
        MLA.from_pretrained(tmp_path)


def test_a_bias_that_the_config_does_not_know(tmp_path):
    write(tmp_path, named(attention({**CONFIG, "attention_bias": True}), 0))
    with pytest.raises(ValueError, match=r"o_proj\.bias.*attention_bias"):
        MLA.from_pretrained(tmp_path)


def test_a_missing_scale(tmp_path):
    stored, _ = quantised(attention())
    del stored["kv_b_proj.weight_scale_inv"]
    write(tmp_path, named(stored, 0), FP8)
    with pytest.raises(KeyError, match=r"kv_b_proj\.weight is FP8.*kv_b_proj\.weight_scale_inv"):
        MLA.from_pretrained(tmp_path)


def test_a_tensor_that_its_shard_lacks(tmp_path):
    write(tmp_path, named(attention(), 0), shards=1)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.more.weight"] = "model-00001-of-00001.safetensors"
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(KeyError, match=r"model-00001-of-00001\.safetensors holds .*more\.weight"):
        MLA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"hidden_size": 128}, "q_a_proj.weight"),
        ({"num_attention_heads": 3}, "q_b_proj.weight"),
        ({"v_head_dim": 32}, "kv_b_proj.weight"),
        ({"kv_lora_rank": 128}, "kv_a_proj_with_mqa.weight"),
    ],
)
@pytest.mark.parametrize("interleave", [True, False])
def test_a_tensor_of_another_shape(tmp_path, change, name, interleave):
    write(tmp_path, named(attention(), 6), {**CONFIG, **change, "rope_interleave": interleave})
    with pytest.raises(ValueError, match=rf"self_attn.{name} of layer 6 must be \[.*by config.json, got \["):
        MLA.from_pretrained(tmp_path, layer=6)


def test_no_weights_at_all(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for call in (MLA.from_pretrained, checkpoint.layers):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json.*\*\.safetensors"):
            call(tmp_path)


def test_no_directory(tmp_path):
    for call in (MLA.from_pretrained, checkpoint.layers):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            call(tmp_path / "nowhere")


def test_a_file_is_no_directory(tmp_path):
    write(tmp_path, named(attention(), 0))
    with pytest.raises(FileNotFoundError, match="not a directory"):
        MLA.from_pretrained(tmp_path / "config.json")


def test_no_config_json(tmp_path):
    write(tmp_path, named(attention(), 0))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        MLA.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{", '"x"'])
def test_a_broken_index(tmp_path, content):
    write(tmp_path, named(attention(), 0))
    (tmp_path / checkpoint.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        MLA.from_pretrained(tmp_path)


def test_a_transformers_model_saved_and_read(tmp_path):
    """A whole model as transformers writes it, and its attention's own output."""
    pytest.importorskip("transformers", minversion="5.15")
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{key: value for key, value in CONFIG.items() if key not in ("model_type", "rope_scaling")},
        vocab_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        intermediate_size=16,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    )
    model = DeepseekV3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert checkpoint.layers(tmp_path) == (0, 1)
    mla = MLA.from_pretrained(tmp_path, layer=1, layer_idx=0)
    theirs = model.model.layers[1].self_attn
    assert_holds(mla, theirs.state_dict())
    x = torch.randn(9, 160)
    rotation = model.model.rotary_emb(x[None], torch.arange(9)[None])
    with torch.no_grad():
        expected = theirs(x[None], position_embeddings=rotation, attention_mask=None)[0][0]
    out = mla(x, LatentCache(mla.cfg, 2, dtype=F32).step([0], [9]))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
