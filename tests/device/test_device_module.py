"""The whole module on the device: prefill and decode steps of several requests against float64 on the CPU."""

import pytest
import torch

import ntops_mla
from ntops_mla import MLA, LatentCache, MLAConfig, dispatch
from ntops_mla.testing import cos_diff
from tests.device.on_device import DTYPES, pick, scaled
from tests.interpreted.numerics import exactly
from tests.test_fp8_cache import over_what_is_held
from tests.test_ops import name_of

pytestmark = pytest.mark.device

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SIZES = {"hidden_size": pick(1024, 64), "num_heads": pick(16, 2), "kv_lora_rank": 512, "qk_rope_head_dim": 64}
MODELS = {
    "r1": dict(q_lora_rank=pick(768, 96), qk_nope_head_dim=128, v_head_dim=128, rope_theta=1e4, rope_scaling=YARN),
    "v2 lite": dict(q_lora_rank=None, qk_nope_head_dim=128, v_head_dim=128, rope_theta=1e4, attention_bias=True),
    "glm": dict(q_lora_rank=pick(768, 96), qk_nope_head_dim=192, v_head_dim=256, rope_theta=1e6),
}
FORMS = (None, "absorbed", "expanded")
# request -> new tokens, a step each: prompts, a decode step, one request more among decodes and a chunk, decodes
PROMPT, SHORT, CHUNK = scaled(300, 24, 140)
STEPS = [{0: PROMPT, 1: SHORT, 2: 1}, {2: 1, 0: 1, 1: 1}, {1: 1, 3: CHUNK, 0: 2}, {0: 1, 1: 1, 2: 1, 3: 1}]


def layer(model, device, dtype):
    """Weights that keep every intermediate near unit variance, so that the softmax has something to do."""
    cfg = MLAConfig(**SIZES, **MODELS[model], max_position_embeddings=163840)
    mla = MLA(cfg, device=device, dtype=dtype).requires_grad_(False)
    for name, parameter in mla.named_parameters():
        if "layernorm" in name:
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
    return mla


def serve(mla, inputs, form):
    """Every request's outputs of all steps, on the CPU, and what ran."""
    weight = mla.o_proj.weight
    cache = LatentCache(mla.cfg, num_pages=pick(60, 12), page_size=16, device=weight.device, dtype=weight.dtype)
    outputs = {}
    with dispatch.record() as ran:
        for step, xs in zip(STEPS, inputs):
            out = mla(torch.cat(xs), cache.step(list(step), list(step.values())), form)
            for request, part in zip(step, out.split(list(step.values()))):
                outputs.setdefault(request, []).append(part.cpu())
    return [torch.cat(outputs[request]) for request in sorted(outputs)], ran


def error(value, true):
    """Largest difference in units of the largest true value."""
    return ((value.double() - true).abs().max() / true.abs().max()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_steps_of_several_requests(device, model, dtype, form):
    """In two-byte types at most twice the error that the same formula has in PyTorch, on the same device."""
    mla = layer(model, device, dtype)
    hidden = mla.cfg.hidden_size
    inputs = [[torch.randn(n, hidden).to(device, dtype) for n in step.values()] for step in STEPS]
    ours, ran = serve(mla, inputs, form)
    gates = ntops_mla.platform.detect(device).platform
    for name, choice in ran.items():
        gate = gates.gate(name, dtype, ntops_mla.interpreter.enabled())
        assert choice.backend == ("reference" if gate.mode == "reference" else "kernel"), choice
    attention = {None: {"mla_prefill", "mla_decode"}, "absorbed": {"mla_decode"}, "expanded": {"mla_prefill"}}[form]
    norm = set() if mla.cfg.q_lora_rank is None else {"rms_norm"}  # of the query; the latent's is latent_append's
    assert set(ran) - {"mla_schedule"} == {"latent_append"} | norm | attention
    true = exactly(mla, STEPS, inputs)
    if dtype == torch.float32:
        for out, expected in zip(ours, true, strict=True):
            assert not out.isnan().any() and error(out, expected) < 2e-5
        return
    with ntops_mla.use("reference"):
        theirs, ran = serve(mla, inputs, form)
    assert {choice.backend for choice in ran.values()} == {"reference"}
    ours, theirs, true = (torch.cat(outs) for outs in (ours, theirs, true))
    assert ours.dtype == dtype and not ours.isnan().any()
    assert error(ours, true) <= 2 * error(theirs, true)
    assert cos_diff(ours, true) <= max(2 * cos_diff(theirs, true), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_over_an_fp8_cache(device, dtype, form):
    """A history that was filled, prompts and decodes: float64 over what the cache holds after each step."""
    mla = layer("r1", device, dtype)
    cache = LatentCache(mla.cfg, pick(60, 12), 16, device=device, dtype=dtype, kv_format="fp8")
    past = torch.randn(CHUNK, 576).to(device, dtype)
    with dispatch.record() as ran:
        cache.fill(0, *past.split([512, 64], -1))
        for requests, lengths in (([0, 1], [2, SHORT]), ([1, 0], [1, 1]), ([2, 0], [CHUNK, 1])):
            x = torch.randn(sum(lengths), mla.cfg.hidden_size).to(device, dtype)
            outs = mla(x, cache.step(requests, lengths), form).split(lengths)
            true = over_what_is_held(mla, cache, requests, x.split(lengths))
            for out, expected in zip(outs, true):
                out = out.cpu()
                assert not out.isnan().any() and error(out, expected) < (2e-5 if dtype == torch.float32 else 0.05)
                assert cos_diff(out, expected) < 1e-4
    platform = ntops_mla.platform.detect(device).platform
    for name, choice in ran.items():
        gate = platform.gate(name, dtype, ntops_mla.interpreter.enabled())
        assert choice.backend == ("reference" if gate.mode == "reference" else "kernel"), choice
    assert {"latent_quantize", "latent_append_fp8"} <= set(ran) and "rope" not in ran
