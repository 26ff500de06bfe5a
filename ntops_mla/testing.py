"""What results are measured with: FlashMLA's error measures and a float64 MLA in its plain multi-head form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ntops_mla.config import MLAConfig
from ntops_mla.rope_table import attention_factor, inverse_frequencies


class Tolerance(NamedTuple):
    """An element passes if |d| < abs or |d| / (|ref| + 1e-6) < rel; the whole if cos_diff < cos.

    both: |d| < abs + rel |ref| instead, for what computes in float32 and rounds once: there the rounding of the value
    and the noise of the computation add up. Source: deepseek-ai/FlashMLA tests (kernelkit), but for both.
    """

    abs: float
    rel: float
    cos: float | None = None
    both: bool = False


# For bfloat16 and float16 inputs, as FlashMLA's own tests have them.
DECODE_OUT = Tolerance(8e-4, 2.01 / 128, 5e-6)
DECODE_LSE = Tolerance(1e-6, 8.01 / 65536)
# Sparse decode, and whatever reads an fp8 cache, against the dequantised one; its lse as in dense decode
FP8_OUT = SPARSE_OUT = Tolerance(1e-3, 2.01 / 128, 5e-6)
SPARSE_PREFILL_OUT = Tolerance(8e-4, 3.01 / 128, 7e-6)
SPARSE_PREFILL_LSE = Tolerance(1e-6, 2.01 / 65536)
PREFILL_OUT = Tolerance(1e-3, 8.01 / 128, 7e-6)
PREFILL_LSE = Tolerance(1e-6, 2.01 / 65536)


def cos_diff(value: torch.Tensor, reference: torch.Tensor) -> float:
    """1 - 2 sum(x y) / sum(x^2 + y^2) in float64 on the CPU; 0 where both are zero."""
    x, y = value.detach().cpu().double(), reference.detach().cpu().double()
    norm = (x * x + y * y).sum().item()
    return 0.0 if norm == 0 else 1 - 2 * (x * y).sum().item() / norm


def assert_close(value: torch.Tensor, reference: torch.Tensor, tolerance: Tolerance, name: str = "value") -> None:
    """Raise AssertionError with the worst element unless `value` is within `tolerance` of `reference`.

    Infinities must be the same ones in both; NaN fails wherever it is.
    """
    x, y = value.detach().cpu().double(), reference.detach().cpu().double()
    assert x.shape == y.shape, f"{name}: shape {list(x.shape)}, expected {list(y.shape)}"
    assert not x.isnan().any(), f"{name}: {int(x.isnan().sum())} of {x.numel()} elements are NaN"
    infinite = x.isinf() | y.isinf()
    assert torch.equal(x[infinite], y[infinite]), f"{name}: infinities differ"
    x, y = x[~infinite], y[~infinite]
    error = (x - y).abs()
    if tolerance.both:
        bad = ~(error < tolerance.abs + tolerance.rel * y.abs())
    else:
        bad = ~((error < tolerance.abs) | (error / (y.abs() + 1e-6) < tolerance.rel))
    if bad.any():
        worst = int(torch.where(bad, error, -1.0).argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {x.numel()} elements differ, at worst {x[worst]:.6g} for {y[worst]:.6g} "
            f"(allowed: abs {tolerance.abs:.3g} {'and' if tolerance.both else 'or'} rel {tolerance.rel:.3g})"
        )
    if tolerance.cos is not None:
        difference = cos_diff(x, y)
        assert difference < tolerance.cos, f"{name}: cos_diff {difference:.3g}, allowed {tolerance.cos:.3g}"


class History(NamedTuple):
    """A request's rows: latent `[p, kv_lora_rank]` after the norm, pe `[p, qk_rope_head_dim]` after RoPE, in pairs."""

    latent: torch.Tensor
    pe: torch.Tensor


class Float64MLA:
    """MLA in its plain multi-head form, float64 on the CPU, a request at a time: what all else is compared with.

    weights: as `MLA.state_dict()` or a checkpoint has them (in `cfg.rope_interleave`'s order); converted one at a time,
    when they are used. RoPE's angles are float32 products, as the models were trained.
    """

    def __init__(self, cfg: MLAConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self._cfg = cfg
        self._weights = weights

    def __call__(
        self, hidden_states: torch.Tensor, history: History | None = None, cached: History | None = None
    ) -> tuple[torch.Tensor, History]:
        """hidden_states `[n, hidden_size]` after `history` -> (out `[n, hidden_size]`, the longer history), float64.

        cached: in place of `history`, the longer history as a cache holds it, the new tokens' own rows too: what a
        quantised cache is compared with.
        """
        cfg = self._cfg
        x = hidden_states.detach().cpu().double()
        past = len(cached.latent) - len(x) if cached is not None else 0 if history is None else len(history.latent)
        if cfg.q_lora_rank is None:
            q = self._linear(x, "q_proj")
        else:
            q = self._linear(self._norm(self._linear(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
        q = q.view(len(x), cfg.num_heads, cfg.qk_head_dim)
        positions = torch.arange(past, past + len(x))
        q_nope, q_pe = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        latent, pe = self._linear(x, "kv_a_proj_with_mqa").split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        latent, pe = self._norm(latent, "kv_a_layernorm"), self._rotate(pe, positions)
        q_pe = self._rotate(q_pe.transpose(0, 1), positions).transpose(0, 1)
        if cached is not None:
            latent, pe = (rows.detach().cpu().double() for rows in cached)
        elif history is not None:
            latent = torch.cat([history.latent.detach().cpu().double(), latent])
            pe = torch.cat([history.pe.detach().cpu().double(), pe])
        w_k, w_v = (
            self._weight("kv_b_proj.weight")
            .view(cfg.num_heads, cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.kv_lora_rank)
            .split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)
        )
        out = torch.empty(len(x), cfg.num_heads, cfg.v_head_dim, dtype=torch.float64)
        hidden = torch.ones(len(x), len(latent), dtype=torch.bool).triu_(past + 1)
        for head in range(
            cfg.num_heads
        ):  # one head at a time: the scores of all at once would not fit for long histories
            scores = q_nope[:, head] @ (latent @ w_k[head].T).T + q_pe[:, head] @ pe.T
            scores = (scores * cfg.softmax_scale).masked_fill_(hidden, float("-inf"))
            out[:, head] = scores.softmax(-1) @ (latent @ w_v[head].T)
        return self._linear(out.flatten(1), "o_proj"), History(latent, pe)

    def _weight(self, name: str) -> torch.Tensor:
        return self._weights[name].detach().cpu().double()

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ self._weight(f"{name}.weight").T
        return y + self._weight(f"{name}.bias") if f"{name}.bias" in self._weights else y

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self._cfg.rms_norm_eps).rsqrt() * self._weight(f"{name}.weight")

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[..., n, R]` in the checkpoint's order -> rotated, in pairs."""
        cfg = self._cfg
        half = cfg.qk_rope_head_dim // 2
        inverse = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
        angle = (positions.float()[:, None] * inverse).double()
        cos, sin = angle.cos() * attention_factor(cfg.rope_scaling), angle.sin() * attention_factor(cfg.rope_scaling)
        a, b = (x[..., 0::2], x[..., 1::2]) if cfg.rope_interleave else (x[..., :half], x[..., half:])
        out = torch.empty_like(x)
        out[..., 0::2], out[..., 1::2] = a * cos - b * sin, a * sin + b * cos
        return out
