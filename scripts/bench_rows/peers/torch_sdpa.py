"""PyTorch's scaled_dot_product_attention: what there is without any library, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench_rows.peers.base import Peer
from bench_rows.problem import DECODE_SCALE, LATENT, PREFILL_SCALE, V
from ntops_mla.ops._attention import widen


class TorchSDPA(Peer):
    """A call a request: keys are gathered from their pages in it, since it knows no pages."""

    name = "torch_sdpa"
    module = "torch.nn.functional"
    names = ("scaled_dot_product_attention",)
    kinds = ("decode", "prefill")
    on_cpu = True
    note = "the result alone, no lse; a call a request; decode gathers the pages in it, prefill pads the values before"

    def decode(self, problem):
        def run():
            outs = []
            for request, q in enumerate(problem.q):
                # [1, 1, length, 576]; the heads are the query's rows, so that the keys are shared and not repeated
                k = problem.keys_of(request)[None, None]
                rows = q.flatten(0, 1)[None, None]
                out = F.scaled_dot_product_attention(rows, k, k, attn_mask=masks[request], scale=DECODE_SCALE)
                outs.append(out[0, 0, :, :LATENT].unflatten(0, q.shape[:2]))
            return torch.stack(outs)

        masks = [self._mask(problem, length) for length in problem.lengths]
        return run

    def _mask(self, problem, length):
        """None where all rows see all keys; made before, as a model does once for all layers."""
        if not problem.causal or problem.s_q == 1:
            return None
        visible = torch.ones(problem.s_q, length, dtype=torch.bool, device=problem.device).tril_(length - problem.s_q)
        return visible.repeat_interleave(problem.heads, 0)[None, None]

    def prefill(self, problem):
        masks, padded = [], widen(problem.v, problem.k.shape[-1])
        for new, keys in zip(problem.new, problem.keys):
            visible = torch.ones(new, keys, dtype=torch.bool, device=problem.device).tril_(keys - new)
            masks.append(None if new == keys else visible[None, None])

        def run():
            outs = []
            for (rows, keys), mask in zip(problem.parts(), masks):
                q, k, v = (x.transpose(0, 1)[None] for x in (problem.q[rows], problem.k[keys], padded[keys]))
                out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=PREFILL_SCALE)
                outs.append(out[0].transpose(0, 1)[..., :V])
            return torch.cat(outs)

        return run
