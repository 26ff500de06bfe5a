"""MLAConfig: the numbers that define one model's Multi-head Latent Attention."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ntops_mla import rope_table

# Keys of attention variants that multiply q or kv by factors of their own. Reading such a model as plain MLA would give
# wrong results without a sound, so they are refused by name.
_VARIANT_KEYS = ("mla_scale_q_lora", "mla_scale_kv_lora")

# Model types whose attention has MLA's numbers in config.json and computes something else: where a name begins with
# one of these, the reason (transformers: models/<model type>/modeling_<model type>.py).
_VARIANT_MODEL_TYPES = {
    "axk2": "it gates the attention's output",
    "bailing_hybrid": "it gates the attention's output",
    "dots3_note": "it multiplies q and kv by factors, normalises the rope columns and gates the output",
    "glm5_next": "its attention has no rotary embedding",
    "hy_v4": "it has attention sinks and gates the attention's output",
    "kimi_linear": "its attention has no rotary embedding",
    "longcat_flash": "it multiplies q and kv by factors (mla_scale_q_lora, mla_scale_kv_lora)",
    "mistral_large4": "it scales queries by position, and some layers have no rotary embedding",
}

# Model types whose code rotates halves although their config.json has no `rope_interleave` key
# (transformers: models/minicpm3/modeling_minicpm3.py, apply_rotary_pos_emb).
_HALVES_MODEL_TYPES = frozenset({"minicpm3"})

_REQUIRED = ("hidden_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_YARN_R1 = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class MLAConfig:
    """One model's MLA, by the names of its config.json.

    Sizes are in elements: the cache holds `kv_lora_rank + qk_rope_head_dim` per token, a query or key head is
    `qk_nope_head_dim + qk_rope_head_dim` wide, a value head `v_head_dim`. `q_lora_rank` None or 0 means one `q_proj`.
    `rope_scaling` is None or the YaRN dict. `rope_interleave` says in which order the *checkpoint* keeps RoPE's
    columns: True, pairs (0, 1), (2, 3), ...; False, halves (the rows are permuted to pairs at load). `rms_norm_eps` is
    that of q_a_layernorm and kv_a_layernorm, 1e-6 in every known model; config.json's `rms_norm_eps` is the block's and
    is not read. Raises ValueError or TypeError that names the field.

    Source: arXiv 2405.04434, section 2.1; transformers models/deepseek_v3.
    """

    hidden_size: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        for name in (*sizes, "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.q_lora_rank is not None and (
            isinstance(self.q_lora_rank, bool) or not isinstance(self.q_lora_rank, int)
        ):
            raise TypeError(f"q_lora_rank must be an int or None, got {self.q_lora_rank!r}")
        if self.q_lora_rank is not None and self.q_lora_rank < 0:
            raise ValueError(f"q_lora_rank must be None, 0 or positive, got {self.q_lora_rank}")
        if self.q_lora_rank == 0:
            object.__setattr__(self, "q_lora_rank", None)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}")
        for name in ("rope_interleave", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}")
        scaling = rope_table.normalise_scaling(self.rope_scaling, self.max_position_embeddings)
        if scaling is not None and self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta must be above 1 with rope_scaling of type 'yarn', which divides by its logarithm, "
                f"got {self.rope_theta}"
            )
        object.__setattr__(self, "rope_scaling", scaling)

    def __hash__(self) -> int:
        scaling = None if self.rope_scaling is None else tuple(sorted(self.rope_scaling.items()))
        rest = tuple(getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_scaling")
        return hash((rest, scaling))

    @property
    def qk_head_dim(self) -> int:
        """Width of one expanded query or key head: qk_nope_head_dim + qk_rope_head_dim."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Cached elements per token: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim ** -0.5, times YaRN's mscale squared where `mscale_all_dim` is set (0.1352... for R1)."""
        return self.qk_head_dim**-0.5 * rope_table.softmax_mscale(self.rope_scaling) ** 2

    @classmethod
    def deepseek_r1(cls) -> MLAConfig:
        """DeepSeek-V3 and R1: 128 heads, q LoRA 1536, YaRN factor 40 with mscale 1."""
        return cls(
            hidden_size=7168,
            num_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_theta=10000.0,
            rope_scaling=_YARN_R1,
            max_position_embeddings=163840,
        )

    @classmethod
    def deepseek_v2_lite(cls) -> MLAConfig:
        """DeepSeek-V2-Lite: 16 heads, no q LoRA, YaRN factor 40 with mscale 0.707."""
        return cls(
            hidden_size=2048,
            num_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_theta=10000.0,
            rope_scaling={**_YARN_R1, "mscale": 0.707, "mscale_all_dim": 0.707},
            max_position_embeddings=163840,
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> MLAConfig:
        """Read the config.json of a Hugging Face directory (or that file itself).

        Raises FileNotFoundError without a config.json, ValueError where it does not describe an MLA this library
        computes (the key is named).
        """
        return cls.from_dict(read_config_json(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MLAConfig:
        """Build from the content of a config.json, in the old (`rope_scaling` + `rope_theta`) or new
        (`rope_parameters`) spelling of RoPE; a multimodal model's `text_config` is entered."""
        outer, config = config, text_config(config)
        for kind in (str(outer.get("model_type")), str(config.get("model_type"))):
            for name, reason in _VARIANT_MODEL_TYPES.items():
                if kind.startswith(name):
                    raise ValueError(f"config.json of model_type {kind!r} is an MLA variant, not supported: {reason}")
        missing = [key for key in _REQUIRED if config.get(key) is None]
        heads = config.get("num_attention_heads")
        if heads is None:
            missing.append("num_attention_heads")
        if missing:
            raise ValueError(
                f"config.json of model_type {config.get('model_type')!r} is not an MLA model: it lacks "
                + ", ".join(missing)
            )
        for key in _VARIANT_KEYS:
            if config.get(key):
                raise ValueError(f"config.json sets {key}, an MLA variant that is not supported")
        if config.get("mla_use_nope"):
            raise ValueError("config.json sets mla_use_nope, MLA without rotary embedding, which is not supported")
        if config.get("index_topk"):
            warnings.warn(
                f"this model selects keys sparsely (index_topk {config['index_topk']}); MLA attends densely, which is "
                "the same only for contexts up to that length",
                stacklevel=3,
            )
        theta, scaling = rope_table.from_hf(config)
        interleave = config.get("rope_interleave")
        if interleave is None:
            interleave = config.get("model_type") not in _HALVES_MODEL_TYPES
        return cls(
            **{key: config[key] for key in _REQUIRED},
            num_heads=heads,
            q_lora_rank=config.get("q_lora_rank") or None,
            rope_theta=theta,
            rope_scaling=scaling,
            rope_interleave=bool(interleave),
            attention_bias=bool(config.get("attention_bias", False)),
            max_position_embeddings=config.get("max_position_embeddings") or 4096,
        )


def read_config_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of `path/config.json`, or of `path` where that is a file."""
    file = os.fspath(path)
    if not os.path.exists(file):
        raise FileNotFoundError(f"model path {file!r} does not exist")
    if os.path.isdir(file):
        file = os.path.join(file, "config.json")
        if not os.path.exists(file):
            raise FileNotFoundError(f"no config.json in {os.fspath(path)!r}: not a Hugging Face model directory")
    with open(file, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file!r} is not valid JSON, as a config.json is: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file!r} holds a {type(content).__name__}, expected a JSON object")
    return content


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: `text_config` where the top level has no MLA numbers."""
    inner = config.get("text_config")
    if config.get("kv_lora_rank") is None and isinstance(inner, Mapping):
        return inner
    return config
