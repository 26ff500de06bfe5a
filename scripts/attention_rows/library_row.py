"""ntops_mla: this library, all requests in one pass."""

from __future__ import annotations

import torch

from ntops_mla import MLA, LatentCache
from ntops_mla.ops import get

PAGE_SIZE = 64


class Library:
    """One MLA over a paged LatentCache; planning the step is part of every pass."""

    name = "ntops_mla"

    def __init__(self, mla: MLA) -> None:
        self._mla = mla

    def start(self, histories, room: int) -> None:
        mla = self._mla
        weight = mla.o_proj.weight
        pages = sum(-(-(len(latent) + room) // PAGE_SIZE) for latent, _ in histories)
        self._cache = LatentCache(
            mla.cfg, pages, PAGE_SIZE, num_layers=mla.layer_idx + 1, device=weight.device, dtype=weight.dtype
        )
        self._pasts = [len(latent) for latent, _ in histories]
        for request, (latent, pe) in enumerate(histories):
            if len(latent):
                self._cache.fill(request, latent, pe, mla.layer_idx)

    def rewind(self) -> None:
        for request, past in enumerate(self._pasts):
            self._cache.truncate(request, past)

    def run(self, hidden_states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        step = self._cache.step(range(len(lengths)), lengths)
        return self._mla(hidden_states, step)

    def choices(self) -> dict[str, dict[str, str]]:
        """op -> backend and reason, for the sizes of this model."""
        cfg, weight = self._mla.cfg, self._mla.o_proj.weight
        chosen = {}
        for name in ("rms_norm", "rope", "latent_append", "mla_decode", "mla_prefill"):
            op = get(name)
            args = op.example(
                weight.device,
                weight.dtype,
                heads=cfg.num_heads,
                kv_lora_rank=cfg.kv_lora_rank,
                rope=cfg.qk_rope_head_dim,
                nope=cfg.qk_nope_head_dim,
                v=cfg.v_head_dim,
                page_size=PAGE_SIZE,
            )
            choice = op.explain(*args)
            chosen[name] = {"backend": choice.backend, "platform": choice.platform, "reason": choice.reason}
        return chosen
