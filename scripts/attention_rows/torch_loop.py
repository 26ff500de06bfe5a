"""torch_loop: the plain PyTorch way of DeepSeek's model.py, one request after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ntops_mla import MLA
from ntops_mla.rope_table import RopeTable


class TorchLoop:
    """Preallocated caches, F.linear, einsum and softmax; absorbed for one token, expanded for more.

    Source: deepseek-ai/DeepSeek-V3 inference/model.py, class MLA (naive and absorb), by its formulas.
    """

    name = "torch_loop"

    def __init__(self, mla: MLA) -> None:
        self._mla = mla
        cfg = self._cfg = mla.cfg
        device = mla.o_proj.weight.device
        self._rope = RopeTable(
            cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, cfg.max_position_embeddings, device
        )
        per_head = mla.kv_b_proj.weight.view(cfg.num_heads, -1, cfg.kv_lora_rank)
        self._w_uk, self._w_uv = per_head.split([cfg.qk_nope_head_dim, cfg.v_head_dim], 1)

    def start(self, histories, room: int) -> None:
        self._pasts = [len(latent) for latent, _ in histories]
        self._lengths = list(self._pasts)
        self._caches = []
        for latent, pe in histories:
            kv = latent.new_zeros(len(latent) + room, latent.shape[1])
            pe_cache = pe.new_zeros(len(pe) + room, pe.shape[1])
            kv[: len(latent)], pe_cache[: len(pe)] = latent, pe
            self._caches.append((kv, pe_cache))

    def rewind(self) -> None:
        self._lengths = list(self._pasts)

    def run(self, hidden_states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        outs, first = [], 0
        for request, length in enumerate(lengths):
            outs.append(self._request(request, hidden_states[first : first + length]))
            first += length
        return torch.cat(outs)

    def _request(self, request: int, x: torch.Tensor) -> torch.Tensor:
        cfg, mla = self._cfg, self._mla
        new, past = len(x), self._lengths[request]
        end = past + new
        cos, sin = self._rope.rows(torch.arange(past, end, device=x.device), end)
        if cfg.q_lora_rank is None:
            q = mla.q_proj(x)
        else:
            q = mla.q_b_proj(mla.q_a_layernorm(mla.q_a_proj(x)))
        # [n, H, Dnope], [n, H, R]
        q_nope, q_pe = q.view(new, cfg.num_heads, -1).split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        q_pe = _rotate(q_pe, cos[:, None], sin[:, None])
        latent, pe = mla.kv_a_proj_with_mqa(x).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv_cache, pe_cache = self._caches[request]
        kv_cache[past:end] = mla.kv_a_layernorm(latent)
        pe_cache[past:end] = _rotate(pe, cos, sin)
        self._lengths[request] = end
        kv, pe = kv_cache[:end], pe_cache[:end]
        mask = None
        if new > 1:
            mask = torch.full((new, end), float("-inf"), device=x.device).triu_(past + 1)[:, None]
        out = self._absorbed(q_nope, q_pe, kv, pe) if new == 1 else self._expanded(q_nope, q_pe, kv, pe, mask)
        return F.linear(out.flatten(1), mla.o_proj.weight, mla.o_proj.bias)

    def _absorbed(self, q_nope, q_pe, kv, pe):
        q_latent = torch.einsum("shd,hdc->shc", q_nope, self._w_uk)
        scores = torch.einsum("shc,tc->sht", q_latent, kv) + torch.einsum("shr,tr->sht", q_pe, pe)
        weights = (scores.float() * self._cfg.softmax_scale).softmax(-1).to(kv.dtype)
        return torch.einsum("shc,hdc->shd", torch.einsum("sht,tc->shc", weights, kv), self._w_uv)

    def _expanded(self, q_nope, q_pe, kv, pe, mask):
        cfg = self._cfg
        k_nope, v = (
            self._mla.kv_b_proj(kv).view(len(kv), cfg.num_heads, -1).split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        )
        k = torch.cat([k_nope, pe[:, None].expand(-1, cfg.num_heads, -1)], -1)
        q = torch.cat([q_nope, q_pe], -1)
        scores = torch.einsum("shd,thd->sht", q, k).float() * cfg.softmax_scale
        return torch.einsum("sht,thd->shd", (scores + mask).softmax(-1).to(kv.dtype), v)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
