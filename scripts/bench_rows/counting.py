"""FLOP and bytes of each op and of a whole layer, counted from its numbers alone, by FlashMLA's rules.

An attention's FLOP are those of its two products, and its bytes what has to be read and written once: queries, results,
and each key of the cache as often as there are requests that hold it. Source: deepseek-ai/FlashMLA
tests/test_flash_mla_dense_decoding.py and tests/test_fmha_sm100.py. Block tables and lengths are left out, as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ntops_mla.config import MLAConfig
from ntops_mla.plan import prefers_expanded


class Work(NamedTuple):
    """What a call has to do at least."""

    flop: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)


def pairs(new: int, keys: int, causal: bool = True) -> int:
    """Unmasked (query, key) pairs of `new` rows at the end of `keys`."""
    if not causal:
        return new * keys
    seen = min(new, keys)  # rows above the diagonal see nothing
    return seen * (keys - seen) + seen * (seen + 1) // 2


def decode(keys: Sequence[int], s_q: int, heads: int, latent: int = 512, rope: int = 64, element: int = 2) -> Work:
    """Absorbed attention over requests of `keys` cached tokens. A causal mask is not counted off, as in FlashMLA."""
    width, total, rows = latent + rope, sum(keys), len(keys) * s_q * heads
    return Work(s_q * heads * total * 2 * (width + latent), element * (rows * (width + latent) + total * width))


def sparse(tokens: int, topk: int, heads: int, read: int, token_bytes: int, element: int = 2) -> Work:
    """Each of `tokens` over `topk` keys, of which `read` different ones of `token_bytes` each are read in all."""
    flop = tokens * topk * heads * 2 * (576 + 512)
    return Work(flop, read * token_bytes + element * tokens * heads * (576 + 512))


def combine(rows: int, splits: int, latent: int = 512, element: int = 2) -> Work:
    """Float32 parts and their lse in, a result and its lse out."""
    return Work(2 * rows * splits * latent, rows * (splits * (latent + 1) * 4 + latent * element + 4))


def prefill(
    requests: Iterable[tuple[int, int]], heads: int, qk: int = 192, v: int = 128, element: int = 2, causal: bool = True
) -> Work:
    """Expanded attention of requests (new tokens, keys with them)."""
    total = Work(0, 0)
    for new, keys in requests:
        flop = pairs(new, keys, causal) * heads * 2 * (qk + v)
        total += Work(flop, element * heads * (new + keys) * (qk + v))
    return total


def append(tokens: int, heads: int = 0, latent: int = 512, rope: int = 64, element: int = 2) -> Work:
    """Rows in and out, the norm's weight, cos and sin in float32, a slot of eight bytes; with the rotation of `heads`
    query heads."""
    flop = tokens * (4 * latent + 3 * rope * (1 + heads))
    moved = element * (2 * tokens * (latent + rope * (1 + heads)) + latent)
    return Work(flop, moved + tokens * (4 * rope + 8))


def norm(rows: int, width: int, element: int = 2) -> Work:
    """Square, sum, scale and weight of each element."""
    return Work(4 * rows * width, element * (2 * rows + 1) * width)


def query(tokens: int, rank: int, columns: int, element: int = 2) -> Work:
    """A normalised row of `rank` through a matrix of `columns`."""
    product = Work(2 * tokens * rank * columns, element * (rank * columns + tokens * columns))
    return product + norm(tokens, rank, element)


def rope(tokens: int, heads: int, width: int = 64, element: int = 2) -> Work:
    """Six FLOP a pair; cos and sin in float32 once a token."""
    return Work(3 * tokens * heads * width, tokens * width * (2 * heads * element + 4))


def projections(cfg: MLAConfig) -> dict[str, int]:
    """Elements of each weight matrix of a layer."""
    heads = cfg.num_heads
    if cfg.q_lora_rank is None:
        query = {"q_proj": cfg.hidden_size * heads * cfg.qk_head_dim}
    else:
        query = {
            "q_a_proj": cfg.hidden_size * cfg.q_lora_rank,
            "q_b_proj": cfg.q_lora_rank * heads * cfg.qk_head_dim,
        }
    return {
        **query,
        "kv_a_proj_with_mqa": cfg.hidden_size * cfg.latent_dim,
        "kv_b_proj": cfg.kv_lora_rank * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim),
        "o_proj": heads * cfg.v_head_dim * cfg.hidden_size,
    }


def absorbed_flop(cfg: MLAConfig, new: int, keys: int) -> int:
    """Attention of one request in absorbed form, with what absorbs its queries and values."""
    absorb = new * cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return 2 * cfg.num_heads * (absorb + pairs(new, keys) * (cfg.latent_dim + cfg.kv_lora_rank))


def expanded_flop(cfg: MLAConfig, new: int, keys: int) -> int:
    """Attention of one request in expanded form, with the expansion of all its keys."""
    expand = keys * cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return 2 * cfg.num_heads * (expand + pairs(new, keys) * (cfg.qk_head_dim + cfg.v_head_dim))


def module(cfg: MLAConfig, lengths: Sequence[int], pasts: Sequence[int], element: int = 2, cost: float = 1.0) -> Work:
    """One layer over packed requests, each in the form that the plan chooses at `cost` (a platform's
    attention_flop_cost). Bytes: all matrices once, hidden states in and out, each request's cache once, new rows
    written."""
    matrices, tokens = projections(cfg), sum(lengths)
    flop = 2 * tokens * (sum(matrices.values()) - matrices["kv_b_proj"])
    moved = sum(matrices.values()) + 2 * tokens * cfg.hidden_size
    for new, past in zip(lengths, pasts, strict=True):
        count = expanded_flop if prefers_expanded(cfg, new, past, cost) else absorbed_flop
        flop += count(cfg, new, past + new)
        moved += (past + 2 * new) * cfg.latent_dim
    return Work(flop, moved * element)


def cache_per_token(cfg: MLAConfig, element: int = 2) -> tuple[int, int]:
    """Bytes a token takes in one layer's cache: latents, and the keys and values of all heads (MHA)."""
    return cfg.latent_dim * element, cfg.num_heads * (cfg.qk_head_dim + cfg.v_head_dim) * element


def crossover(cfg: MLAConfig, past: int, cost: float = 1.0) -> int:
    """The least number of new tokens for which the expanded form is chosen on `past`."""
    low, high = 1, 2  # absorbed at low, expanded at high
    while not prefers_expanded(cfg, high, past, cost):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if prefers_expanded(cfg, middle, past, cost) else (middle, high)
    return high
