"""The order of RoPE's rows in a projection: halves (Llama's way) or interleaved pairs (DeepSeek's)."""

from __future__ import annotations

import torch

from ntops_mla.config import MLAConfig


def permute_rope_rows(cfg: MLAConfig, name: str, value: torch.Tensor, back: bool = False) -> torch.Tensor | None:
    """`value` with its RoPE rows taken from halves to pairs (`back`: from pairs to halves), None where `name` has none.

    A model that rotates halves pairs column i with column i + R / 2; with the rows of q and kv_a permuted alike,
    rotating the pair (2i, 2i + 1) gives the same scores, since a dot product does not know the order of its terms.
    """
    projection, _, kind = name.partition(".")
    if kind not in ("weight", "bias"):
        return None
    if projection in ("q_proj", "q_b_proj"):
        # [H * Dqk, ...]: the last R rows of every head
        heads = value.unflatten(0, (cfg.num_heads, cfg.qk_head_dim))
        kept, rope = heads.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], 1)
        return torch.cat([kept, _permute(rope, 1, back)], 1).flatten(0, 1)
    if projection == "kv_a_proj_with_mqa":
        # [C + R, ...]: the last R rows
        kept, rope = value.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], 0)
        return torch.cat([kept, _permute(rope, 0, back)], 0)
    return None


def _permute(rope: torch.Tensor, dim: int, back: bool) -> torch.Tensor:
    width = rope.shape[dim]
    shape = (width // 2, 2) if back else (2, width // 2)
    return rope.unflatten(dim, shape).transpose(dim, dim + 1).flatten(dim, dim + 1)
