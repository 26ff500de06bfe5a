"""The problems of the ops, by kind."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from bench_rows import counting
from bench_rows.cases import PAGE, Case
from bench_rows.problem import (
    CHECK_FLOP,
    DECODE_SCALE,
    EPS,
    LATENT,
    NOPE,
    PREFILL_SCALE,
    ROPE,
    WIDTH,
    Problem,
    V,
    chosen,
    seed_of,
)
from bench_rows.sparse_problems import Sparse, SparsePrefill
from ntops_mla.ops import _fp8
from ntops_mla.testing import DECODE_LSE, DECODE_OUT, FP8_OUT, PREFILL_LSE, PREFILL_OUT, Tolerance

# A product of rows that were rounded to two bytes before: each of its terms is off by 2^-9 / sqrt(3) on average, which
# makes 1.2e-3 of outputs of size 1. Twelve times that, and the output's own rounding, 2^-8 of what lies just above a
# power of two, twice where it is scaled after.
PROJECTED = Tolerance(1.5e-2, 2**-7, 5e-6, both=True)
_ROWS = 512  # of scores held at once


def make(case: Case, device: torch.device, dtype: torch.dtype, seed: int, size: str) -> Problem:
    """The problem of an op's case."""
    torch.manual_seed(seed_of(case, seed))
    return PROBLEMS[case.kind](case, device, dtype, CHECK_FLOP[size])


class Decode(Problem):
    """q `[B, s_q, H, 576]`, cache `[pages, 64, 576]`, block_table, seq_lens; pages lie in random order."""

    tolerance, lse_tolerance = DECODE_OUT, DECODE_LSE

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        p = case.params
        self.s_q, self.heads, self.causal = p["s_q"], p["heads"], p["causal"]
        self.lengths = _lengths(p, seed_of(case, 0))
        pages = [-(-length // PAGE) for length in self.lengths]
        order = torch.randperm(sum(pages), dtype=torch.int32)
        table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for row, some in zip(table, order.split(pages)):
            row[: len(some)] = some
        self.block_table = table.to(device)
        self.cache = self.small(sum(pages), PAGE, WIDTH)
        self.q = self.small(len(pages), self.s_q, self.heads, WIDTH)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.work = counting.decode(self.lengths, self.s_q, self.heads, element=self.cache.element_size())
        each = self.s_q * self.heads * sum(self.lengths) / len(self.lengths) * 2 * (WIDTH + LATENT)
        self.requests = chosen(len(self.lengths), budget, each)

    @property
    def args(self) -> tuple:
        """Those of ops.mla_decode."""
        q, cache = self.q, self.cache
        tensors = q[..., :LATENT], q[..., LATENT:], cache[..., :LATENT], cache[..., LATENT:]
        return (*tensors, self.block_table, self.seq_lens, DECODE_SCALE, self.causal)

    def keys_of(self, request: int) -> torch.Tensor:
        """A request's rows `[length, 576]`, gathered."""
        length = self.lengths[request]
        pages = self.block_table[request, : -(-length // PAGE)].long()
        return self.cache.index_select(0, pages).flatten(0, 1)[:length]

    def expected(self):
        outs, lses = [], []
        for request in self.requests:
            # [length, 576], [s_q, H, 576]
            keys, q = self.keys_of(request).cpu().double(), self.q[request].cpu().double()
            scores = torch.einsum("shd,td->sht", q, keys) * DECODE_SCALE
            if self.causal:
                first = len(keys) - self.s_q + 1
                limit = torch.arange(first, first + self.s_q)[:, None, None]
                scores.masked_fill_(torch.arange(len(keys)) >= limit, float("-inf"))
            lses.append(scores.logsumexp(-1).T)
            outs.append(scores.softmax(-1) @ keys[:, :LATENT])
        return torch.stack(outs), torch.stack(lses), f"{len(outs)} of {len(self.lengths)} requests"

    def picked(self, out, lse):
        index = torch.tensor(self.requests, device=out.device)
        return out.index_select(0, index), None if lse is None else lse.index_select(0, index)


def _lengths(params, seed: int) -> list[int]:
    """FlashMLA's: normal around the context with half of it as deviation, at least s_q. `longest`: the first one's."""
    if not params["varlen"]:
        lengths = [params["context"]] * params["batch"]
        return [params.get("longest", lengths[0]), *lengths[1:]]
    drawn = random.Random(seed)
    mean = params["context"]
    return [max(int(drawn.normalvariate(mean, mean / 2)), params["s_q"]) for _ in range(params["batch"])]


class DecodeFp8(Decode):
    """The same over an fp8 cache, uint8 `[pages, 64, 656]`, compared with what its bytes say."""

    tolerance = FP8_OUT

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        self.bytes = torch.empty(*self.cache.shape[:2], _fp8.TOKEN_BYTES, dtype=torch.uint8, device=device)
        _fp8.quantize_into(self.bytes, self.cache[..., :LATENT], self.cache[..., LATENT:])
        self.cache = _fp8.dequantize(self.bytes, dtype)
        keys = sum(self.lengths)
        saved = keys * (WIDTH * self.q.element_size() - _fp8.TOKEN_BYTES)
        self.work = self.work._replace(bytes=self.work.bytes - saved)

    @property
    def args(self) -> tuple:
        """Those of ops.mla_decode_fp8."""
        q = self.q
        return (
            q[..., :LATENT], q[..., LATENT:], self.bytes, self.block_table, self.seq_lens, DECODE_SCALE, self.causal,
        )  # fmt: skip


class Combine(Problem):
    """Parts of a split decode, float32 `[B, splits, H, 512]`, and their lse `[B, splits, 1, H]`."""

    keys_a_split = 256

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        batch, self.splits, heads = (case.params[name] for name in ("batch", "splits", "heads"))
        self.part = torch.randn(batch, self.splits, heads, LATENT, device=device).div_(10)
        self.part_lse = torch.randn(batch, self.splits, 1, heads, device=device) + 4
        # Lengths for which every split holds keys
        self.seq_lens = torch.full((batch,), self.splits * self.keys_a_split, dtype=torch.int32, device=device)
        self.out = torch.empty(batch, 1, heads, LATENT, device=device, dtype=dtype)
        self.lse = torch.empty(batch, heads, 1, device=device)
        self.work = counting.combine(batch * heads, self.splits, element=self.out.element_size())

    def expected(self):
        part, lse = self.part.cpu().double(), self.part_lse.cpu().double()[:, :, 0]
        total = lse.logsumexp(1)
        out = ((lse - total[:, None]).exp()[..., None] * part).sum(1)
        return out[:, None], total[..., None], "all rows"


class Prefill(Problem):
    """q, k `[T, H, 192]`, v `[T, H, 128]` of packed requests, causal at the end of each."""

    tolerance, lse_tolerance = PREFILL_OUT, PREFILL_LSE

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        self.heads = heads = case.params["heads"]
        self.new = [new for new, _ in case.params["requests"]]
        self.keys = [new + past for new, past in case.params["requests"]]
        self.q = self.small(sum(self.new), heads, NOPE + ROPE)
        self.k = self.small(sum(self.keys), heads, NOPE + ROPE)
        self.v = self.small(sum(self.keys), heads, V)
        self.cu_q, self.cu_k = _bounds(self.new), _bounds(self.keys)
        self.cu_seqlens_q = torch.tensor(self.cu_q, dtype=torch.int32, device=device)
        self.cu_seqlens_k = torch.tensor(self.cu_k, dtype=torch.int32, device=device)
        self.work = counting.prefill(zip(self.new, self.keys), heads, element=self.q.element_size())
        self.picked_heads = chosen(heads, budget, self.work.flop / heads)

    @property
    def args(self) -> tuple:
        """Those of ops.mla_prefill."""
        return self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, PREFILL_SCALE, True

    def parts(self):
        """(rows, keys) of each request, as slices."""
        for i in range(len(self.new)):
            yield slice(self.cu_q[i], self.cu_q[i + 1]), slice(self.cu_k[i], self.cu_k[i + 1])

    def expected(self):
        index = torch.tensor(self.picked_heads, device=self.device)
        # [heads, T, D], one head of one request at a time
        q, k, v = (x.index_select(1, index).transpose(0, 1).cpu().double() for x in (self.q, self.k, self.v))
        out = torch.empty(len(index), q.shape[1], V, dtype=torch.float64)
        lse = torch.empty(len(index), q.shape[1], dtype=torch.float64)
        for rows, keys in self.parts():
            past = (keys.stop - keys.start) - (rows.stop - rows.start)
            for first in range(rows.start, rows.stop, _ROWS):
                some = slice(first, min(first + _ROWS, rows.stop))
                seen = past + some.stop - rows.start  # later keys are hidden from all of these rows
                limit = torch.arange(some.start, some.stop)[:, None] - rows.start + past
                hidden = torch.arange(seen) > limit
                for head in range(len(index)):
                    scores = q[head, some] @ k[head, keys][:seen].T * PREFILL_SCALE
                    scores.masked_fill_(hidden, float("-inf"))
                    lse[head, some] = scores.logsumexp(-1)
                    out[head, some] = scores.softmax(-1) @ v[head, keys][:seen]
        return out.transpose(0, 1), lse, f"{len(index)} of {self.heads} heads"

    def picked(self, out, lse):
        index = torch.tensor(self.picked_heads, device=out.device)
        return out.index_select(1, index), None if lse is None else lse.index_select(0, index)


def _bounds(lengths: Sequence[int]) -> list[int]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


class Append(Problem):
    """kv_a `[T, 576]`, the norm's weight, cos, sin, slots in random order, the cache they go to, and the queries' RoPE
    columns `[T, H, 64]`, rotated in place."""

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        tokens, heads = case.params["tokens"], case.params["heads"]
        self.kv_a = torch.randn(tokens, WIDTH, device=device, dtype=dtype)
        self.weight = torch.rand(LATENT, device=device, dtype=dtype) + 0.5
        self.cos, self.sin = _turns(tokens, device)
        pages = -(-tokens // PAGE) * 2
        self.slots = torch.randperm(pages * PAGE)[:tokens].to(device)
        self.cache = torch.zeros(pages, PAGE, WIDTH, device=device, dtype=dtype)
        q = torch.randn(tokens, heads, NOPE + ROPE, device=device, dtype=dtype)
        self.q_pe, self._q_pe = q[..., NOPE:], q[..., NOPE:].clone()
        self.work = counting.append(tokens, heads, element=self.kv_a.element_size())

    @property
    def args(self) -> tuple:
        """Those of ops.latent_append."""
        return self.kv_a, self.weight, self.cos, self.sin, self.slots, self.cache, EPS, self.q_pe

    def reset(self) -> None:
        self.q_pe.copy_(self._q_pe)
        self.cache.zero_()

    def written(self) -> torch.Tensor:
        """The tokens' rows, as the cache has them, and their queries."""
        rows = self.cache.view(-1, WIDTH).index_select(0, self.slots)
        return torch.cat([rows, self.q_pe.flatten(1)], -1)

    def expected(self):
        x = self.kv_a.cpu().double()
        latent = _norm64(x[:, :LATENT], self.weight)
        q_pe = _rope64(self._q_pe.cpu().double(), self.cos[:, None], self.sin[:, None])
        return torch.cat([latent, _rope64(x[:, LATENT:], self.cos, self.sin), q_pe.flatten(1)], -1), None, "all tokens"


class Norm(Problem):
    """input `[T, D]`, weight `[D]`."""

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        tokens, width = case.params["tokens"], case.params["width"]
        self.input = torch.randn(tokens, width, device=device, dtype=dtype)
        self.weight = torch.rand(width, device=device, dtype=dtype) + 0.5
        self.work = counting.norm(tokens, width, self.input.element_size())

    def expected(self):
        return _norm64(self.input.cpu().double(), self.weight), None, "all rows"


class Query(Problem):
    """q_a `[T, rank]`, its norm's weight, q_b_proj's `[columns, rank]`: the second half of a query projection."""

    tolerance = PROJECTED

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        tokens, rank, columns = (case.params[name] for name in ("tokens", "rank", "columns"))
        self.input = torch.randn(tokens, rank, device=device, dtype=dtype)
        self.norm = torch.rand(rank, device=device, dtype=dtype) + 0.5
        self.weight = torch.randn(columns, rank, device=device, dtype=dtype) * rank**-0.5
        self.work = counting.query(tokens, rank, columns, self.input.element_size())
        self._rows = chosen(tokens, budget, 2 * rank * columns)

    def expected(self):
        rows = self.input.cpu()[self._rows].double()
        out = _norm64(rows, self.norm) @ self.weight.cpu().double().T
        return out, None, f"{len(rows)} of {len(self.input)} rows"

    def picked(self, out, lse):
        return out.index_select(0, torch.tensor(self._rows, device=out.device)), None


class Rope(Problem):
    """q_pe `[T, H, 64]`, the last columns of wider heads as in a model, cos, sin."""

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        tokens, heads = case.params["tokens"], case.params["heads"]
        self.q_pe = torch.randn(tokens, heads, NOPE + ROPE, device=device, dtype=dtype)[..., NOPE:]
        self.cos, self.sin = _turns(tokens, device)
        self.work = counting.rope(tokens, heads, element=self.q_pe.element_size())

    def expected(self):
        return _rope64(self.q_pe.cpu().double(), self.cos[:, None], self.sin[:, None]), None, "all tokens"


def _turns(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, ROPE // 2, device=device) * 6
    return angles.cos(), angles.sin()


def _norm64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.cpu().double()


def _rope64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.cpu().double(), sin.cpu().double()
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


PROBLEMS: dict[str, type[Problem]] = {
    "decode": Decode,
    "combine": Combine,
    "prefill": Prefill,
    "append": Append,
    "norm": Norm,
    "rope": Rope,
    "query": Query,
    "decode_fp8": DecodeFp8,
    "sparse": Sparse,
    "sparse_prefill": SparsePrefill,
}
