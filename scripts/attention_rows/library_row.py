"""ntops_mla: this library, all requests in one pass."""

from __future__ import annotations

import torch

from ntops_mla import MLA, LatentCache, dispatch

PAGE_SIZE = 64


class Library:
    """One MLA over a paged LatentCache; planning the step is part of every pass."""

    name = "ntops_mla"

    def __init__(self, mla: MLA) -> None:
        self._mla = mla
        self._ran: dict[str, dispatch.Choice] | None = None

    def start(self, histories, room: int) -> None:
        mla = self._mla
        weight = mla.o_proj.weight
        pages = sum(-(-(len(latent) + room) // PAGE_SIZE) for latent, _ in histories)
        self._cache = LatentCache(
            mla.cfg, pages, PAGE_SIZE, num_layers=mla.layer_idx + 1, device=weight.device, dtype=weight.dtype
        )
        self._ran = None
        self._pasts = [len(latent) for latent, _ in histories]
        for request, (latent, pe) in enumerate(histories):
            if len(latent):
                self._cache.fill(request, latent, pe, mla.layer_idx)

    def rewind(self) -> None:
        for request, past in enumerate(self._pasts):
            self._cache.truncate(request, past)

    def run(self, hidden_states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        if self._ran is not None:
            return self._pass(hidden_states, lengths)
        with dispatch.record() as ran:
            out = self._pass(hidden_states, lengths)
        self._ran = ran
        return out

    def _pass(self, hidden_states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        step = self._cache.step(range(len(lengths)), lengths)
        return self._mla(hidden_states, step)

    def choices(self) -> dict[str, dict[str, str]]:
        """op -> backend, platform and reason, of those that the first pass since `start` ran."""
        return {
            name: {"backend": choice.backend, "platform": choice.platform, "reason": choice.reason}
            for name, choice in sorted((self._ran or {}).items())
        }
