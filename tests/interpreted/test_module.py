"""The whole module through the kernels: prefill and decode steps of several requests against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ntops_mla
from ntops_mla import dispatch, interpreter
from ntops_mla.testing import cos_diff
from tests.interpreted.numerics import DTYPES, exactly
from tests.test_fp8_cache import fp8_for, over_what_is_held
from tests.test_mla import FORMS, assert_same, cache_for, error, history, layer, run, tokens
from tests.test_ops import name_of

ROOT = Path(__file__).resolve().parent.parent.parent
# request -> new tokens, a step each: prompts, a decode step, one request more among decodes and a chunk, decodes
STEPS = [{0: 19, 1: 3, 2: 1}, {2: 1, 0: 1, 1: 1}, {1: 1, 3: 17, 0: 2}, {0: 1, 1: 1, 2: 1, 3: 1}]


def serve(mla, inputs, form):
    """Every request's outputs of all steps, and what ran."""
    cache = cache_for(mla, num_pages=12)
    outputs = {}
    with dispatch.record() as ran:
        for step, xs in zip(STEPS, inputs):
            for request, out in zip(step, run(mla, cache, list(step), xs, form)):
                outputs.setdefault(request, []).append(out)
    return [torch.cat(outputs[request]) for request in sorted(outputs)], ran


@pytest.mark.parametrize("model, form", [*[("r1", form) for form in FORMS], ("glm", None)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_steps_of_several_requests(model, dtype, form):
    """In two-byte types at most twice the error that the same formula has in PyTorch."""
    mla = layer(model, dtype, num_attention_heads=2, num_key_value_heads=2, hidden_size=64)
    inputs = [[tokens(mla, length) for length in step.values()] for step in STEPS]
    ours, ran = serve(mla, inputs, form)
    true = exactly(mla, STEPS, inputs)
    assert {choice.backend for choice in ran.values()} == {"kernel"}
    attention = {None: {"mla_prefill", "mla_decode"}, "absorbed": {"mla_decode"}, "expanded": {"mla_prefill"}}[form]
    assert set(ran) == {"rms_norm", "latent_append"} | attention
    if dtype == torch.float32:
        assert_same(ours, true, 2e-5)
        return
    with ntops_mla.use("reference"):
        theirs, ran = serve(mla, inputs, form)
    assert {choice.backend for choice in ran.values()} == {"reference"}
    ours, theirs, true = (torch.cat(outs) for outs in (ours, theirs, true))
    assert ours.dtype == dtype and not ours.isnan().any()
    assert error(ours, true) <= 2 * error(theirs, true)
    assert cos_diff(ours, true) <= max(2 * cos_diff(theirs, true), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_smaller_latents_are_absorbed(dtype):
    """256 + 32: no kernel takes their expanded heads, so PyTorch would; absorbed needs none."""
    mla = layer("minicpm3", dtype, num_attention_heads=2, num_key_value_heads=2, hidden_size=64)
    inputs = [[tokens(mla, length) for length in step.values()] for step in STEPS]
    ours, ran = serve(mla, inputs, "absorbed")
    assert {choice.backend for choice in ran.values()} == {"kernel"}
    true = exactly(mla, STEPS, inputs)
    if dtype == torch.float32:
        assert_same(ours, true, 2e-5)
    else:
        assert cos_diff(torch.cat(ours), torch.cat(true)) < 1e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_over_an_fp8_cache(dtype, form):
    """A history that was filled, a chunk behind it, a prompt and decodes: float64 over what the cache holds."""
    mla = layer("r1", dtype, num_attention_heads=2, num_key_value_heads=2, hidden_size=64)
    with dispatch.record() as ran:
        cache = fp8_for(mla, 8)
        cache.fill(0, *history(mla, 19))
        for requests, lengths in (([0, 1], [2, 5]), ([1, 0], [1, 1])):
            xs = [tokens(mla, length) for length in lengths]
            outs = run(mla, cache, requests, xs, form)
            assert_same(outs, over_what_is_held(mla, cache, requests, xs), 2e-5 if dtype == torch.float32 else 0.05)
    assert {choice.backend for choice in ran.values()} == {"kernel"}
    own = {"rms_norm", "latent_append_fp8", "latent_quantize", "latent_dequantize"}
    assert own - {"latent_dequantize"} <= set(ran) <= own | {"mla_decode_fp8", "mla_prefill"}


def test_attention_test_runs_the_kernels():
    """As a user runs it who has set the variable; it compares with float64 by itself."""
    command = [sys.executable, str(ROOT / "scripts" / "attention_test.py"), "--cpu", "--backend", "kernel", "--tiny"]
    done = subprocess.run(
        [*command, "--runs", "1", "--warmups", "0"],
        env={**os.environ, interpreter.VARIABLE: "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all rows match float64" in done.stdout
