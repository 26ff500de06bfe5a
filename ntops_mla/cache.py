"""LatentCache: paged storage of many requests' latents; Step: one forward pass over some of them, planned once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property

import torch

from ntops_mla.config import MLAConfig
from ntops_mla.plan import Plan, make_plan
from ntops_mla.rope_table import RopeTable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CacheFull(RuntimeError):
    """No page is left for what was asked; the cache is as it was."""


class _Request:
    """Host-side state of one request: its pages in order, its length, and how many rows each layer holds."""

    __slots__ = ("length", "pages", "reservation", "row", "rows")

    def __init__(self, row: int, num_layers: int) -> None:
        self.row = row  # of the block table
        self.pages: list[int] = []
        self.length = 0
        self.rows = [0] * num_layers
        self.reservation: _Reservation | None = None  # the newest step on it


class _Reservation:
    """What a step holds: pages not yet the requests' own, until its first layer has run; and the step's state."""

    __slots__ = ("created", "members", "pages", "stale", "used")

    def __init__(self, members: list[tuple[int, _Request]], pages: list[list[int]], created: list[int]) -> None:
        self.members = members
        self.pages = pages
        self.created = created  # requests that exist only through this step so far
        self.used = False
        self.stale: str | None = None  # why the step can be used no more


class LatentCache:
    """Paged storage of normalised latents and rotated RoPE columns, one storage per layer, one block table for all.

    Each layer's storage is contiguous `[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]`, latent first, zeroed;
    `kv_cache[l]` and `pe_cache[l]` are its two views, so that they cannot come apart. A token takes
    (kv_lora_rank + qk_rope_head_dim) * element size bytes a layer. page_size: a power of two. Raises ValueError or
    TypeError that names the argument; CacheFull where no page is left. After any error the cache is as it was.

    Source: arXiv 2309.06180, section 4 (pages); arXiv 2405.04434, section 2.1 (what is cached).
    """

    def __init__(
        self,
        cfg: MLAConfig,
        num_pages: int,
        page_size: int = 64,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(cfg, MLAConfig):
            raise TypeError(f"cfg must be an MLAConfig, got {type(cfg).__name__}")
        self.cfg = cfg
        self.num_pages = _positive("num_pages", num_pages)
        self.page_size = _positive("page_size", page_size)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        self.num_layers = _positive("num_layers", num_layers)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
        # A storage per layer: a compiled graph over layers that share one would copy all of it.
        shape = (self.num_pages, self.page_size, cfg.latent_dim)
        # Not as inference tensors, which could not be written outside inference mode.
        with torch.inference_mode(False):
            self.storage = tuple(torch.zeros(shape, device=device, dtype=self.dtype) for _ in range(self.num_layers))
        self.device = self.storage[0].device
        self.kv_cache = tuple(s[..., : cfg.kv_lora_rank] for s in self.storage)
        self.pe_cache = tuple(s[..., cfg.kv_lora_rank :] for s in self.storage)
        self._rope = RopeTable(
            cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, cfg.max_position_embeddings, self.device
        )
        self._requests: dict[int, _Request] = {}
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack: pages freed last are reused first
        # Block table of all requests on the host, a row each, grown by doubling; a step takes its rows from it.
        self._table = _host_table(16, 16)
        self._free_rows = list(range(15, -1, -1))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return self.cfg.latent_dim * self.storage[0].element_size()

    @property
    def num_free_pages(self) -> int:
        """Pages that neither a request nor an unused step holds."""
        return len(self._free)

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests that exist."""
        return tuple(self._requests)

    def length(self, request: int) -> int:
        """Tokens that `request` holds. KeyError for one that does not exist."""
        return self._known(request).length

    def flash_mla_view(self, layer: int = 0) -> torch.Tensor:
        """`[num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim]`, FlashMLA's k_cache: a view of the storage."""
        return self.storage[self._layer(layer)].unsqueeze(2)

    def step(self, requests: Sequence[int], lengths: Sequence[int]) -> Step:
        """Reserve pages for `lengths[i]` new tokens of `requests[i]` and plan the pass; no length moves yet.

        The first successful `mla(x, step)` moves the lengths. A newer step on one of its requests, or `fill`,
        `truncate`, `free` of one, makes a step stale. An unused step gives its pages back when it is stale or dropped.
        Raises CacheFull, ValueError (a request twice, lengths below 1 or past max_position_embeddings) or TypeError.
        """
        requests, lengths = self._check_step(requests, lengths)
        size = self.page_size
        known = [self._requests.get(r) for r in requests]
        pasts = [0 if record is None else record.length for record in known]
        for request, past, new in zip(requests, pasts, lengths, strict=True):
            self._check_position(request, past + new, "lengths")
        wanted = [
            -(-(past + new) // size) - (0 if record is None else len(record.pages))
            for record, past, new in zip(known, pasts, lengths, strict=True)
        ]
        # Unused steps on these requests become stale: what they hold counts as free.
        open_steps = {
            id(record.reservation): record.reservation
            for record in known
            if record is not None and record.reservation is not None and not record.reservation.used
        }
        returned = sum(len(pages) for step in open_steps.values() for pages in step.pages)
        if sum(wanted) > len(self._free) + returned:
            raise CacheFull(
                f"step needs {sum(wanted)} pages, {len(self._free) + returned} of {self.num_pages} are free "
                f"(page_size {size})"
            )
        members, created = [], []
        for request, record in zip(requests, known, strict=True):
            if record is not None:
                self._invalidate(record, f"there is a newer step on request {request}")
                record = self._requests.get(request)  # gone, if only the stale step had made it
            if record is None:
                record = self._requests[request] = _Request(self._take_row(), self.num_layers)
                created.append(request)
            members.append((request, record))
        pages = [self._take_pages(record, count) for (_, record), count in zip(members, wanted, strict=True)]
        reservation = _Reservation(members, pages, created)
        for _, record in members:
            record.reservation = reservation
        return Step(self, reservation, tuple(requests), tuple(lengths), tuple(pasts))

    @torch.no_grad()
    def fill(self, request: int, latent: torch.Tensor, pe: torch.Tensor, layer: int = 0) -> None:
        """Write a request's whole history into a layer: `latent` `[p, kv_lora_rank]` after the norm, `pe`
        `[p, qk_rope_head_dim]` after RoPE in interleaved pairs; the cache's dtype and device.

        The request has no rows in that layer yet, and p is the same in every layer. Raises CacheFull, ValueError,
        TypeError.
        """
        request = _integer("request", request)
        layer = self._layer(layer)
        record = self._requests.get(request)
        tokens = self._check_fill(record, request, latent, pe, layer)
        wanted = -(-tokens // self.page_size) - (0 if record is None else len(record.pages))
        reservation = None if record is None else record.reservation
        returned = 0 if reservation is None or reservation.used else sum(map(len, reservation.pages))
        if wanted > len(self._free) + returned:
            raise CacheFull(
                f"fill needs {wanted} pages, {len(self._free) + returned} of {self.num_pages} are free "
                f"(page_size {self.page_size})"
            )
        if record is not None:
            self._invalidate(record, f"request {request} was filled")
            record = self._requests.get(request)
        if record is None:
            record = self._requests[request] = _Request(self._take_row(), self.num_layers)
        record.pages += self._take_pages(record, wanted)
        pages = torch.tensor(record.pages, device=self.device)
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size, device=self.device)).view(-1)[:tokens]
        self.storage[layer].view(-1, self.cfg.latent_dim).index_copy_(0, slots, torch.cat([latent, pe], -1))
        record.rows[layer] = record.length = tokens

    def truncate(self, request: int, length: int) -> None:
        """Shorten a request to its first `length` tokens; pages behind them are free again."""
        record = self._known(request)
        length = _integer("length", length)
        if not 0 <= length <= record.length:
            raise ValueError(
                f"length must be between 0 and {record.length}, what request {request} holds, got {length}"
            )
        self._invalidate(record, f"request {request} was truncated")
        kept = -(-length // self.page_size)
        self._free.extend(reversed(record.pages[kept:]))
        del record.pages[kept:]
        record.length = length
        record.rows = [min(rows, length) for rows in record.rows]

    def free(self, request: int) -> None:
        """End a request; its pages are free again."""
        record = self._known(request)
        self._invalidate(record, f"request {request} was freed")
        if self._requests.pop(request, None) is not None:  # else only the stale step had made it
            self._free.extend(reversed(record.pages))
            self._free_rows.append(record.row)

    # What follows is between the cache and its steps.

    def _known(self, request: int) -> _Request:
        record = self._requests.get(_integer("request", request))
        if record is None:
            raise KeyError(f"request {request} is unknown: it exists from its first step or fill until it is freed")
        return record

    def _layer(self, layer: int) -> int:
        layer = _integer("layer", layer)
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be between 0 and {self.num_layers - 1}, the cache's layers, got {layer}")
        return layer

    def _check_step(self, requests: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
        requests = _integers("requests", requests)
        lengths = _integers("lengths", lengths)
        if not requests:
            raise ValueError("requests must name at least one request, got none")
        if len(requests) != len(lengths):
            raise ValueError(f"lengths must have one entry per request, {len(requests)}, got {len(lengths)}")
        if len(set(requests)) != len(requests):
            twice = next(r for r in requests if requests.count(r) > 1)
            raise ValueError(f"requests must be distinct, got {twice} more than once")
        if min(lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {min(lengths)}")
        return requests, lengths

    def _check_position(self, request: int, end: int, argument: str) -> None:
        if end > self.cfg.max_position_embeddings:
            raise ValueError(
                f"{argument}: request {request} would reach {end} tokens, max_position_embeddings is "
                f"{self.cfg.max_position_embeddings}"
            )

    def _check_fill(self, record, request, latent, pe, layer) -> int:
        widths = (("latent", latent, self.cfg.kv_lora_rank), ("pe", pe, self.cfg.qk_rope_head_dim))
        for name, value, width in widths:
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor [p, {width}], got {type(value).__name__}")
            if value.dim() != 2 or value.shape[1] != width:
                raise ValueError(f"{name} must be [p, {width}], got shape {list(value.shape)}")
            if value.dtype != self.dtype:
                raise TypeError(f"{name} must be of the cache's dtype {self.dtype}, got {value.dtype}")
            if value.device != self.device:
                raise ValueError(f"{name} must be on the cache's device {self.device}, got {value.device}")
        tokens = latent.shape[0]
        if tokens < 1:
            raise ValueError("latent must hold at least one token, got 0")
        if pe.shape[0] != tokens:
            raise ValueError(f"pe must have latent's {tokens} tokens, got {pe.shape[0]}")
        self._check_position(request, tokens, "latent")
        if record is not None and record.rows[layer]:
            raise ValueError(f"request {request} already holds {record.rows[layer]} rows in layer {layer}")
        if record is not None and record.length not in (0, tokens):
            raise ValueError(f"latent must have {record.length} tokens, what request {request} holds, got {tokens}")
        return tokens

    def _take_pages(self, record: _Request, count: int) -> list[int]:
        """`count` free pages, entered into the request's row of the block table behind its own."""
        if count <= 0:
            return []
        taken = [self._free.pop() for _ in range(count)]
        first = len(record.pages)
        if first + count > self._table.shape[1]:
            self._grow_table(self._table.shape[0], max(first + count, min(2 * self._table.shape[1], self.num_pages)))
        self._table[record.row, first : first + count] = torch.tensor(taken, dtype=torch.int32, device="cpu")
        return taken

    def _take_row(self) -> int:
        if not self._free_rows:
            rows = self._table.shape[0]
            self._grow_table(2 * rows, self._table.shape[1])
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        return self._free_rows.pop()

    def _grow_table(self, rows: int, columns: int) -> None:
        table = _host_table(rows, columns)
        table[: self._table.shape[0], : self._table.shape[1]] = self._table
        self._table = table

    def _invalidate(self, record: _Request, why: str) -> None:
        if record.reservation is not None:
            self._release(record.reservation, why)

    def _release(self, reservation: _Reservation, why: str) -> None:
        """Make a step stale; an unused one leaves no trace."""
        if reservation.stale is not None:
            return
        reservation.stale = why
        for _, record in reservation.members:
            if record.reservation is reservation:
                record.reservation = None
        if reservation.used:
            return
        for pages in reversed(reservation.pages):
            self._free.extend(reversed(pages))
        for request in reservation.created:
            self._free_rows.append(self._requests.pop(request).row)

    def _commit(self, reservation: _Reservation, lengths: tuple[int, ...], layer: int) -> None:
        """A layer has run: its rows are there; the first one moves the lengths and takes the pages over."""
        for (_, record), pages, new in zip(reservation.members, reservation.pages, lengths, strict=True):
            if not reservation.used:
                record.pages += pages
                record.length += new
            record.rows[layer] = record.length
        reservation.used = True


class Step:
    """One pass over some requests: made by `LatentCache.step`, used once by every layer.

    requests, lengths, past_lengths: tuples, one entry per request. num_tokens: T = sum(lengths). Tensors on the cache's
    device: positions int64 `[T]`; slots int64 `[T]`, page * page_size + offset; block_table int32 `[B, max_pages]` and
    seq_lens int32 `[B]` with the new tokens (FlashMLA's arguments); cu_seqlens int32 `[B + 1]`; cos, sin float32
    `[T, qk_rope_head_dim / 2]`.
    """

    def __init__(
        self,
        cache: LatentCache,
        reservation: _Reservation,
        requests: tuple[int, ...],
        lengths: tuple[int, ...],
        past_lengths: tuple[int, ...],
    ) -> None:
        self.cache = cache
        self.requests = requests
        self.lengths = lengths
        self.past_lengths = past_lengths
        self.num_tokens = sum(lengths)
        self._reservation = reservation
        self._layers_run: set[int] = set()
        self._plans: dict[str | None, Plan] = {}
        ends = [past + new for past, new in zip(past_lengths, lengths, strict=True)]
        size, device = cache.page_size, cache.device
        rows = torch.tensor([record.row for _, record in reservation.members], device="cpu")
        table = cache._table.index_select(0, rows)[:, : -(-max(ends) // size)].contiguous()
        self.block_table = table.to(device)
        if self.num_tokens == len(lengths):  # a decode step: one token each, no expansion by request
            meta = torch.tensor([past_lengths, ends], device="cpu").to(device)
            self.positions = meta[0]
            page = self.block_table.gather(1, (self.positions // size)[:, None])[:, 0].long()
        else:
            meta = torch.tensor([past_lengths, ends, lengths], device="cpu").to(device)
            request = torch.arange(len(lengths), device=device).repeat_interleave(meta[2], output_size=self.num_tokens)
            # A token's position: its index in the pack, less its request's first index, plus the past.
            shift = meta[0] - meta[2].cumsum(0) + meta[2]
            self.positions = torch.arange(self.num_tokens, device=device) + shift[request]
            page = self.block_table[request, self.positions // size].long()
        # int64 before the product: a large cache has more slots than int32 counts.
        self.slots = page * size + self.positions % size
        self.seq_lens = meta[1].to(torch.int32)
        self.cos, self.sin = cache._rope.rows(self.positions, max(ends))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 `[B + 1]`: where each request's tokens begin in the pack, and T."""
        bounds = [0]
        for length in self.lengths:
            bounds.append(bounds[-1] + length)
        return torch.tensor(bounds, dtype=torch.int32, device="cpu").to(self.cache.device)

    def plan(self, form: str | None = None) -> Plan:
        """Which tokens run absorbed and which expanded; made once per step and form, shared by all layers."""
        plan = self._plans.get(form)
        if plan is None:
            plan = self._plans[form] = make_plan(self, form)
        return plan

    def check(self, layer: int) -> None:
        """Raise ValueError unless `layer` may use this step now."""
        if self._reservation.stale is not None:
            raise ValueError(f"step is stale: {self._reservation.stale}")
        if not 0 <= layer < self.cache.num_layers:
            raise ValueError(f"layer_idx {layer} is not in the cache, which has num_layers {self.cache.num_layers}")
        if layer in self._layers_run:
            raise ValueError(f"step was already used by layer {layer}")
        for (request, record), past in zip(self._reservation.members, self.past_lengths, strict=True):
            if record.rows[layer] != past:
                raise ValueError(
                    f"layer {layer} holds {record.rows[layer]} rows of request {request}, the step starts at {past}: "
                    "fill that layer or run it in every step"
                )

    def commit(self, layer: int) -> None:
        """`layer` has written its rows: the first one moves the requests' lengths."""
        self.cache._commit(self._reservation, self.lengths, layer)
        self._layers_run.add(layer)

    def __del__(self) -> None:
        reservation = getattr(self, "_reservation", None)
        if reservation is not None and not reservation.used:
            self.cache._release(reservation, "the step was dropped")

    def __repr__(self) -> str:
        return f"Step({len(self.requests)} requests, {self.num_tokens} tokens)"


def _host_table(rows: int, columns: int) -> torch.Tensor:
    # On the host whatever the default device is, and writable outside the inference mode that it may be made in.
    with torch.inference_mode(False):
        return torch.zeros(rows, columns, dtype=torch.int32, device="cpu")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def _positive(name: str, value: object) -> int:
    value = _integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _integers(name: str, values: object) -> list[int]:
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of ints, got {values!r}") from None
    return [_integer(name, value) for value in values]
