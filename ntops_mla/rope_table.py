"""RoPE's frequencies, with YaRN, and the table of cos and sin that a step gathers its rows from.

Formula (arXiv 2309.00071, section 3.4; deepseek-ai/DeepSeek-V3 inference/model.py precompute_freqs_cis):
inv_freq_i = theta^(-2i/d), and with YaRN a blend of inv_freq_i and inv_freq_i / factor by a linear ramp over i between
the dimensions that turn beta_fast and beta_slow times within the original context. cos and sin carry YaRN's attention
factor mscale(factor, mscale) / mscale(factor, mscale_all_dim); the softmax scale carries mscale(factor,
mscale_all_dim)^2. Everything is float32, as the models were trained and as transformers computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

_YARN_KEYS = {
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}
# Keys that may stand beside the scaling's own and say nothing about it.
_IGNORED_KEYS = {"type", "rope_theta", "partial_rotary_factor", "max_position_embeddings", "finetuned"}


def from_hf(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, scaling dict or None) out of a config.json, old and new spelling."""
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a dict or null, got {value!r}")
    # As transformers reads them: a rope_scaling that is not empty comes first, its rope_theta before the outer one.
    scaling = scaling or parameters
    theta = (scaling or {}).get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta")
    return 10000.0 if theta is None else theta, None if scaling is None else dict(scaling)


def normalise_scaling(scaling: Mapping[str, Any] | None, max_position_embeddings: int) -> dict[str, Any] | None:
    """None, or YaRN's dict with every default filled in; another scaling raises ValueError that names it."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise TypeError(f"rope_scaling must be None or a dict, got {scaling!r}")
    nested = [key for key, value in scaling.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"rope_scaling with one entry per layer type is not supported: {', '.join(map(str, nested))}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("llama_4_scaling_beta"):
        raise ValueError("rope_scaling sets llama_4_scaling_beta, which scales queries by position: not supported")
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; supported are None, 'default' and 'yarn'")
    unknown = {key for key, value in scaling.items() if value is not None} - _YARN_KEYS - _IGNORED_KEYS
    if unknown:
        raise ValueError(
            f"rope_scaling has keys that YaRN does not know: {', '.join(sorted(unknown))}; "
            f"known are {', '.join(sorted(_YARN_KEYS))}"
        )
    original = scaling.get("original_max_position_embeddings")
    if original is None:
        raise ValueError("rope_scaling of type 'yarn' needs original_max_position_embeddings")
    _check_number("original_max_position_embeddings", original)
    factor = scaling.get("factor")
    if factor is None:
        factor = max_position_embeddings / original
    filled = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": scaling.get("beta_fast") or 32.0,
        "beta_slow": scaling.get("beta_slow") or 1.0,
        "mscale": scaling.get("mscale"),
        "mscale_all_dim": scaling.get("mscale_all_dim"),
        "attention_factor": scaling.get("attention_factor"),
        "truncate": bool(scaling.get("truncate", True)),
    }
    for key in ("factor", "beta_fast", "beta_slow"):
        _check_number(key, filled[key])
    for key in ("mscale", "mscale_all_dim", "attention_factor"):
        if filled[key] is not None and filled[key] != 0:
            _check_number(key, filled[key])
    return filled


def _check_number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"rope_scaling[{key!r}] must be a finite positive number, got {value!r}")


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_mscale(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies the softmax scale's square root with; 1 without `mscale_all_dim`."""
    if scaling is None or not scaling["mscale_all_dim"]:
        return 1.0
    return _mscale(scaling["factor"], scaling["mscale_all_dim"])


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies cos and sin with."""
    if scaling is None:
        return 1.0
    if scaling["attention_factor"] is not None:
        return float(scaling["attention_factor"])
    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return _mscale(scaling["factor"], scaling["mscale"]) / _mscale(scaling["factor"], scaling["mscale_all_dim"])
    return _mscale(scaling["factor"])


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> torch.Tensor:
    """float32 `[dim / 2]`: radians per position of each rotated pair."""
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    inverse = 1.0 / powers
    if scaling is None:
        return inverse

    def turning(rotations: float) -> float:
        # The (fractional) pair index that turns `rotations` times within the original context.
        original = scaling["original_max_position_embeddings"]
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(scaling["beta_fast"]), turning(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no length would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    extrapolate = 1 - ramp
    return 1.0 / (scaling["factor"] * powers) * (1 - extrapolate) + inverse * extrapolate


class RopeTable:
    """cos and sin of every position so far asked for, float32 `[positions, dim]`: dim / 2 columns of each.

    Computed on the CPU (the same bits on every device) and grown by doubling, so that a step gathers its rows with one
    `index_select`.
    """

    def __init__(
        self, dim: int, theta: float, scaling: Mapping[str, Any] | None, limit: int, device: torch.device
    ) -> None:
        self._inverse = inverse_frequencies(dim, theta, scaling)
        self._factor = attention_factor(scaling)
        self._limit = limit
        self._device = device
        self._table = torch.empty(0, dim, dtype=torch.float32, device=device)

    def rows(self, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each float32 `[T, dim / 2]`, of `positions` int64 `[T]`, all below `length`."""
        if length > self._table.shape[0]:
            self._grow(length)
        gathered = self._table.index_select(0, positions)
        half = gathered.shape[1] // 2
        return gathered[:, :half], gathered[:, half:]

    def _grow(self, length: int) -> None:
        size = max(1024, 2 * self._table.shape[0])
        while size < length:
            size *= 2
        size = max(min(size, self._limit), length)
        angles = torch.outer(torch.arange(size, dtype=torch.float32, device="cpu"), self._inverse)
        table = torch.cat([angles.cos() * self._factor, angles.sin() * self._factor], dim=1)
        self._table = table.to(self._device)
