"""DecodeGraph: a decode step captured once as a graph of the device, and replayed with other requests and lengths.

Launching a step's kernels one by one costs more than they take where the batch is small. A graph is launched whole:
its buffers stand still, and the requests' slots, pages and lengths are written into them before each replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ntops_mla import devices, dispatch
from ntops_mla.cache import LatentCache, Step
from ntops_mla.modules import MLA
from ntops_mla.plan import AbsorbedGroup, Plan


class DecodeGraph:
    """One new token each of up to `max_requests` requests, through MLA layers, as one graph.

    layers: an `MLA`, or any callable `fn(hidden_states, step)` over MLA layers that launches the same work for the same
    shapes. cache: the `LatentCache` of the steps. `graph(hidden_states, step)` takes and gives what
    `layers(hidden_states, step)` does: `[B, hidden]`, one row a request; the step's life is the same.

    A batch is padded to the next of `sizes` (powers of two, and max_requests), a block table to a power of two of
    columns; each such pair is captured when it is first met, after one run that writes nothing. Padded rows have no
    slot and no keys. The result is bitwise what a step of the padded batch gives without a graph. Where weights have
    changed, captures are made anew.

    `reason`: why steps run one launch at a time, in words: a device without graphs, or an op that runs PyTorch, which
    reads lengths on the host; None where they are replayed. Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        layers: MLA | Callable[[torch.Tensor, Step], torch.Tensor],
        cache: LatentCache,
        max_requests: int,
    ) -> None:
        if not callable(layers):
            raise TypeError(f"layers must be an MLA or a function (hidden_states, step), got {type(layers).__name__}")
        if not isinstance(cache, LatentCache):
            raise TypeError(f"cache must be a LatentCache, got {type(cache).__name__}")
        if isinstance(max_requests, bool) or not isinstance(max_requests, int):
            raise TypeError(f"max_requests must be an int, got {max_requests!r}")
        if max_requests < 1:
            raise ValueError(f"max_requests must be at least 1, got {max_requests}")
        self.layers, self.cache, self.max_requests = layers, cache, max_requests
        self.sizes = tuple(sorted({1 << bits for bits in range(max_requests.bit_length())} | {max_requests}))
        self.reason = devices.graph_problem(cache.device)
        self._captured: dict[tuple, _Buffers] = {}
        self._pool = None

    @torch.no_grad()
    def __call__(self, hidden_states: torch.Tensor, step: Step) -> torch.Tensor:
        """hidden_states `[B, hidden]`, one new token of each of the step's requests -> `[B, hidden]`, new."""
        self._check(hidden_states, step)
        if self.reason is not None:
            return self.layers(hidden_states, step)
        key = (
            next(size for size in self.sizes if size >= step.num_tokens),
            1 << (step.block_table.shape[1] - 1).bit_length(),
            hidden_states.shape[1],
            hidden_states.dtype,
        )
        buffers = self._captured.get(key)
        if buffers is not None and buffers.weights != buffers.step.weights():
            self._captured.clear()  # a graph reads the old ones' memory, which may be another tensor's by now
            buffers = None
        if buffers is None:
            buffers = self._capture(*key)
            if buffers is None:
                return self.layers(hidden_states, step)
            self._captured[key] = buffers
        for layer in buffers.step.ran:
            step.check(layer)
        buffers.fill(hidden_states, step)
        buffers.graph.replay()
        for layer in buffers.step.ran:
            step.commit(layer)
        return buffers.graph.result[: step.num_tokens].clone()

    def _check(self, hidden_states: torch.Tensor, step: Step) -> None:
        if not isinstance(step, Step):
            raise TypeError(f"step must be a Step, made by LatentCache.step, got {type(step).__name__}")
        if step.cache is not self.cache:
            raise ValueError("step must be of the cache that the graph was made for, and is of another one")
        if max(step.lengths) > 1:
            raise ValueError(f"step must bring one new token of each request, got lengths {list(step.lengths)}")
        if step.num_tokens > self.max_requests:
            raise ValueError(f"step has {step.num_tokens} requests, max_requests is {self.max_requests}")
        if not isinstance(hidden_states, torch.Tensor):
            raise TypeError(f"hidden_states must be a tensor [B, hidden], got {type(hidden_states).__name__}")
        if hidden_states.dim() != 2 or hidden_states.shape[0] != step.num_tokens:
            raise ValueError(
                f"hidden_states must be [{step.num_tokens}, hidden], a row for each request of the step, "
                f"got shape {list(hidden_states.shape)}"
            )
        if hidden_states.device != self.cache.device:
            raise ValueError(
                f"hidden_states must be on the cache's device {self.cache.device}, got {hidden_states.device}"
            )

    def _capture(self, size: int, pages: int, hidden: int, dtype: torch.dtype) -> _Buffers | None:
        """Buffers with their graph; None, and the reason kept, where an op runs PyTorch."""
        with torch.inference_mode(False):  # inference tensors could not be filled outside inference mode
            buffers = _Buffers(self.cache, size, pages, hidden, dtype)
        # What compiles, and the first choice of an op, are no part of a graph. Nothing is written: no row has a slot.
        with devices.side_stream(self.cache.device), dispatch.record() as ran:
            for _ in range(2):
                buffers.run(self.layers)
        devices.synchronize(self.cache.device)
        fallback = next((choice for choice in ran.values() if choice.backend != "kernel"), None)
        if fallback is not None:
            self.reason = f"PyTorch's form of an op reads lengths on the host: {fallback}"
            return None
        buffers.graph = devices.capture(self.cache.device, lambda: buffers.run(self.layers), self._pool)
        self._pool, buffers.weights = buffers.graph.pool, buffers.step.weights()
        return buffers


class _Buffers:
    """What a graph reads, and the graph."""

    def __init__(self, cache: LatentCache, size: int, pages: int, hidden: int, dtype: torch.dtype) -> None:
        self.hidden_states = torch.zeros(size, hidden, dtype=dtype, device=cache.device)
        self.step = _StillStep(cache, size, pages)
        self.graph: devices.Captured | None = None
        self.weights: tuple = ()

    def run(self, layers: Callable[[torch.Tensor, Step], torch.Tensor]) -> torch.Tensor:
        self.step.begin()
        return layers(self.hidden_states, self.step)

    def fill(self, hidden_states: torch.Tensor, step: Step) -> None:
        """What the next replay reads; rows behind the step's have no slot and no keys."""
        used, still = step.num_tokens, self.step
        pages = step.block_table.shape[1]
        self.hidden_states[:used].copy_(hidden_states)
        still.block_table[:used, :pages].copy_(step.block_table)
        for mine, given in (
            (still.slots, step.slots), (still.seq_lens, step.seq_lens), (still.cos, step.cos), (still.sin, step.sin),
        ):  # fmt: skip
            mine[:used].copy_(given)
        if used < len(still.slots):
            still.slots[used:].fill_(-1)
            still.seq_lens[used:].zero_()


class _StillStep(Step):
    """A step of buffers that stand still; it reserves nothing, and notes the layers that have run."""

    def __init__(self, cache: LatentCache, size: int, pages: int) -> None:
        made = {"device": cache.device}
        self.cache = cache
        self.requests, self.lengths, self.past_lengths = (), (1,) * size, (0,) * size
        self.num_tokens = size
        self.slots = torch.full((size,), -1, dtype=torch.int64, **made)
        self.positions = torch.zeros(size, dtype=torch.int64, **made)
        self.block_table = torch.zeros(size, pages, dtype=torch.int32, **made)
        self.seq_lens = torch.zeros(size, dtype=torch.int32, **made)
        half = cache.cfg.qk_rope_head_dim // 2
        self.cos, self.sin = (torch.zeros(size, half, dtype=torch.float32, **made) for _ in range(2))
        self.ran: list[int] = []
        self.modules: list[MLA] = []
        self._reservation = None
        self.begin()

    def begin(self) -> None:
        """A pass over the layers begins. Its plan is its own, so that the schedule of the requests is computed in the
        graph, from the lengths of each replay."""
        self.ran.clear()
        self.modules.clear()
        tokens = slice(0, self.num_tokens)
        self._plan = Plan((AbsorbedGroup(1, tokens, self.block_table, self.seq_lens),), None, ())

    def plan(self, form: str | None = None) -> Plan:
        if form not in (None, "absorbed"):
            raise ValueError(f"form must be None or 'absorbed' in a decode graph, got {form!r}")
        return self._plan

    def weights(self) -> tuple:
        """What tells whether the layers' weights are those that were captured."""
        return tuple(module.weights_mark() for module in self.modules)

    def check(self, layer: int, module: MLA | None = None) -> None:
        if not 0 <= layer < self.cache.num_layers:
            raise ValueError(f"layer_idx {layer} is not in the cache, which has num_layers {self.cache.num_layers}")
        if layer in self.ran:
            raise ValueError(f"step was already used by layer {layer}")
        if module is not None:
            self.modules.append(module)

    def commit(self, layer: int) -> None:
        self.ran.append(layer)

    def __repr__(self) -> str:
        return f"a decode graph's step of {self.num_tokens} rows"
