"""transformers: DeepseekV3Attention with sdpa, request by request, a DynamicCache each."""

from __future__ import annotations

import importlib.metadata
import re

import torch

from ntops_mla import MLA

OLDEST = (5, 15)  # caches the latents; earlier releases cache expanded keys and values


def unavailable() -> str | None:
    """Why this row cannot run here, or None."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "transformers is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return f"transformers {version} is older than {'.'.join(map(str, OLDEST))}"
    try:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention  # noqa: F401
    except Exception as error:  # whatever a package that does not fit this torch, or this numpy, may raise
        said = (str(error).strip().splitlines() or ["no message"])[0]
        return f"transformers {version} does not import: {type(error).__name__}: {said}"
    return None


class Transformers:
    """The model library's own attention, sharing the weights."""

    name = "transformers"

    def __init__(self, mla: MLA) -> None:
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        cfg = mla.cfg
        scaling = {"rope_type": "default"} if cfg.rope_scaling is None else dict(cfg.rope_scaling)
        config = DeepseekV3Config(
            hidden_size=cfg.hidden_size,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_heads,
            q_lora_rank=cfg.q_lora_rank,
            kv_lora_rank=cfg.kv_lora_rank,
            qk_nope_head_dim=cfg.qk_nope_head_dim,
            qk_rope_head_dim=cfg.qk_rope_head_dim,
            v_head_dim=cfg.v_head_dim,
            max_position_embeddings=cfg.max_position_embeddings,
            attention_bias=cfg.attention_bias,
            rope_parameters={**scaling, "rope_theta": cfg.rope_theta},
            rope_interleave=True,  # MLA's parameters are in pairs, whatever the checkpoint's order was
            num_hidden_layers=1,
        )
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            attention = modeling.DeepseekV3Attention(config, layer_idx=0)
        for name, parameter in mla.named_parameters():
            child, _, key = name.partition(".")
            # Over the same storage, but with requires_grad as a loaded model has it: without it, and of an inference
            # tensor, PyTorch's linear of four dimensions copies the whole weight, and this row would be up to ten times
            # slower.
            if parameter.is_inference():
                raise ValueError(
                    f"mla: {name} was made in inference mode, which would slow transformers' products down"
                )
            setattr(getattr(attention, child), key, torch.nn.Parameter(parameter.detach()))
        self._attention = attention.eval()
        self._config = config
        self._rotary = modeling.DeepseekV3RotaryEmbedding(config).to(mla.o_proj.weight.device)

    def start(self, histories, room: int) -> None:
        from transformers import DynamicCache

        self._pasts = [len(latent) for latent, _ in histories]
        self._lengths = list(self._pasts)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._caches = []
        for latent, pe in histories:
            cache = DynamicCache(config=self._config)
            if len(latent):
                # transformers keeps the de-interleaved order: first members of all pairs, then the second ones
                halves = torch.cat([pe[:, 0::2], pe[:, 1::2]], -1)
                cache.update(latent[None, None], halves[None, None], 0)
            self._caches.append(cache)

    def rewind(self) -> None:
        for request, (length, past) in enumerate(zip(self._lengths, self._pasts)):
            if length > past:
                if past:
                    self._caches[request].crop(-(length - past))
                else:
                    self._caches[request] = type(self._caches[request])(config=self._config)
        self._lengths = list(self._pasts)

    def run(self, hidden_states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        outs, first = [], 0
        for request, new in enumerate(lengths):
            past = self._lengths[request]
            x = hidden_states[None, first : first + new]
            positions = torch.arange(past, past + new, device=x.device)[None]
            out = self._attention(
                x, self._rotary(x, positions), self._mask(new, past, x.device), past_key_values=self._caches[request]
            )
            outs.append(out[0][0])
            self._lengths[request] = past + new
            first += new
        return torch.cat(outs)

    def _mask(self, new: int, past: int, device: torch.device) -> torch.Tensor | None:
        """None where sdpa's own is right (one token, or no past); made once, as a model does for all layers."""
        if new == 1 or past == 0:
            return None
        if (new, past) not in self._masks:
            visible = torch.ones(new, past + new, dtype=torch.bool, device=device).tril_(past)
            self._masks[new, past] = visible[None, None]
        return self._masks[new, past]
