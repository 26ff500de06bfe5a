"""`from ntops_mla import flash_mla` in the place of `import flash_mla`: FlashMLA's dense cases, its forms, refusals."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_mla_cases as cases
import ntops_mla
from flash_mla_cases import CASES, PREFILL_CASES, Case, PrefillCase, tenth
from ntops_mla import flash_mla
from ntops_mla.testing import Tolerance, assert_close

HALF = (torch.bfloat16, torch.float16)
# As the other tests have them: what float32 sums in another order, and PyTorch's own float64, may differ by.
SINGLE, SINGLE_LSE = Tolerance(2e-6, 2e-5, 1e-9), Tolerance(2e-6, 2e-6)


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", str(value))


def run_decode(case, inputs, **options):
    meta, num_splits = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(*inputs, cases.LATENT, meta, num_splits, causal=case.causal, **options)


def run_prefill(case, inputs):
    return flash_mla.flash_attn_varlen_func(
        *inputs, softmax_scale=case.softmax_scale, causal=case.causal, is_varlen=case.varlen
    )


# FlashMLA's cases


def check_decode(case, dtype):
    inputs = cases.make_inputs(case, dtype=dtype)
    out, lse = run_decode(case, inputs)
    assert out.dtype == dtype
    cases.check(case, out, lse, cases.reference(case, inputs))


def cut(case):
    """With fewer requests where all would take seconds: the marker `full` has them as they are."""
    return case._replace(batch=min(case.batch, case.batch * 20_000_000 // case.work))


# float16 for every second of them
@pytest.mark.parametrize("case, dtype", [(cut(case), HALF[i % 2]) for i, case in enumerate(tenth(CASES))], ids=name_of)
def test_a_tenth_of_flash_mlas_decode_cases(case, dtype):
    check_decode(case, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_of_flash_mlas_decode_cases(case, dtype):
    check_decode(case, dtype)


def test_the_tenth_meets_every_value_of_every_parameter():
    chosen = tenth(CASES)
    assert len(CASES) == 1022 and len(chosen) == 102
    for field in Case._fields:
        assert {getattr(case, field) for case in chosen} == {getattr(case, field) for case in CASES}, field
    assert len({case.name for case in CASES}) == len(CASES)


def check_prefill(case, dtype):
    inputs = cases.make_prefill_inputs(case, dtype=dtype)
    out, lse = run_prefill(case, inputs)
    assert out.dtype == dtype
    cases.check_prefill(case, out, lse, cases.prefill_reference(case, inputs))


# The same with a 32nd of the tokens and a quarter of the heads, for every run.
@pytest.mark.parametrize(
    "case",
    [
        case._replace(s_q=case.s_q // 32, s_k=case.s_k // 32, heads=case.heads // 4, kv_heads=-(-case.kv_heads // 4))
        for case in PREFILL_CASES
    ],
    ids=name_of,
)
def test_flash_mlas_prefill_cases_made_small(case):
    check_prefill(case, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("case", PREFILL_CASES, ids=name_of)
def test_flash_mlas_prefill_cases(case):
    check_prefill(case, torch.bfloat16)


# Inputs of float32 pass all of it, rows of few keys too: what FlashMLA's tolerance says of lse can be met.


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 1, 20, 3, True, True),
        Case(64, 2, 20, 9, True, True),
        Case(64, 4, 140, 1, True, True),
        Case(128, 2, 140, 3, True, False, empty=True),
        Case(128, 2, 140, 3, True, True, empty=True),
        # a length below s_q: the first rows see nothing
        Case(4, 8, 5, 3, False, True),
        Case(4, 8, 5, 3, False, False),
    ],
    ids=name_of,
)
def test_decode_of_float32(case):
    inputs = cases.make_inputs(case, dtype=torch.float32)
    out, lse = run_decode(case, inputs)
    expected = cases.reference(case, inputs)
    cases.check(case, out, lse, expected)
    assert_close(out, expected.out, SINGLE, "out")
    assert_close(lse, expected.lse, SINGLE_LSE, "lse")


@pytest.mark.parametrize("page_size", [1, 2, 16, 32, 128, 256])
@pytest.mark.parametrize("s_q", [1, 3])
def test_other_page_sizes(page_size, s_q):
    case = Case(6, s_q, 140, 5, True, True, page_size=page_size)
    inputs = cases.make_inputs(case)
    assert inputs.k_cache.shape[1] == page_size
    out, lse = run_decode(case, inputs)
    cases.check(case, out, lse, cases.reference(case, inputs))


def test_rows_without_keys_are_0_and_inf():
    case = Case(3, 4, 1, 2, False, True)
    inputs = cases.make_inputs(case, dtype=torch.float32)
    inputs.cache_seqlens.copy_(torch.tensor([0, 1, 0]))
    out, lse = run_decode(case, inputs)
    infinite = torch.ones(3, 2, 4, dtype=torch.bool)
    infinite[1, :, 3] = False
    assert torch.equal(lse == float("inf"), infinite) and not lse.isnan().any()
    assert torch.equal(out.transpose(1, 2)[infinite], torch.zeros(int(infinite.sum()), 512))
    # The one row with a key: its value as it is, its score as lse.
    latent = inputs.k_cache[inputs.block_table[1, 0].long(), 0, 0]
    assert_close(out[1, 3], latent[None, :512].expand(2, -1), SINGLE)
    assert_close(lse[1, :, 3], inputs.q[1, 3].double() @ latent.double() * 576**-0.5, SINGLE_LSE)
    # Not causal, all rows of the request see it.
    _, lse = run_decode(case._replace(causal=False), inputs)
    assert (lse[1] < 1).all() and (lse[0] == float("inf")).all()


def test_no_requests_and_no_tokens():
    for batch, s_q in ((0, 1), (2, 0)):
        case = Case(batch, s_q, 0, 3, False, False)
        q = torch.zeros(batch, s_q, 3, 576)
        table, lengths = torch.zeros(batch, 1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        out, lse = run_decode(case, (q, torch.zeros(1, 64, 1, 576), table, lengths))
        assert out.shape == (batch, s_q, 3, 512) and lse.shape == (batch, 3, s_q)


def test_the_scale():
    case = Case(2, 1, 20, 3, False, True)
    inputs = cases.make_inputs(case, dtype=torch.float64)
    halved = inputs._replace(q=inputs.q / 2)
    assert_close(run_decode(case, inputs)[0], run_decode(case, inputs, softmax_scale=576**-0.5)[0], SINGLE)
    assert_close(run_decode(case, inputs)[0], run_decode(case, halved, softmax_scale=2 * 576**-0.5)[0], SINGLE)
    assert not torch.equal(run_decode(case, inputs)[1], run_decode(case, inputs, softmax_scale=1.0)[1])


def test_smaller_latents():
    """256 + 32 columns, the other size of the op."""
    q, k_cache = torch.randn(2, 1, 3, 288), torch.randn(2, 16, 1, 288)
    table, lengths = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([3, 16], dtype=torch.int32)
    out, lse = flash_mla.flash_mla_with_kvcache(q, k_cache, table, lengths, 256, *flash_mla.get_mla_metadata())
    for i, (page, length) in enumerate([(1, 3), (0, 16)]):
        kv = k_cache[page, :length, 0].double()
        scores = q[i, 0].double() @ kv.T * 288**-0.5
        assert_close(lse[i, :, 0], scores.logsumexp(-1), SINGLE_LSE)
        assert_close(out[i, 0], scores.softmax(-1) @ kv[:, :256], Tolerance(1e-5, 1e-4))


def test_the_librarys_own_cache():
    cfg = ntops_mla.MLAConfig(
        hidden_size=64, num_heads=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64,
        v_head_dim=16,
    )  # fmt: skip
    cache = ntops_mla.LatentCache(cfg, num_pages=4, page_size=32, dtype=torch.float32)
    rows = torch.randn(40, 576) / 10
    cache.fill(5, rows[:, :512], rows[:, 512:])
    step = cache.step([5], [1])
    q = torch.randn(1, 1, 2, 576) / 10
    # The step's own token is not there yet: the 40 before it.
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, cache.flash_mla_view(0), step.block_table, step.seq_lens - 1, 512, *flash_mla.get_mla_metadata()
    )
    scores = q[0, 0].double() @ rows.double().T * 576**-0.5
    assert_close(lse[0, :, 0], scores.logsumexp(-1), SINGLE_LSE)
    assert_close(out[0, 0], scores.softmax(-1) @ rows[:, :512].double(), SINGLE)


# The two forms and what they pass along


OLD_FORMS = {
    "first release": lambda lengths: flash_mla.get_mla_metadata(lengths, 2 * 3 // 1, 1),
    "first release, by name": lambda lengths: flash_mla.get_mla_metadata(
        cache_seqlens=lengths, num_heads_per_head_k=6, num_heads_k=1
    ),
    "2025-09": lambda lengths: flash_mla.get_mla_metadata(lengths, 6, 1, 3, False, None),
    "2025-09, by name": lambda lengths: flash_mla.get_mla_metadata(
        lengths, num_q_tokens_per_head_k=6, num_heads_k=1, num_heads_q=3, is_fp8_kvcache=False
    ),
}


@pytest.mark.parametrize("make", OLD_FORMS.values(), ids=OLD_FORMS)
def test_the_old_positional_form(make):
    case = Case(3, 2, 70, 3, True, True)
    q, k_cache, table, lengths = cases.make_inputs(case)
    metadata, num_splits = make(lengths)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, table, lengths, 512, metadata, num_splits, 576**-0.5, case.causal
    )
    new_out, new_lse = run_decode(case, (q, k_cache, table, lengths))
    assert torch.equal(out, new_out) and torch.equal(lse, new_lse)


def test_by_keyword():
    case = Case(3, 2, 70, 3, True, True)
    q, k_cache, table, lengths = cases.make_inputs(case)
    metadata, num_splits = flash_mla.get_mla_metadata()
    out, _ = flash_mla.flash_mla_with_kvcache(
        q=q, k_cache=k_cache, block_table=table, cache_seqlens=lengths, head_dim_v=512,
        tile_scheduler_metadata=metadata, num_splits=num_splits, softmax_scale=None, causal=True, is_fp8_kvcache=False,
        indices=None, attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None,
        extra_topk_length=None,
    )  # fmt: skip
    assert torch.equal(out, run_decode(case, (q, k_cache, table, lengths))[0])


def test_metadata_serves_all_layers_and_grown_lengths():
    case = Case(3, 1, 70, 3, False, False)
    inputs = cases.make_inputs(case)
    metadata, none = flash_mla.get_mla_metadata()
    assert isinstance(metadata, flash_mla.FlashMLASchedMeta) and none is None and not metadata.have_initialized
    for length in (70, 64, 33):
        now = inputs._replace(cache_seqlens=torch.full_like(inputs.cache_seqlens, length))
        out, lse = flash_mla.flash_mla_with_kvcache(*now, 512, metadata, None)
        assert metadata.have_initialized and metadata.config.b == 3 and metadata.config.page_block_size == 64
        cases.check(case, out, lse, cases.reference(case, now))


def arguments(batch=2, s_q=1, heads=4, page_size=64, dtype=torch.float32):
    """By name, all of them right."""
    return dict(
        q=torch.randn(batch, s_q, heads, 576, dtype=dtype),
        k_cache=torch.randn(batch, page_size, 1, 576, dtype=dtype),
        block_table=torch.arange(batch, dtype=torch.int32)[:, None],
        cache_seqlens=torch.full((batch,), 7, dtype=torch.int32),
        head_dim_v=512,
        tile_scheduler_metadata=flash_mla.get_mla_metadata()[0],
        causal=True,
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(batch=3), "batch size was 2, got 3"),
        (dict(s_q=2), "query tokens of a request was 1, got 2"),
        (dict(heads=8), "query heads was 4, got 8"),
        (dict(page_size=32), "page size of k_cache was 64, got 32"),
        (dict(causal=False), "causal was True, got False"),
    ],
    ids=str,
)
def test_stale_metadata(change, words):
    first = arguments()
    flash_mla.flash_mla_with_kvcache(**first)
    causal = change.pop("causal", True)
    other = {**arguments(**change), "causal": causal, "tile_scheduler_metadata": first["tile_scheduler_metadata"]}
    with pytest.raises(ValueError, match=f"tile_scheduler_metadata was used .*{words}"):
        flash_mla.flash_mla_with_kvcache(**other)
    flash_mla.flash_mla_with_kvcache(**first)


@pytest.mark.parametrize(
    "made, words",
    [
        ((torch.zeros(3, dtype=torch.int32), 4, 1), "cache_seqlens of 3 requests, got 2"),
        ((torch.zeros(2, dtype=torch.int32), 8, 1), "8 query rows per head of k_cache, got s_q 1 times 4 heads"),
        ((torch.zeros(2, dtype=torch.int32), 4, 1, 8), "num_heads_q 8, got q of 4 heads"),
        ((torch.zeros(2, dtype=torch.int32), 4, 1, 4, True), "is_fp8_kvcache True, got False"),
        ((torch.zeros(2, dtype=torch.int32), 4, 1, 4, False, 64), r"topk 64, got None"),
    ],
    ids=["batch", "rows", "heads", "fp8", "topk"],
)
def test_metadata_of_the_old_form_for_another_call(made, words):
    given = arguments()
    given["tile_scheduler_metadata"], given["num_splits"] = flash_mla.get_mla_metadata(*made)
    with pytest.raises(ValueError, match=f"tile_scheduler_metadata was made for {words}"):
        flash_mla.flash_mla_with_kvcache(**given)


@pytest.mark.parametrize("name", ["tile_scheduler_metadata", "num_splits"])
@pytest.mark.parametrize("value", [torch.zeros(2, 8, dtype=torch.int32), object(), 3], ids=["tensor", "object", "int"])
def test_foreign_metadata(name, value):
    with pytest.raises(TypeError, match=f"{name} must be .*get_mla_metadata returned"):
        flash_mla.flash_mla_with_kvcache(**{**arguments(), name: value})


def test_arguments_of_other_releases_are_not_looked_at():
    lengths = torch.zeros(2, dtype=torch.int32)
    metadata, _ = flash_mla.get_mla_metadata(lengths, 4, 1, 4, False, None, "more", other=3)
    flash_mla.flash_mla_with_kvcache(**{**arguments(), "tile_scheduler_metadata": metadata})


def test_no_metadata():
    with pytest.raises(TypeError, match=r"tile_scheduler_metadata must be .*got builtins\.NoneType"):
        flash_mla.flash_mla_with_kvcache(**{**arguments(), "tile_scheduler_metadata": None})


def test_a_failed_call_leaves_its_metadata_unused():
    given = arguments()
    with pytest.raises(ValueError, match="block_table has 1 columns"):
        flash_mla.flash_mla_with_kvcache(**{**given, "cache_seqlens": torch.tensor([7, 65], dtype=torch.int32)})
    assert not given["tile_scheduler_metadata"].have_initialized
    flash_mla.flash_mla_with_kvcache(**{**given, "causal": False})


# Refusals


@pytest.mark.parametrize(
    "name, value, error, words",
    [
        ("q", torch.zeros(2, 4, 576), ValueError, r"\[B, s_q, H, 576\], got shape \[2, 4, 576\]"),
        ("q", None, TypeError, "must be a tensor"),
        ("q", torch.zeros(2, 1, 4, 576, dtype=torch.int8), TypeError, "must be of bfloat16"),
        ("k_cache", torch.zeros(2, 64, 576), ValueError, r"got shape \[2, 64, 576\]"),
        ("k_cache", torch.zeros(2, 64, 2, 576), ValueError, r"\(h_kv 1\), got h_kv 2"),
        ("k_cache", torch.zeros(2, 64, 1, 512), ValueError, "576 in dimension 3"),
        ("k_cache", torch.zeros(2, 48, 1, 576), ValueError, "power of two, got 48"),
        ("k_cache", torch.zeros(2, 64, 1, 576, dtype=torch.float16), TypeError, "dtype of q"),
        ("block_table", None, TypeError, "sparse attention only"),
        ("block_table", torch.zeros(2, 1), TypeError, "must be of int32"),
        ("block_table", torch.zeros(3, 1, dtype=torch.int32), ValueError, "2 in dimension 0"),
        ("block_table", torch.zeros(2, dtype=torch.int32), ValueError, r"\[B, max_pages\]"),
        ("block_table", torch.full((2, 1), 2, dtype=torch.int32), ValueError, "must hold pages below 2, got 2 to 2"),
        ("cache_seqlens", None, TypeError, "sparse attention only"),
        ("cache_seqlens", torch.zeros(2, dtype=torch.int64), TypeError, "must be of int32"),
        ("cache_seqlens", torch.zeros(3, dtype=torch.int32), ValueError, "2 in dimension 0"),
        ("cache_seqlens", torch.tensor([7, -1], dtype=torch.int32), ValueError, "must not be negative, got -1"),
        ("cache_seqlens", torch.tensor([7, 65], dtype=torch.int32), ValueError, "reach 65 tokens, 2 pages"),
        ("head_dim_v", 576, ValueError, "below the 576 columns"),
        ("head_dim_v", 0, ValueError, "at least 1"),
        ("head_dim_v", 512.0, TypeError, "must be an integer, got 512.0"),
        ("softmax_scale", "1", TypeError, "must be a number"),
        ("causal", 1, TypeError, "True or False, got 1"),
        ("is_fp8_kvcache", 0, TypeError, "True or False, got 0"),
    ],
)
def test_bad_arguments(name, value, error, words):
    with pytest.raises(error, match=f"^flash_mla_with_kvcache: {name} .*{words}"):
        flash_mla.flash_mla_with_kvcache(**{**arguments(), name: value})


def test_the_other_layout():
    with pytest.raises(NotImplementedError, match="flash_mla_with_kvcache: q: heads of 512 columns"):
        flash_mla.flash_mla_with_kvcache(**{**arguments(), "q": torch.zeros(2, 1, 4, 512)})


@pytest.mark.parametrize(
    "name, value",
    [
        ("attn_sink", torch.zeros(4)),
        ("extra_k_cache", torch.zeros(2, 64, 1, 576)),
        ("extra_indices_in_kvcache", torch.zeros(2, 1, 64, dtype=torch.int32)),
        ("topk_length", torch.zeros(2, dtype=torch.int32)),
        ("extra_topk_length", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_what_goes_with_indices(name, value):
    with pytest.raises(ValueError, match=f"flash_mla_with_kvcache: {name} must be None in dense attention"):
        flash_mla.flash_mla_with_kvcache(**{**arguments(), name: value})


@pytest.mark.parametrize(
    "given, error, words",
    [
        (dict(cache_seqlens=[1, 2]), TypeError, "cache_seqlens must be a tensor"),
        (dict(cache_seqlens=torch.zeros(2)), TypeError, "cache_seqlens must be of int32"),
        (dict(num_heads_per_head_k=1.5), TypeError, "num_heads_per_head_k must be an integer"),
        (dict(num_heads_per_head_k=0), ValueError, "num_heads_per_head_k must be at least 1"),
        (dict(num_heads_k=2), ValueError, "num_heads_k must be 1"),
        (dict(num_heads_per_head_k=1, num_q_tokens_per_head_k=1), ValueError, "got both"),
        (dict(is_fp8_kvcache=1), TypeError, "is_fp8_kvcache must be True or False"),
        (dict(topk=0), ValueError, "topk must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_metadata(given, error, words):
    with pytest.raises(error, match=f"^get_mla_metadata: .*{words}"):
        flash_mla.get_mla_metadata(**given)


# Prefill


@pytest.mark.parametrize(
    "lengths",
    [[(5, 5), (1, 9), (40, 300)], [(3, 0), (0, 4), (2, 2)], [(6, 2), (4, 4)], [(0, 0)], []],
    ids=["histories", "empty requests", "fewer keys than rows", "nothing", "no request"],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_prefill_of_odd_lengths(lengths, causal, heads, kv_heads):
    rows, keys = [n for n, _ in lengths], [n for _, n in lengths]
    q = torch.randn(sum(rows), heads, 192) / 10
    k, v = torch.randn(sum(keys), kv_heads, 192) / 10, torch.randn(sum(keys), kv_heads, 128) / 10
    starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (rows, keys)]
    case = PrefillCase(len(lengths), 0, 0, True, heads, kv_heads, 192, 128, causal)
    inputs = cases.PrefillInputs(q, k, v, *starts, max(rows, default=0), max(keys, default=0))
    out, lse = run_prefill(case, inputs)
    assert lse.T.is_contiguous() and lse.dtype == torch.float32 and lse.shape == (sum(rows), heads)
    expected = cases.prefill_reference(case, inputs, heads=list(range(heads)))
    # -inf where a row sees no key: FlashMLA's decode says +inf there, its prefill does not.
    assert_close(out, expected.out, SINGLE)
    assert_close(lse, expected.lse, SINGLE_LSE)


def prefill_arguments():
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    return dict(
        q=torch.randn(6, 4, 192),
        k=torch.randn(6, 4, 192),
        v=torch.randn(6, 4, 128),
        cu_seqlens_qo=starts,
        cu_seqlens_kv=starts.clone(),
        max_seqlen_qo=4,
        max_seqlen_kv=4,
    )


def test_the_default_scale_of_prefill_and_causal():
    given = prefill_arguments()
    out, _ = flash_mla.flash_attn_varlen_func(**given)
    other, _ = flash_mla.flash_attn_varlen_func(**given, softmax_scale=192**-0.5, causal=False)
    assert torch.equal(out, other)
    assert not torch.equal(out, flash_mla.flash_attn_varlen_func(**given, causal=True)[0])


@pytest.mark.parametrize(
    "name, value, error, words",
    [
        ("q", torch.zeros(6, 192), ValueError, r"\[T, H, 192\]"),
        ("k", torch.zeros(6, 4, 128), ValueError, "192 in dimension 2"),
        ("k", torch.zeros(6, 3, 192), ValueError, "dividing q's 4 heads"),
        ("k", torch.zeros(6, 0, 192), ValueError, "dividing q's 4 heads"),
        ("v", torch.zeros(5, 4, 128), ValueError, r"k's \[6, 4\]"),
        ("v", torch.zeros(6, 4, 128, dtype=torch.float16), TypeError, "dtype of q"),
        ("cu_seqlens_qo", torch.tensor([0, 2, 6]), TypeError, "must be of int32"),
        ("cu_seqlens_qo", torch.tensor([0, 2, 5], dtype=torch.int32), ValueError, "must rise from 0 to 6"),
        ("cu_seqlens_kv", torch.tensor([0, 7, 6], dtype=torch.int32), ValueError, "must rise from 0 to 6"),
        ("cu_seqlens_kv", [0, 2, 6], TypeError, "must be a tensor"),
        ("max_seqlen_qo", 4.0, TypeError, "must be an integer"),
        ("max_seqlen_qo", 2, ValueError, "at least the longest request, got 2 for 2 requests and 6 rows of q"),
        ("max_seqlen_kv", -1, ValueError, "at least 0"),
        ("softmax_scale", "x", TypeError, "must be a number"),
        ("dropout_p", "no", TypeError, "must be a number"),
        ("causal", None, TypeError, "True or False"),
        ("is_varlen", 1, TypeError, "True or False"),
    ],
)
def test_bad_arguments_of_prefill(name, value, error, words):
    with pytest.raises(error, match=f"^flash_attn_varlen_func: {name} .*{words}"):
        flash_mla.flash_attn_varlen_func(**{**prefill_arguments(), name: value})


def test_numbers_of_requests_must_agree():
    given = {**prefill_arguments(), "cu_seqlens_kv": torch.tensor([0, 6], dtype=torch.int32)}
    with pytest.raises(ValueError, match="cu_seqlens_qo and cu_seqlens_kv must both be"):
        flash_mla.flash_attn_varlen_func(**given)


def test_unequal_lengths_that_are_not_varlen():
    given = {**prefill_arguments(), "q": torch.randn(5, 4, 192), "is_varlen": False}
    with pytest.raises(ValueError, match="is_varlen must be True"):
        flash_mla.flash_attn_varlen_func(**given)


@pytest.mark.parametrize("name, value", [("dropout_p", 0.1), ("deterministic", True)])
def test_what_prefill_does_not_do(name, value):
    with pytest.raises(NotImplementedError, match=f"flash_attn_varlen_func: {name}.* not implemented"):
        flash_mla.flash_attn_varlen_func(**prefill_arguments(), **{name: value})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_prefill_is_forward_only(name):
    given = prefill_arguments()
    given[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} requires grad, but only the forward pass is implemented"):
        flash_mla.flash_attn_varlen_func(**given)
    with torch.no_grad():
        out, _ = flash_mla.flash_attn_varlen_func(**given)
    assert not out.requires_grad


@pytest.mark.parametrize("causal", [False, True])
def test_packed_tensors(causal):
    given = {**prefill_arguments(), "causal": causal}
    q, k, v, starts = given["q"], given["k"], given["v"], given["cu_seqlens_qo"]
    expected = flash_mla.flash_attn_varlen_func(**given)
    options = dict(causal=causal, softmax_scale=192**-0.5)
    kv = flash_mla.flash_attn_varlen_kvpacked_func(q, torch.cat([k, v], -1), starts, starts, 4, 4, 192, **options)
    qkv = flash_mla.flash_attn_varlen_qkvpacked_func(torch.cat([q, k, v], -1), starts, 4, 192, **options)
    for out, lse in (kv, qkv):
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_packed_tensors_without_a_value():
    starts = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="head_dim_qk must leave columns for the value, got 192 for qkv of 384"):
        flash_mla.flash_attn_varlen_qkvpacked_func(torch.zeros(6, 4, 384), starts, 6, 192)
    with pytest.raises(ValueError, match="head_dim_qk must leave columns for the value, got 192 for kv of 192"):
        flash_mla.flash_attn_varlen_kvpacked_func(
            torch.zeros(6, 4, 192), torch.zeros(6, 4, 192), starts, starts, 6, 6, 192
        )


def test_decode_has_no_gradient():
    given = arguments()
    given["q"].requires_grad_()
    out, lse = flash_mla.flash_mla_with_kvcache(**given)
    assert not out.requires_grad and not lse.requires_grad


# The whole


# deepseek-ai/FlashMLA, flash_mla_interface.py: names in order, and the defaults of the last.
SIGNATURES = {
    "flash_mla_with_kvcache": (
        "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal "
        "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length",
        (None, None, False, False, *[None] * 6),
    ),
    "flash_mla_sparse_fwd": ("q kv indices sm_scale d_v attn_sink topk_length", (512, None, None)),
    "flash_attn_varlen_func": (
        "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p softmax_scale causal deterministic "
        "is_varlen",
        (0.0, None, False, False, True),
    ),
    "flash_attn_varlen_qkvpacked_func": (
        "qkv cu_seqlens max_seqlen head_dim_qk dropout_p softmax_scale causal deterministic is_varlen",
        (0.0, None, False, False, True),
    ),
    "flash_attn_varlen_kvpacked_func": (
        "q kv cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv head_dim_qk dropout_p softmax_scale causal "
        "deterministic is_varlen",
        (0.0, None, False, False, True),
    ),
}


@pytest.mark.parametrize("function", SIGNATURES)
def test_the_signatures_are_flash_mlas(function):
    names, defaults = SIGNATURES[function]
    parameters = inspect.signature(getattr(flash_mla, function)).parameters.values()
    assert [p.name for p in parameters] == names.split()
    assert tuple(p.default for p in parameters if p.default is not p.empty) == defaults


def test_it_is_imported_when_asked_for():
    program = (
        "import sys, ntops_mla; assert 'ntops_mla.flash_mla' not in sys.modules; "
        "from ntops_mla import flash_mla; flash_mla.get_mla_metadata()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_waits_for_the_device():
    """Fake tensors hold no values: whoever asks for one, as `.item()` does, fails."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        given = arguments(dtype=torch.bfloat16)
        given["tile_scheduler_metadata"], _ = flash_mla.get_mla_metadata(given["cache_seqlens"], 4, 1)
        out, lse = flash_mla.flash_mla_with_kvcache(**given)
        assert out.shape == (2, 1, 4, 512) and out.dtype == torch.bfloat16 and lse.shape == (2, 4, 1)
        given = prefill_arguments()
        out, lse = flash_mla.flash_attn_varlen_func(**given, causal=True)
        assert out.shape == (6, 4, 128) and lse.shape == (6, 4) and lse.stride() == (1, 6)


def test_in_a_compiled_graph():
    metadata, _ = flash_mla.get_mla_metadata()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k_cache, table, lengths):
        return flash_mla.flash_mla_with_kvcache(q, k_cache, table, lengths, 512, metadata, None, causal=True)

    case = Case(2, 2, 20, 3, True, True)
    inputs = cases.make_inputs(case, dtype=torch.float32)
    for _ in range(2):
        out, lse = step(*inputs)
        cases.check(case, out, lse, cases.reference(case, inputs))
    assert metadata.have_initialized
