"""LatentCache: paged storage of many requests' latents; Step: one forward pass over some of them, planned once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property

import torch

from ntops_mla import ops
from ntops_mla.config import MLAConfig
from ntops_mla.ops import _fp8
from ntops_mla.plan import Plan, check_form, make_plan
from ntops_mla.rope_table import RopeTable

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KV_FORMATS = (None, "fp8")


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

    def released(self) -> list[int]:
        """The pages in the order in which they go back, so that the first ones taken are the first to be reused."""
        return [page for pages in reversed(self.pages) for page in reversed(pages)]


class LatentCache:
    """Paged storage of normalised latents and rotated RoPE columns, one storage per layer, one block table for all.

    Each layer's storage is contiguous `[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]`, latent first, zeroed;
    `kv_cache[l]` and `pe_cache[l]` are its two views, so that they cannot come apart. A token takes
    (kv_lora_rank + qk_rope_head_dim) * element size bytes a layer. page_size: a power of two. dtype: of the hidden
    states. Raises ValueError or TypeError that names the argument; CacheFull where no page is left. After any error the
    cache is as it was.

    kv_format: None, rows of `dtype`; "fp8", FlashMLA's quantised rows of 656 bytes whatever the dtype, for kv_lora_rank
    512 and qk_rope_head_dim 64. Each layer's storage is then uint8 `[num_pages, page_size, 656]`: 512 codes
    (float8_e4m3fn), four float32 scales, 64 RoPE columns in bfloat16. There is no `kv_cache` and no `pe_cache`, because
    no view of the bytes is a latent: `rows` reads them. What is written is rounded to bfloat16 and then quantised.

    Source: arXiv 2309.06180, section 4 (pages); arXiv 2405.04434, section 2.1 (what is cached); deepseek-ai/FlashMLA,
    README.md (fp8).
    """

    def __init__(
        self,
        cfg: MLAConfig,
        num_pages: int,
        page_size: int = 64,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kv_format: str | None = None,
    ) -> None:
        if not isinstance(cfg, MLAConfig):
            raise TypeError(f"cfg must be an MLAConfig, got {type(cfg).__name__}")
        self.cfg = cfg
        self.kv_format = _checked_format(kv_format, cfg)
        self.num_pages = _positive("num_pages", num_pages)
        self.page_size = _positive("page_size", page_size)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {page_size}")
        self.num_layers = _positive("num_layers", num_layers)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        check_dtype(self.dtype)
        check_device(device)
        # A storage per layer: a compiled graph over layers that share one would copy all of it.
        width, stored = (cfg.latent_dim, self.dtype) if kv_format is None else (_fp8.TOKEN_BYTES, torch.uint8)
        shape = (self.num_pages, self.page_size, width)
        # Not as inference tensors, which could not be written outside inference mode.
        with torch.inference_mode(False):
            self.storage = tuple(torch.zeros(shape, device=device, dtype=stored) for _ in range(self.num_layers))
        self.device = self.storage[0].device
        if kv_format is None:
            self._kv_cache = tuple(s[..., : cfg.kv_lora_rank] for s in self.storage)
            self._pe_cache = tuple(s[..., cfg.kv_lora_rank :] for s in self.storage)
        self._rope = RopeTable(
            cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, cfg.max_position_embeddings, self.device
        )
        self._requests: dict[int, _Request] = {}
        self._free = list(range(self.num_pages - 1, -1, -1))  # a stack: pages freed last are reused first
        # Block table of all requests on the host, a row each, grown by doubling; a step takes its rows from it.
        self._table = _host_table(16, 16)
        self._free_rows = list(range(15, -1, -1))

    @property
    def kv_cache(self) -> tuple[torch.Tensor, ...]:
        """Of each layer `[num_pages, page_size, kv_lora_rank]`, the normalised latents: views of the storage."""
        self._must_be_plain("kv_cache")
        return self._kv_cache

    @property
    def pe_cache(self) -> tuple[torch.Tensor, ...]:
        """Of each layer `[num_pages, page_size, qk_rope_head_dim]`, after RoPE, in pairs: views of the storage."""
        self._must_be_plain("pe_cache")
        return self._pe_cache

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer."""
        return self.storage[0].shape[2] * self.storage[0].element_size()

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
        """FlashMLA's k_cache, a view of the storage: `[num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim]`; with
        kv_format "fp8" float8_e4m3fn `[num_pages, page_size, 1, 656]`, for is_fp8_kvcache=True.
        """
        storage = self.storage[self._layer(layer)].unsqueeze(2)
        return storage if self.kv_format is None else storage.view(torch.float8_e4m3fn)

    def rows(self, slots: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """`[n, kv_lora_rank + qk_rope_head_dim]` of the cache's dtype, new: what int64 slots `[n]` (page * page_size +
        offset) of a layer hold, latent first; quantised ones dequantised.
        """
        storage = self.storage[self._layer(layer)]
        if self.kv_format is None:
            return storage.view(-1, self.cfg.latent_dim).index_select(0, slots)
        return ops.latent_dequantize(storage, slots, self.dtype)

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
        open_steps = _open_steps(known)
        chosen = self._choose_pages("step", wanted, open_steps)
        # All that can fail comes before the first change: an error leaves older steps on these requests as they are.
        self._make_room(
            max(past + new for past, new in zip(pasts, lengths, strict=True)),
            sum(record is None for record in known) + sum(len(step.created) for step in open_steps),
        )
        entries = [torch.tensor(taken, dtype=torch.int32, device="cpu") if taken else None for taken in chosen]
        step = Step(self, tuple(requests), tuple(lengths), tuple(pasts), known, entries)
        members, created = [], []
        for request, record in zip(requests, known, strict=True):
            if record is not None:
                self._invalidate(record, f"there is a newer step on request {request}")
                record = self._requests.get(request)  # gone, if only the stale step had made it
            if record is None:
                record = self._requests[request] = _Request(self._free_rows.pop(), self.num_layers)
                created.append(request)
            members.append((request, record))
        for (_, record), taken, entry in zip(members, chosen, entries, strict=True):
            self._take_pages(record, taken, entry)
        step._reservation = reservation = _Reservation(members, chosen, created)
        for _, record in members:
            record.reservation = reservation
        return step

    @torch.no_grad()
    def fill(self, request: int, latent: torch.Tensor, pe: torch.Tensor, layer: int = 0) -> None:
        """Write a request's whole history into a layer: `latent` `[p, kv_lora_rank]` after the norm, `pe`
        `[p, qk_rope_head_dim]` after RoPE in interleaved pairs; the cache's dtype and device, and quantised where the
        cache is.

        The request has no rows in that layer yet, and p is the same in every layer. Raises CacheFull, ValueError,
        TypeError.
        """
        request = _integer("request", request)
        layer = self._layer(layer)
        record = self._requests.get(request)
        tokens = self._check_fill(record, request, latent, pe, layer)
        own = [] if record is None else record.pages
        open_steps = _open_steps([record])
        (chosen,) = self._choose_pages("fill", [-(-tokens // self.page_size) - len(own)], open_steps)
        # As in step: what can fail first. The rows go into free pages, or into this request's where the layer has none.
        self._make_room(tokens, 1 if record is None else sum(len(step.created) for step in open_steps))
        entry = torch.tensor(chosen, dtype=torch.int32, device="cpu")
        pages = torch.tensor(own + chosen, device="cpu").to(self.device)
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size, device=self.device)).view(-1)[:tokens]
        self._write(layer, slots, latent, pe)
        if record is not None:
            self._invalidate(record, f"request {request} was filled")
            record = self._requests.get(request)
        if record is None:
            record = self._requests[request] = _Request(self._free_rows.pop(), self.num_layers)
        self._take_pages(record, chosen, entry)
        record.pages += chosen
        record.rows[layer] = record.length = tokens

    def truncate(self, request: int, length: int) -> None:
        """Shorten a request to its first `length` tokens; pages behind them are free again.

        It ends an unused step on the request. One that exists only through that step (its length is 0) ends with it:
        after `truncate(request, 0)` it is unknown.
        """
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

    def _must_be_plain(self, name: str) -> None:
        if self.kv_format is not None:
            raise AttributeError(
                f"{name}: a cache of kv_format {self.kv_format!r} has no rows to view; rows(slots, layer) reads them, "
                "storage[layer] and flash_mla_view(layer) are the bytes"
            )

    def _write(self, layer: int, slots: torch.Tensor, latent: torch.Tensor, pe: torch.Tensor) -> None:
        storage = self.storage[layer]
        if self.kv_format is None:
            storage.view(-1, self.cfg.latent_dim).index_copy_(0, slots, torch.cat([latent, pe], -1))
        else:  # from bfloat16, as latent_append_fp8 does it: a history has the same bytes either way
            ops.latent_quantize(latent.bfloat16(), pe.bfloat16(), slots, storage)

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
            if value.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor of layout torch.strided, got {value.layout}")
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

    def _choose_pages(self, what: str, wanted: list[int], open_steps: list[_Reservation]) -> list[list[int]]:
        """Which pages `wanted[i]` are, none taken yet; what unused steps hold counts as free. Raises CacheFull."""
        total = sum(wanted)
        returned = [page for step in open_steps for page in step.released()]
        if total > len(self._free) + len(returned):
            raise CacheFull(
                f"{what} needs {total} pages, {len(self._free) + len(returned)} of {self.num_pages} are free "
                f"(page_size {self.page_size})"
            )
        # The end of the stack of free pages as it will be once those steps are stale.
        stack = (self._free[-total:] + returned)[-total:] if total else []
        return [[stack.pop() for _ in range(count)] for count in wanted]

    def _take_pages(self, record: _Request, pages: list[int], entry: torch.Tensor | None) -> None:
        """Take what `_choose_pages` chose off the free ones and enter it behind the record's own in the block table."""
        if pages:
            del self._free[-len(pages) :]
            first = len(record.pages)
            self._table[record.row, first : first + len(pages)] = entry

    def _make_room(self, length: int, requests: int) -> None:
        """Room in the block table for a request of `length` tokens, and for `requests` more."""
        rows, columns = self._table.shape
        needed = -(-length // self.page_size)
        if needed > columns:
            columns = max(needed, min(2 * columns, self.num_pages))
        while rows - self._table.shape[0] + len(self._free_rows) < requests:
            rows *= 2
        if (rows, columns) != tuple(self._table.shape):
            self._grow_table(rows, columns)

    def _grow_table(self, rows: int, columns: int) -> None:
        table, held = _host_table(rows, columns), self._table.shape[0]
        table[:held, : self._table.shape[1]] = self._table
        self._table = table
        self._free_rows[:0] = range(rows - 1, held - 1, -1)

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
        self._free.extend(reservation.released())
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
        requests: tuple[int, ...],
        lengths: tuple[int, ...],
        past_lengths: tuple[int, ...],
        records: list[_Request | None],
        entries: list[torch.Tensor | None],
    ) -> None:
        """records: the requests as they are; entries: the pages that each is to have besides its own."""
        self.cache = cache
        self.requests = requests
        self.lengths = lengths
        self.past_lengths = past_lengths
        self.num_tokens = sum(lengths)
        self._reservation: _Reservation | None = None  # until the cache has made it
        self._layers_run: set[int] = set()
        self._plans: dict[str | None, Plan] = {}
        ends = [past + new for past, new in zip(past_lengths, lengths, strict=True)]
        size, device = cache.page_size, cache.device
        # A request without pages of its own takes any row: nothing of it is read.
        rows = torch.tensor([0 if record is None else record.row for record in records], device="cpu")
        table = cache._table[:, : -(-max(ends) // size)].index_select(0, rows)
        for index, (record, entry) in enumerate(zip(records, entries, strict=True)):
            if entry is not None:
                first = 0 if record is None else len(record.pages)
                table[index, first : first + len(entry)] = entry
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
        check_form(form)
        plan = self._plans.get(form)
        if plan is None:
            plan = self._plans[form] = make_plan(self, form)
        return plan

    def check(self, layer: int, module: torch.nn.Module | None = None) -> None:
        """Raise ValueError unless `layer` may use this step now; `module` is the one that asks."""
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


def _checked_format(kv_format: object, cfg: MLAConfig) -> str | None:
    allowed = " or ".join(map(repr, KV_FORMATS))
    if kv_format is not None and not isinstance(kv_format, str):
        raise TypeError(f"kv_format must be {allowed}, got {kv_format!r}")
    if kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format must be {allowed}, got {kv_format!r}")
    if kv_format == "fp8" and (cfg.kv_lora_rank, cfg.qk_rope_head_dim) != (_fp8.LATENT, _fp8.ROPE):
        raise ValueError(
            f"kv_format 'fp8' is for kv_lora_rank {_fp8.LATENT} and qk_rope_head_dim {_fp8.ROPE}, "
            f"got a cfg of {cfg.kv_lora_rank} and {cfg.qk_rope_head_dim}"
        )
    return kv_format


def check_dtype(dtype: object) -> None:
    """Raise TypeError unless `dtype` is one that the library computes in."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def check_device(device: object) -> None:
    """Raise ValueError unless `device` is None or names a device that torch knows."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device or its name, got {device!r}: {error}") from error


def _open_steps(records: Sequence[_Request | None]) -> list[_Reservation]:
    """The unused steps on these requests, in the order in which a newer step ends them."""
    steps = {id(r.reservation): r.reservation for r in records if r is not None and r.reservation is not None}
    return [step for step in steps.values() if not step.used]


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
