"""flash_mla_with_kvcache: FlashMLA's decode, dense and sparse, over caches of q's dtype and in fp8."""

from __future__ import annotations

import torch

from ntops_mla import dispatch, ops
from ntops_mla.devices import capturing
from ntops_mla.flash_mla import _arguments, metadata
from ntops_mla.flash_mla.metadata import FlashMLASchedMeta
from ntops_mla.flash_mla.sparse import infinite, with_sink
from ntops_mla.ops import _check, _inspect
from ntops_mla.ops._attention import merge


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over each request's paged latents, whose first head_dim_v columns are the value.

    s[j] = softmax_scale q . k[j];  out = softmax(s) k[:, :head_dim_v];  lse = log sum exp(s);  with attn_sink: out
    exp(lse) / (exp(lse) + exp(attn_sink))

    q: `[B, s_q, H, 576]`. k_cache: `[pages, page_size, 1, 576]` of q's dtype, or with is_fp8_kvcache `[pages,
    page_size, 1, 656]` of float8_e4m3fn, uint8 or int8: a token's 512 e4m3 codes, four float32 scales, 64 bfloat16
    columns. head_dim_v: 512 (q and k_cache of 288 columns and 256 work too, not in fp8; other widths in PyTorch). Any
    strides. tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned; one pair serves all calls of one
    batch size, s_q, H, page size, causal, format and topk, and lengths may change between them. softmax_scale: None, 1
    / sqrt(576).

    Dense, without indices: page_size is a power of two. block_table: int32 `[B, max_pages]`; entries past a request's
    pages and slots past its length are never read. cache_seqlens: int32 `[B]`, with the new tokens. causal: row i of
    s_q sees the first cache_seqlens - s_q + 1 + i keys, otherwise all of them.

    Sparse, with indices: int32 `[B, s_q, topk]`, page * page_size + offset of each key (any page_size), -1 and whatever
    lies outside the cache: no key, and nothing is read. block_table and cache_seqlens are not looked at and may be
    None; causal is False. topk_length: int32 `[B]`, only as many of the first indices count. extra_k_cache,
    extra_indices_in_kvcache `[B, s_q, extra_topk]`, extra_topk_length `[B]`: further keys, likewise. attn_sink: float32
    `[H]`, -inf without effect, +inf makes out 0; lse is without it.

    Returns out `[B, s_q, H, 512]` of q's dtype (bfloat16, float16, float32; float64 by PyTorch) and lse float32 `[B, H,
    s_q]`, natural logarithm; neither ever requires grad. A row that sees no key: out 0, lse +inf. Nothing waits for the
    device, unless PyTorch runs in the place of a dense kernel and reads the lengths, or under NTOPS_MLA_CHECK=1, where
    block table, lengths and indices are looked at first. Raises TypeError or ValueError that names
    the argument, NotImplementedError for FlashMLA's other layout (512 columns, 584 bytes). Source:
    deepseek-ai/FlashMLA, flash_mla_interface.py and tests/ref.py.
    """
    op = "flash_mla_with_kvcache"
    _check.tensor(op, "q", q, "[B, s_q, H, 576]", 4)
    _check.dtype(op, "q", q)
    _check.flag(op, "is_fp8_kvcache", is_fp8_kvcache)
    _check.flag(op, "causal", causal)
    _arguments.columns(op, q, "head_dim_v", head_dim_v, fp8=is_fp8_kvcache)
    cache = _arguments.cache(op, "k_cache", k_cache, q, is_fp8_kvcache)
    sparse_only = {
        "attn_sink": attn_sink,
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length,
        "extra_topk_length": extra_topk_length,
    }
    if indices is None:
        extra = _check_dense(op, q, k_cache, block_table, cache_seqlens, sparse_only)
    else:
        extra = _check_sparse(op, q, indices, causal, is_fp8_kvcache, **sparse_only)
    scale = _arguments.scale(op, softmax_scale, q)
    config = FlashMLASchedMeta.Config(
        *q.shape[:3],
        *k_cache.shape[1:3],
        bool(causal),
        bool(is_fp8_kvcache),
        None if indices is None else indices.shape[2],
        None if extra is None else extra.shape[1],
        None if extra is None else extra_indices_in_kvcache.shape[2],
    )
    metadata.check(op, tile_scheduler_metadata, num_splits, config)
    latent, made = head_dim_v, (None, None)
    with torch.no_grad():
        if indices is None:
            rows, keys = config.s_q * config.h_q, block_table.shape[1] * config.page_block_size
            made = metadata.schedule(tile_scheduler_metadata, cache_seqlens, rows, keys)
            out, lse = _dense(op, q, cache, latent, block_table, cache_seqlens, scale, config, made[0])
        else:
            out, lse = _sparse(op, q, cache, latent, ("indices", indices), topk_length, scale, config)
            if extra is not None:
                given = "extra_indices_in_kvcache", extra_indices_in_kvcache
                more = _sparse(op, q, extra, latent, given, extra_topk_length, scale, config)
                wide = torch.promote_types(out.dtype, torch.float32)
                out, lse = merge(out.to(wide), lse, more[0].to(wide), more[1])
            out, lse = with_sink(out, lse, attn_sink).to(q.dtype), lse.transpose(1, 2)
        lse = infinite(lse)
    # Only what has run counts as used: a failed call leaves its metadata as it was.
    metadata.keep(tile_scheduler_metadata, config, made)
    return out, lse


def _dense(op, q, cache, latent, block_table, cache_seqlens, scale, config, schedule):
    """out `[B, s_q, H, C]`, lse `[B, H, s_q]`."""
    run, caches = (ops.mla_decode_fp8, (cache,)) if config.is_fp8_kvcache else (ops.mla_decode, _halves(cache, latent))
    try:
        requests = block_table, cache_seqlens, scale, config.causal
        return run(*_halves(q, latent), *caches, *requests, schedule=schedule)
    except ValueError as error:
        names = {"seq_lens": "cache_seqlens", "schedule ": "tile_scheduler_metadata "}
        raise _arguments.renamed(error, run.__name__, op, names) from error


def _sparse(op, q, cache, latent, indices, topk_length, scale, config):
    """out `[B, s_q, H, C]`, lse `[B, s_q, H]`."""
    name, value = indices
    counts = None if topk_length is None else topk_length[:, None].expand(value.shape[:2])
    # Here, because the op takes indices that lie nowhere, as sparse prefill does. A traced call has no values yet.
    if not torch.compiler.is_compiling() and dispatch.settings().check and not capturing(value.device):
        _inspect.indices(op, name, value, cache.shape[0] * cache.shape[1], counts)
    run, caches = (ops.mla_sparse_fp8, (cache,)) if config.is_fp8_kvcache else (ops.mla_sparse, _halves(cache, latent))
    out, lse, _ = run(*_halves(q, latent), *caches, value, scale, counts)
    return out, lse


def _halves(x, latent):
    return x[..., :latent], x[..., latent:]


def _check_dense(op, q, k_cache, block_table, cache_seqlens, sparse_only):
    _check.page_size(op, "k_cache", k_cache.shape[1])
    for name, value, shape, dims in (
        ("block_table", block_table, "[B, max_pages]", 2),
        ("cache_seqlens", cache_seqlens, "[B]", 1),
    ):
        if value is None:
            raise TypeError(f"{op}: {name} must be an int32 tensor {shape}; None is for sparse attention only")
        _check.tensor(op, name, value, shape, dims)
        _check.dtype(op, name, value, (torch.int32,))
        _check.size(op, name, value, 0, q.shape[0], shape)
        _check.same_device(op, "q", q, (name, value))
    for name, value in sparse_only.items():
        if value is not None:
            raise ValueError(f"{op}: {name} must be None in dense attention: it goes with indices")


def _check_sparse(
    op, q, indices, causal, fp8, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
):
    """The extra cache, as `_arguments.cache` gives it, or None."""
    if causal:
        raise ValueError(f"{op}: causal must be False with indices, which name the keys that a row sees")
    shape, text = q.shape[:2], "[B, s_q, topk]"
    _arguments.indices(op, q, ("indices", indices), ("topk_length", topk_length), shape, text)
    _arguments.sink(op, q, q.shape[2], attn_sink)
    given = ("extra_indices_in_kvcache", extra_indices_in_kvcache), ("extra_topk_length", extra_topk_length)
    if extra_k_cache is not None:
        _arguments.indices(op, q, *given, shape, text)
        return _arguments.cache(op, "extra_k_cache", extra_k_cache, q, fp8)
    for name, value in given:
        if value is not None:
            raise ValueError(f"{op}: {name} must be None without extra_k_cache")
    return None
