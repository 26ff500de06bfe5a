"""The problems of attention over keys that indices name."""

from __future__ import annotations

import torch

from bench_rows import counting
from bench_rows.cases import PAGE
from bench_rows.problem import DECODE_SCALE, LATENT, WIDTH, Problem, chosen
from ntops_mla.ops import _fp8
from ntops_mla.testing import DECODE_LSE, SPARSE_OUT, SPARSE_PREFILL_LSE, SPARSE_PREFILL_OUT


class Sparse(Problem):
    """q `[B, s_q, H, 576]`, a cache `[pages, 64, 576]` or, with `fp8`, uint8 `[pages, 64, 656]`, and indices int32 `[B,
    s_q, topk]` of each request's own pages, in random order."""

    tolerance, lse_tolerance = SPARSE_OUT, DECODE_LSE

    def __init__(self, case, device, dtype, budget) -> None:
        super().__init__(case, device, dtype, budget)
        p = case.params
        batch, s_q, self.heads, topk = p["batch"], p["s_q"], p["heads"], p["topk"]
        self.fp8 = p.get("fp8", False)
        pages = -(-p["context"] // PAGE) * batch
        self.cache = self.small(pages, PAGE, WIDTH)
        if self.fp8:
            self.bytes = torch.empty(pages, PAGE, _fp8.TOKEN_BYTES, dtype=torch.uint8, device=device)
            _fp8.quantize_into(self.bytes, self.cache[..., :LATENT], self.cache[..., LATENT:])
            self.cache = _fp8.dequantize(self.bytes, dtype)
        self.q = self.small(batch, s_q, self.heads, WIDTH)
        slots = pages // batch * PAGE
        chosen_keys = torch.stack([torch.randperm(slots)[:topk] for _ in range(batch * s_q)]).view(batch, s_q, topk)
        first = torch.arange(batch)[:, None, None] * slots
        self.indices = (first + chosen_keys).to(torch.int32).to(device)
        read = [len(one.unique()) for one in self.indices.cpu()]
        token = _fp8.TOKEN_BYTES if self.fp8 else WIDTH * self.q.element_size()
        self.work = counting.sparse(batch * s_q, topk, self.heads, sum(read), token, self.q.element_size())
        self.tokens = chosen(batch * s_q, budget, self.work.flop / (batch * s_q))

    @property
    def args(self) -> tuple:
        """Those of ops.mla_sparse, or ops.mla_sparse_fp8."""
        q, cache = self.q, self.cache
        caches = (self.bytes,) if self.fp8 else (cache[..., :LATENT], cache[..., LATENT:])
        return q[..., :LATENT], q[..., LATENT:], *caches, self.indices, DECODE_SCALE

    def dequantize(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of 656 bytes -> of 576 columns."""
        return _fp8.dequantize(rows, self.dtype)

    def expected(self):
        q, indices = self.q.cpu().flatten(0, 1), self.indices.cpu().flatten(0, 1).long()
        rows = self.cache.cpu().view(-1, WIDTH)
        outs, lses = [], []
        for token in self.tokens:
            keys = rows[indices[token]].double()
            scores = q[token].double() @ keys.T * DECODE_SCALE
            outs.append(scores.softmax(-1) @ keys[:, :LATENT])
            lses.append(scores.logsumexp(-1))
        return torch.stack(outs), torch.stack(lses), f"{len(outs)} of {len(q)} tokens"

    def picked(self, out, lse):
        index = torch.tensor(self.tokens, device=out.device)
        lse = None if lse is None else lse.flatten(0, 1).index_select(0, index)
        return out.flatten(0, 1).index_select(0, index), lse


class SparsePrefill(Sparse):
    """One request of `s_q` tokens over `context` keys that lie in no pages; max_logits are computed too."""

    tolerance, lse_tolerance = SPARSE_PREFILL_OUT, SPARSE_PREFILL_LSE

    @property
    def arguments(self) -> tuple:
        """q `[s_q, H, 576]`, kv `[s_kv, 1, 576]`, indices `[s_q, 1, topk]` and the scale of flash_mla_sparse_fwd."""
        return self.q[0], self.cache.view(-1, 1, WIDTH), self.indices[0][:, None], DECODE_SCALE
