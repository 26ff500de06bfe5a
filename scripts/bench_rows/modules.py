"""Whole layers: this library, the looping torch row and transformers, over one set of weights; and a step's parts.

Every run starts from the same histories: what a run appends is taken back after it, untimed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from attention_rows import measure, scenario, transformers_row
from attention_rows.library_row import PAGE_SIZE, Library
from attention_rows.torch_loop import TorchLoop
from attention_rows.transformers_row import Transformers
from bench_rows import counting, graphs
from bench_rows.cases import Case, config_of
from bench_rows.problem import CHECK_FLOP, Check, chosen, seed_of
from bench_rows.ways import CALL, GRAPH, OURS, Absent
from ntops_mla import MLA, LatentCache, dispatch, ops
from ntops_mla.devices import detect
from ntops_mla.modules.linear import linear
from ntops_mla.testing import Float64MLA, cos_diff

# What a decode step spends its time on, in its order.
PARTS = ("plan", "projections", "append and rope", "absorb queries", "mla_decode", "absorb values", "o_proj")
# Beside them: what its weights take where each is multiplied as PyTorch does it.
PRODUCTS = "its products alone"


@dataclasses.dataclass
class Layer:
    """A case's module, histories and inputs; `check(out)` compares hidden states with float64."""

    case: Case
    mla: MLA
    histories: list
    x: torch.Tensor
    budget: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of each request."""
        return self.case.params["lengths"]

    @functools.cached_property
    def work(self) -> counting.Work:
        """Of the whole layer."""
        platform = detect(self.x.device).platform
        cost = 1.0 if platform is None else platform.attention_flop_cost.value
        return counting.module(self.mla.cfg, self.lengths, self.case.params["pasts"], self.x.element_size(), cost)

    @functools.cached_property
    def _expected(self) -> tuple[list[int], torch.Tensor, str]:
        cfg, count = self.mla.cfg, len(self.lengths)
        weights = {name: value.detach().cpu().double() for name, value in self.mla.named_parameters()}
        # MLA's parameters are in pairs, whatever order its checkpoint has.
        oracle = Float64MLA(dataclasses.replace(cfg, rope_interleave=True), weights)
        each = max(
            counting.expanded_flop(cfg, new, past + new)
            for new, past in zip(self.lengths, self.case.params["pasts"], strict=True)
        )
        requests = chosen(count, self.budget, each)
        parts = self.x.split(self.lengths)
        outs = [oracle(parts[i], self.histories[i] if len(self.histories[i].latent) else None)[0] for i in requests]
        return requests, torch.cat(outs), f"{len(requests)} of {count} requests"

    def check(self, out: torch.Tensor) -> Check:
        """Compare; never raises for a wrong result."""
        requests, want, said = self._expected
        parts = out.split(self.lengths)
        got = torch.cat([parts[i] for i in requests]).detach().cpu().double()
        if not torch.isfinite(got).all():
            return Check(None, None, said, "the result is not finite")
        error, difference = (got - want).abs().max().item(), cos_diff(got, want)
        limit, allowed = measure.MAX_ERROR[out.dtype] * want.abs().max().item(), measure.COS_DIFF[out.dtype]
        fault = None
        if error > limit or difference > allowed:
            fault = f"max error {error:.3g} (allowed {limit:.3g}), cos_diff {difference:.3g} (allowed {allowed:.3g})"
        return Check(error, difference, said, fault)


def make(case: Case, device: torch.device, dtype: torch.dtype, seed: int, size: str) -> Layer:
    """The layer of a module's case; one set of weights serves all cases of a config."""
    mla = _weights(case.params["config"], device, dtype, seed)
    torch.manual_seed(seed_of(case, seed))
    whole = scenario.Scenario(case.name, case.params["lengths"], case.params["pasts"])
    histories = scenario.histories(mla.cfg, whole, device, dtype)
    x = torch.randn(whole.tokens, mla.cfg.hidden_size, device=device, dtype=dtype)
    return Layer(case, mla, histories, x, CHECK_FLOP[size])


@functools.lru_cache(maxsize=1)
def _weights(config: str, device: torch.device, dtype: torch.dtype, seed: int) -> MLA:
    torch.manual_seed(seed)
    # Inference tensors as weights make transformers' row ten times slower: see attention_rows/transformers_row.py.
    with torch.inference_mode(False):
        return MLA(config_of(config), device=device, dtype=dtype).requires_grad_(False)


forget = _weights.cache_clear


@dataclasses.dataclass
class LayerWay:
    """One implementation of a layer. `start` makes it, over the histories; `run` gives hidden states, `after` takes the
    new tokens back."""

    implementation: str
    timed: str
    make: Callable[[], object]
    layer: Layer
    note: str | None = None
    row: object = None

    def start(self) -> None:
        """What a caller does once."""
        self.row = self.make()

    def run(self) -> torch.Tensor:
        """One pass over all requests."""
        return self.row.run(self.layer.x, self.layer.lengths)

    def after(self) -> None:
        """Back to the histories."""
        self.row.rewind()

    def backend(self) -> str | None:
        """kernel where all of ours ran as kernels, reference where none did, mixed otherwise; None for others."""
        if self.implementation != OURS or self.row is None:
            return None
        backends = {choice["backend"] for choice in self.row.choices().values()}
        return backends.pop() if len(backends) == 1 else "mixed"


class Replay:
    """A row of attention_rows whose pass is a replayed graph of the layer; its step was planned once."""

    def __init__(self, layer: Layer) -> None:
        self._library = Library(layer.mla)
        self._library.start(layer.histories, room=max(layer.lengths))
        # Compiles, and makes the absorbed weights: neither is part of a graph.
        self._library.run(layer.x, layer.lengths)
        self._library.rewind()
        step = self._library._cache.step(range(len(layer.lengths)), layer.lengths)
        step.plan()
        self._replay = graphs.record_once(layer.x.device, lambda: layer.mla(layer.x, step))  # a step is used once

    def run(self, x, lengths):
        """The recorded pass: it writes the same rows again."""
        return self._replay()

    def rewind(self) -> None:
        """Lengths do not move in a replay."""

    def choices(self):
        """Of the pass before."""
        return self._library.choices()


def _cache_of(layer: Layer) -> LatentCache:
    lengths, pasts = layer.lengths, layer.case.params["pasts"]
    pages = sum(-(-(past + new) // PAGE_SIZE) for past, new in zip(pasts, lengths, strict=True))
    x = layer.x
    cache = LatentCache(layer.mla.cfg, pages, PAGE_SIZE, device=x.device, dtype=x.dtype)
    for request, (latent, pe) in enumerate(layer.histories):
        if len(latent):
            cache.fill(request, latent, pe)
    return cache


def ways(layer: Layer, only: tuple[str, ...] | None = None) -> Iterator[LayerWay | Absent]:
    """This library, its replay, and the peers of whole layers; only: implementations, None: all."""
    wanted = lambda name: only is None or name in only  # noqa: E731
    if wanted(OURS):
        yield LayerWay(OURS, CALL, lambda: _started(Library, layer), layer, "planning of the step included")
        if all(new == 1 for new in layer.lengths):  # those of a prefill differ from step to step
            reason = graphs.unavailable(layer.x.device) or _reads_lengths(layer)
            if reason is None:
                yield LayerWay(OURS, GRAPH, lambda: Replay(layer), layer, "the step planned before")
            else:
                yield Absent(OURS, GRAPH, reason)
    note = "request by request"
    if wanted("torch_loop"):
        yield LayerWay("torch_loop", CALL, lambda: _started(TorchLoop, layer), layer, note)
    if wanted("transformers"):
        reason = transformers_row.unavailable()
        if reason is None:
            yield LayerWay("transformers", CALL, lambda: _started(Transformers, layer), layer, note)
        else:
            yield Absent("transformers", CALL, reason)


def _started(make_row, layer: Layer):
    row = make_row(layer.mla)
    row.start(layer.histories, room=max(layer.lengths))
    return row


def _reads_lengths(layer: Layer) -> str | None:
    with dispatch.record() as ran:
        Parts(layer).run_all()
    return (
        "PyTorch's form of mla_decode reads lengths on the host" if ran["mla_decode"].backend == "reference" else None
    )


class Parts:
    """One decode step of an MLA, in absorbed form, cut where its time may go. Each part works on what the one before
    it left, so that one pass over all of them is the step."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.mla, self.cfg = layer, layer.mla, layer.mla.cfg
        # As wide as q_b_proj's input
        self.normed = torch.randn(len(layer.x), self.cfg.q_lora_rank or 0, device=layer.x.device).to(layer.x.dtype)
        self.cache = _cache_of(layer)
        self.calls = dict(
            zip(
                PARTS,
                (self._plan, self._project, self._append, self._queries, self._decode, self._values, self._out),
            )
        )

    def run_all(self) -> torch.Tensor:
        """The step."""
        for call in self.calls.values():
            call()
        return self.out

    def _plan(self) -> None:
        # Nothing of it is ever committed, so that each step starts from the histories.
        self.step = self.cache.step(range(len(self.layer.lengths)), self.layer.lengths)
        self.group = self.step.plan("absorbed").absorbed[0]

    def _project(self) -> None:
        self.q, self.kv_a = self.mla._project(self.layer.x)

    def _append(self) -> None:
        step, weight = self.step, self.mla.kv_a_layernorm.weight
        storage, eps = self.cache.storage[0], self.cfg.rms_norm_eps
        self.q_pe = self.q[..., self.cfg.qk_nope_head_dim :]
        ops.latent_append(self.kv_a, weight, step.cos, step.sin, step.slots, storage, eps, self.q_pe)

    def _queries(self) -> None:
        w_uk, _ = self.mla._absorption_weights()
        q_nope = self.q[..., : self.cfg.qk_nope_head_dim]
        self.q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)

    def _decode(self) -> None:
        group, cache = self.group, self.cache
        self.attended, _ = ops.mla_decode(
            self.q_latent[:, None], self.q_pe[:, None], cache.kv_cache[0], cache.pe_cache[0], group.block_table,
            group.seq_lens, self.cfg.softmax_scale,
        )  # fmt: skip

    def _values(self) -> None:
        _, w_uv = self.mla._absorption_weights()
        self.heads = torch.bmm(self.attended.flatten(0, 1).transpose(0, 1), w_uv).transpose(0, 1)

    def _out(self) -> None:
        out = self.heads.reshape(len(self.heads), -1)
        self.out = linear(out, self.mla.o_proj.weight, self.mla.o_proj.bias)

    def products(self) -> torch.Tensor:
        """Every product of the step with a weight, as PyTorch has it, on what the step left; what o_proj gave."""
        mla, x = self.mla, self.layer.x
        w_uk, w_uv = mla._absorption_weights()
        for name in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"):
            if hasattr(mla, name):
                F.linear(x, getattr(mla, name).weight)
        if hasattr(mla, "q_b_proj"):
            F.linear(self.normed, mla.q_b_proj.weight)
        torch.bmm(self.q[..., : self.cfg.qk_nope_head_dim].transpose(0, 1), w_uk)
        heads = torch.bmm(self.attended.flatten(0, 1).transpose(0, 1), w_uv).transpose(0, 1)
        return F.linear(heads.reshape(len(heads), -1), mla.o_proj.weight, mla.o_proj.bias)
