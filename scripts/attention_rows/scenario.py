"""What is run: the model's numbers, the requests, their histories."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from ntops_mla import MLAConfig
from ntops_mla.testing import History


class Scenario(NamedTuple):
    """New tokens and history of every request. Prefill repeats a pass; decode feeds its output back."""

    name: str
    lengths: tuple[int, ...]
    pasts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


# InfiniLM's cases (InfiniTensor/InfiniLM: test/models/qwen3_moe/attention_test.py, shorter histories in decode).
PREFILL = Scenario("prefill", (64, 128, 256, 256), (512, 0, 0, 256))
DECODE = Scenario("decode", (1,) * 16, (50,) * 4 + (100,) * 4 + (200,) * 4 + (400,) * 4)
TINY_PREFILL = Scenario("prefill", (3, 9, 17, 12), (20, 0, 0, 7))
TINY_DECODE = Scenario("decode", (1,) * 4, (5, 9, 20, 40))


def config(name: str) -> MLAConfig:
    """a: hidden 2048, 16 heads, no q LoRA. r1: DeepSeek-R1. Both with R1's YaRN."""
    r1 = MLAConfig.deepseek_r1()
    if name == "r1":
        return r1
    return dataclasses.replace(r1, hidden_size=2048, num_heads=16, q_lora_rank=None)


def tiny(cfg: MLAConfig) -> MLAConfig:
    """Two heads and a narrow hidden state; head sizes stay the model's."""
    q_lora_rank = None if cfg.q_lora_rank is None else min(cfg.q_lora_rank, 128)
    return dataclasses.replace(cfg, hidden_size=256, num_heads=2, q_lora_rank=q_lora_rank)


def histories(cfg: MLAConfig, scenario: Scenario, device: torch.device, dtype: torch.dtype) -> list[History]:
    """Random latents of unit root mean square, as after the norm, and random RoPE columns."""
    return [
        History(
            torch.randn(past, cfg.kv_lora_rank, device=device, dtype=dtype),
            torch.randn(past, cfg.qk_rope_head_dim, device=device, dtype=dtype),
        )
        for past in scenario.pasts
    ]
