"""FlashMLA's functions by indices, and over its fp8 cache: FlashMLA's cases, what arguments mean, refusals."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ntops_mla
from ntops_mla import dispatch, flash_mla
from ntops_mla.testing import Tolerance, assert_close
from tests import flash_mla_cases as dense
from tests import flash_mla_sparse_cases as cases
from tests.flash_mla_cases import tenth
from tests.flash_mla_sparse_cases import CASES, PREFILL_CASES, Scope, SparseCase, SparsePrefillCase

EXACT = Tolerance(1e-6, 1e-5)


def name_of(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", str(value))


def run(inputs, **changes):
    meta, num_splits = flash_mla.get_mla_metadata()
    given = {**inputs.arguments(), "tile_scheduler_metadata": meta, "num_splits": num_splits, **changes}
    return flash_mla.flash_mla_with_kvcache(**given)


def check_decode(case, fp8, dtype=torch.bfloat16):
    inputs = cases.make_inputs(case, fp8, dtype=dtype)
    out, lse = run(inputs)
    assert out.dtype == dtype
    cases.check(case, out, lse, cases.reference(case, inputs))


# FlashMLA's cases


def cut(case):
    """With fewer requests where all would take seconds: the marker `full` has them as they are."""
    return case._replace(batch=max(1, min(case.batch, case.batch * 6_000_000 // case.work)))


# Every second of them over a cache of bfloat16, which FlashMLA's sparse decode does not take.
@pytest.mark.parametrize("case, fp8", [(cut(case), i % 2 == 0) for i, case in enumerate(tenth(CASES))], ids=name_of)
def test_a_tenth_of_flash_mlas_sparse_decode_cases(case, fp8):
    check_decode(case, fp8)


@pytest.mark.full
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_of_flash_mlas_sparse_decode_cases(case, fp8):
    check_decode(case, fp8)


def test_the_tenth_meets_every_value_of_every_parameter():
    chosen = tenth(CASES)
    for field in ("s_q", "heads", "varlen", "sink", "invalid", "empty", "batch"):
        assert {getattr(case, field) for case in chosen} == {getattr(case, field) for case in CASES}, field
    assert any(case.extra for case in chosen) and len({case.name for case in CASES}) == len(CASES)
    assert len({case.name for case in PREFILL_CASES}) == len(PREFILL_CASES)


def check_prefill(case, dtype=torch.bfloat16):
    inputs = cases.make_prefill_inputs(case, dtype=dtype)
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(*inputs)
    assert out.dtype == dtype and max_logits.dtype == lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous() and max_logits.is_contiguous()
    cases.check_prefill(case, out, max_logits, lse, cases.prefill_reference(case, inputs))


def few(case):
    return case._replace(s_q=min(case.s_q, max(1, 60_000_000 // (case.topk * (case.heads + 576)))))


@pytest.mark.parametrize("case", [few(case) for case in tenth(PREFILL_CASES)], ids=name_of)
def test_a_tenth_of_flash_mlas_sparse_prefill_cases(case):
    check_prefill(case)


@pytest.mark.full
@pytest.mark.parametrize("case", PREFILL_CASES, ids=name_of)
def test_all_of_flash_mlas_sparse_prefill_cases(case):
    check_prefill(case)


def test_prefill_of_many_tokens():
    """More than a second dimension of a grid takes; FlashMLA compares none of them."""
    check_prefill(SparsePrefillCase(70000, 64, 4, 1, True, True))


def check_dense(case):
    as_bytes, plain = cases.to_fp8(dense.make_inputs(case))
    out, lse = flash_mla.flash_mla_with_kvcache(
        *as_bytes, 512, *flash_mla.get_mla_metadata(), causal=case.causal, is_fp8_kvcache=True
    )
    expected = dense.reference(case, plain)
    assert_close(out, expected.out, cases.SPARSE_OUT, case.name)
    dense._check_lse(case, lse, expected, cases.DECODE_LSE, None)


@pytest.mark.parametrize("case", [cut(case) for case in dense.CASES[7::40]], ids=name_of)
def test_flash_mlas_dense_cases_over_the_fp8_cache(case):
    check_dense(case)


@pytest.mark.full
@pytest.mark.parametrize("case", dense.CASES, ids=name_of)
def test_all_of_flash_mlas_dense_cases_over_the_fp8_cache(case):
    check_dense(case)


# What the arguments mean


SMALL = SparseCase(3, 2, 4, Scope(40, 24, 16), True, True, Scope(20, 10, 5))


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=name_of)
def test_other_element_types(fp8, dtype):
    check_decode(SMALL, fp8, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=name_of)
def test_other_element_types_in_prefill(dtype):
    check_prefill(SparsePrefillCase(9, 50, 24, 3, True, True), dtype)


def test_float32_is_far_within_the_tolerances():
    inputs = cases.make_inputs(SMALL, True, dtype=torch.float32)
    expected = cases.reference(SMALL, inputs)
    out, lse = run(inputs)
    assert_close(out, expected.out, EXACT)
    assert_close(lse, expected.lse, EXACT)


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "plain"])
def test_an_extra_cache_is_more_keys(fp8):
    """The same as one cache that holds both."""
    inputs = cases.make_inputs(
        SMALL._replace(scope=Scope(40, 24, 16), extra=Scope(20, 10, 16)), fp8, dtype=torch.float32
    )
    first, second = inputs.k_cache, inputs.extra_k_cache
    slots = first.shape[0] * 16
    more = torch.where(inputs.extra_indices_in_kvcache >= 0, inputs.extra_indices_in_kvcache + slots, -1)
    as_bytes = lambda x: x.view(torch.uint8) if fp8 else x  # noqa: E731
    both = torch.cat([as_bytes(first), as_bytes(second)])
    out, lse = run(inputs)
    none = dict.fromkeys(("extra_k_cache", "extra_indices_in_kvcache"))
    one, one_lse = run(inputs, k_cache=both, indices=torch.cat([inputs.indices, more], -1), **none)
    assert_close(out, one, EXACT)
    assert_close(lse, one_lse, EXACT)


def test_topk_length_is_as_if_the_rest_were_invalid():
    case = SMALL._replace(scope=Scope(40, 24, 16, True), extra=Scope(20, 10, 5, True))
    inputs = cases.make_inputs(case, True, dtype=torch.float32)
    counted = run(inputs)
    changes = {"topk_length": None, "extra_topk_length": None}
    for name, counts in (("indices", inputs.topk_length), ("extra_indices_in_kvcache", inputs.extra_topk_length)):
        value = getattr(inputs, name)
        changes[name] = value.masked_fill(torch.arange(value.shape[2]) >= counts[:, None, None], -1)
    masked = run(inputs, **changes)
    assert_close(counted[0], masked[0], EXACT)
    assert_close(counted[1], masked[1], EXACT)


def test_a_key_named_twice_counts_twice():
    q, kv = torch.randn(1, 2, 576), torch.randn(3, 1, 576) / 10
    indices = torch.tensor([[[0, 2, 2, -1]]], dtype=torch.int32)
    out, most, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1)
    scores = (q[0].double() @ kv[[0, 2, 2], 0].double().T) * 0.1
    assert_close(lse[0], scores.logsumexp(-1), EXACT)
    assert_close(most[0], scores.amax(-1), EXACT)
    assert_close(out[0], scores.softmax(-1) @ kv[[0, 2, 2], 0, :512].double(), EXACT)


def test_sinks_and_rows_without_keys():
    infinity = float("inf")
    q, kv = torch.randn(2, 4, 576), torch.randn(3, 1, 576) / 10
    indices = torch.tensor([[[0, 1]], [[3, -5]]], dtype=torch.int32)
    sink = torch.tensor([-infinity, infinity, 0.5, -200.0])
    plain, most, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1)
    assert (plain[1] == 0).all() and (lse[1] == infinity).all() and (most[1] == -infinity).all()
    out, other_most, other_lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, attn_sink=sink)
    assert torch.equal(lse, other_lse) and torch.equal(most, other_most)
    assert (out[1] == 0).all() and (out[0, 1] == 0).all()
    assert torch.equal(out[0, 0], plain[0, 0])
    assert_close(out[0, 2:], plain[0, 2:].double() / (1 + (sink[2:] - lse[0, 2:]).double().exp())[:, None], EXACT)


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "plain"])
def test_indices_that_lie_nowhere_are_not_read(fp8):
    """In a view of a larger tensor, whose rest is NaN."""
    case = SMALL._replace(extra=None)
    inputs = cases.make_inputs(case, fp8, dtype=torch.float32)
    expected = cases.reference(case, inputs)
    indices = inputs.indices.clone()
    free = indices < 0
    slots = inputs.k_cache.shape[0] * 16
    for value in (slots, 2147483647, -2147483648, -2):
        out, lse = run(inputs, indices=indices.masked_fill(free, value))
        cases.check(case, out, lse, expected)


def test_smaller_latents():
    q, kv = torch.randn(5, 3, 288), torch.randn(20, 1, 288)
    indices = torch.randint(0, 20, (5, 1, 8), dtype=torch.int32)
    out, _, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05, 256)
    for token in range(5):
        keys = kv[indices[token, 0].long(), 0].double()
        scores = q[token].double() @ keys.T * 0.05
        assert_close(lse[token], scores.logsumexp(-1), EXACT)
        assert_close(out[token], scores.softmax(-1) @ keys[:, :256], Tolerance(1e-5, 1e-4))


@pytest.mark.parametrize("view", [torch.float8_e4m3fn, torch.uint8, torch.int8], ids=name_of)
def test_the_bytes_may_come_in_any_type_of_one_byte(view):
    inputs = cases.make_inputs(SMALL, True)
    out, lse = run(inputs, k_cache=inputs.k_cache.view(view), extra_k_cache=inputs.extra_k_cache.view(view))
    cases.check(SMALL, out, lse, cases.reference(SMALL, inputs))


def test_no_tokens_and_no_indices():
    q, kv = torch.zeros(0, 3, 576), torch.zeros(4, 1, 576)
    out, most, lse = flash_mla.flash_mla_sparse_fwd(q, kv, torch.zeros(0, 1, 8, dtype=torch.int32), 1.0)
    assert out.shape == (0, 3, 512) and most.shape == lse.shape == (0, 3)
    q = torch.zeros(2, 3, 576)
    out, most, lse = flash_mla.flash_mla_sparse_fwd(q, kv, torch.zeros(2, 1, 0, dtype=torch.int32), 1.0)
    assert (out == 0).all() and (lse == float("inf")).all() and (most == -float("inf")).all()


# Metadata


def test_one_metadata_serves_layers_of_other_lengths():
    inputs = cases.make_inputs(SMALL, True)
    meta = flash_mla.get_mla_metadata(torch.ones(3, dtype=torch.int32), 2 * 4, 1, 4, True, 24)[0]
    for counts in (None, torch.tensor([3, 0, 24], dtype=torch.int32)):
        run(inputs, tile_scheduler_metadata=meta, topk_length=counts)
    assert meta.have_initialized and meta.config.topk == 24 and meta.config.extra_topk == 10
    assert meta.config.is_fp8_kvcache and meta.config.extra_page_block_size == 5


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: dict(indices=x.indices[..., :8]), "last dimension of indices was 24, got 8"),
        (
            lambda x: dict(extra_indices_in_kvcache=x.extra_indices_in_kvcache[..., :8]),
            "last dimension of extra_indices_in_kvcache was 10, got 8",
        ),
        (
            lambda x: dict(extra_k_cache=None, extra_indices_in_kvcache=None),
            "page size of extra_k_cache was 5, got None",
        ),
        (lambda x: dict(k_cache=x.k_cache[:, :8]), "page size of k_cache was 16, got 8"),
    ],
)
def test_metadata_of_another_call(change, words):
    inputs = cases.make_inputs(SMALL, True)
    meta, _ = flash_mla.get_mla_metadata()
    run(inputs, tile_scheduler_metadata=meta)
    with pytest.raises(ValueError, match=f"tile_scheduler_metadata was used .*{words}"):
        run(inputs, tile_scheduler_metadata=meta, **change(inputs))


def test_metadata_made_for_another_topk():
    inputs = cases.make_inputs(SMALL, True)
    with pytest.raises(ValueError, match="made for topk 64, got 24"):
        run(inputs, tile_scheduler_metadata=flash_mla.get_mla_metadata(topk=64)[0])


# Refusals


@pytest.mark.parametrize(
    "name, value, error, words",
    [
        ("q", torch.zeros(3, 2, 4, 512), NotImplementedError, "heads of 512 columns, 448 .* are not implemented"),
        ("q", torch.zeros(3, 2, 4, 288), ValueError, "must be of 576 columns over an fp8 cache, got 288"),
        ("k_cache", torch.zeros(8, 16, 1, 584, dtype=torch.uint8), NotImplementedError, "584 bytes"),
        ("k_cache", torch.zeros(8, 16, 1, 576, dtype=torch.uint8), ValueError, "656 in dimension 3"),
        ("k_cache", torch.zeros(8, 16, 1, 656), TypeError, "must be of float8_e4m3fn, uint8, int8, got"),
        ("k_cache", torch.zeros(8, 16, 2, 656, dtype=torch.uint8), ValueError, "h_kv 2"),
        ("indices", torch.zeros(3, 2, 24), TypeError, "must be of int32"),
        ("indices", torch.zeros(3, 24, dtype=torch.int32), ValueError, r"\[B, s_q, topk\]"),
        ("indices", torch.zeros(3, 1, 24, dtype=torch.int32), ValueError, "2 in dimension 1"),
        ("indices", torch.zeros(2, 2, 24, dtype=torch.int32), ValueError, "3 in dimension 0"),
        ("topk_length", torch.zeros(3, 2, dtype=torch.int32), ValueError, r"\[B\]"),
        ("topk_length", torch.zeros(2, dtype=torch.int32), ValueError, "3 in dimension 0"),
        ("topk_length", torch.zeros(3, dtype=torch.int64), TypeError, "must be of int32"),
        ("attn_sink", torch.zeros(3), ValueError, "4 in dimension 0"),
        ("attn_sink", torch.zeros(4, dtype=torch.bfloat16), TypeError, "must be of float32"),
        ("extra_indices_in_kvcache", None, TypeError, "must be a tensor"),
        ("extra_indices_in_kvcache", torch.zeros(3, 1, 10, dtype=torch.int32), ValueError, "2 in dimension 1"),
        ("extra_k_cache", torch.zeros(8, 16, 1, 656), TypeError, "must be of float8_e4m3fn"),
        ("extra_k_cache", None, ValueError, "", ),
        ("extra_topk_length", torch.zeros(4, dtype=torch.int32), ValueError, "3 in dimension 0"),
        ("causal", True, ValueError, "must be False with indices"),
        ("head_dim_v", 256, ValueError, "must be of 512 columns over an fp8 cache, got 256"),
        ("softmax_scale", "1", TypeError, "must be a number"),
        ("k_cache", torch.zeros(8, 16, 1, 700, dtype=torch.uint8)[..., :656], ValueError, "must have the 656 bytes"),
        ("extra_k_cache", torch.zeros(8, 16, 1, 700, dtype=torch.uint8)[..., :656], ValueError, "656 bytes of a token"),
        ("k_cache", torch.zeros(8, 0, 1, 656, dtype=torch.uint8), ValueError, "a page size of at least 1"),
        ("indices", torch.zeros(3, 2, 24, dtype=torch.int32).to_sparse(), TypeError, "must be a dense tensor"),
    ],
)  # fmt: skip
def test_bad_arguments(name, value, error, words):
    inputs = cases.make_inputs(SMALL, True)
    named = name if not (name == "extra_k_cache" and value is None) else "extra_indices_in_kvcache must be None without"
    with pytest.raises(error, match=f"^flash_mla_with_kvcache: {named}.*{words}"):
        run(inputs, **{name: value})


def prefill_arguments():
    return dict(
        q=torch.randn(5, 4, 576),
        kv=torch.randn(20, 1, 576),
        indices=torch.randint(0, 20, (5, 1, 8), dtype=torch.int32),
        sm_scale=0.1,
    )


@pytest.mark.parametrize(
    "name, value, error, words",
    [
        ("q", torch.zeros(5, 576), ValueError, r"\[s_q, H, 576\]"),
        ("q", torch.zeros(5, 4, 512), NotImplementedError, "heads of 512 columns"),
        ("kv", torch.zeros(20, 576), ValueError, r"\[s_kv, 1, 576\]"),
        ("kv", torch.zeros(20, 2, 576), ValueError, "1 in dimension 1"),
        ("kv", torch.zeros(20, 1, 512), ValueError, "576 in dimension 2"),
        ("kv", torch.zeros(20, 1, 576, dtype=torch.float16), TypeError, "dtype of q"),
        ("indices", torch.zeros(5, 8, dtype=torch.int32), ValueError, r"\[s_q, 1, topk\]"),
        ("indices", torch.zeros(4, 1, 8, dtype=torch.int32), ValueError, "5 in dimension 0"),
        ("indices", torch.zeros(5, 1, 8, dtype=torch.int64), TypeError, "must be of int32"),
        ("sm_scale", None, TypeError, "must be a number"),
        ("d_v", 576, ValueError, "below the 576 columns"),
        ("d_v", "512", TypeError, "must be an integer"),
        ("attn_sink", torch.zeros(5), ValueError, "4 in dimension 0"),
        ("topk_length", torch.zeros(4, dtype=torch.int32), ValueError, "5 in dimension 0"),
        ("topk_length", [1, 2, 3, 4, 5], TypeError, "must be a tensor"),
    ],
)
def test_bad_arguments_of_prefill(name, value, error, words):
    with pytest.raises(error, match=f"^flash_mla_sparse_fwd: {name}.*{words}"):
        flash_mla.flash_mla_sparse_fwd(**{**prefill_arguments(), name: value})


def test_indices_are_looked_at_when_asked(monkeypatch):
    monkeypatch.setenv("NTOPS_MLA_CHECK", "1")
    dispatch.reset()
    inputs = cases.make_inputs(SMALL, True)
    run(inputs)
    slots = inputs.k_cache.shape[0] * 16
    wrong = inputs.indices.clone()
    wrong[2, 1, 7] = slots
    with pytest.raises(ValueError, match=rf"indices must be -1 or .*got {slots} for request 2, token 1, position 7"):
        run(inputs, indices=wrong)
    # Behind the counted ones lies what likes.
    counts = torch.tensor([5, 0, 7], dtype=torch.int32)
    out, lse = run(inputs, indices=wrong, topk_length=counts)
    plain = run(inputs, topk_length=counts)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    more = inputs.extra_indices_in_kvcache.clone()
    more[0, 0, 3] = -2
    with pytest.raises(
        ValueError, match=r"extra_indices_in_kvcache must be .*got -2 for request 0, token 0, position 3"
    ):
        run(inputs, extra_indices_in_kvcache=more)


def test_a_number_may_be_numpys():
    inputs = cases.make_inputs(SMALL, True)
    scale = np.float32(0.25)
    assert torch.equal(run(inputs, softmax_scale=scale)[0], run(inputs, softmax_scale=0.25)[0])
    given = prefill_arguments()
    expected = flash_mla.flash_mla_sparse_fwd(**{**given, "sm_scale": 0.25})
    assert torch.equal(flash_mla.flash_mla_sparse_fwd(**{**given, "sm_scale": scale})[0], expected[0])


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "plain"])
def test_in_a_compiled_graph(fp8):
    inputs = cases.make_inputs(SMALL._replace(scope=Scope(40, 24, 16, True)), fp8, dtype=torch.float32)
    metadata, _ = flash_mla.get_mla_metadata()
    given = inputs.arguments()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(**tensors):
        return flash_mla.flash_mla_with_kvcache(
            **{**given, **tensors}, tile_scheduler_metadata=metadata, num_splits=None
        )

    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    expected = run(inputs)
    for _ in range(2):
        out, lse = step(**tensors)
        assert_close(out, expected[0].double(), EXACT)
        assert_close(lse, expected[1].double(), EXACT)


def test_sparse_prefill_in_a_compiled_graph():
    given = prefill_arguments()
    step = torch.compile(flash_mla.flash_mla_sparse_fwd, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(step(**given), flash_mla.flash_mla_sparse_fwd(**given)):
        assert_close(mine, theirs.double(), EXACT)


def test_no_gradient():
    given = prefill_arguments()
    given["q"].requires_grad_()
    assert not any(x.requires_grad for x in flash_mla.flash_mla_sparse_fwd(**given))


def test_nothing_waits_for_the_device():
    """Fake tensors hold no values: whoever asks for one, as `.item()` does, fails."""
    inputs = cases.make_inputs(SMALL._replace(scope=Scope(40, 24, 16, True)), True)
    with FakeTensorMode() as mode:
        fake = inputs._replace(
            **{n: mode.from_tensor(v) for n, v in inputs._asdict().items() if isinstance(v, torch.Tensor)}
        )
        out, lse = run(fake)
        assert out.shape == (3, 2, 4, 512) and out.dtype == torch.bfloat16 and lse.shape == (3, 4, 2)
        given = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in prefill_arguments().items()}
        out, most, lse = flash_mla.flash_mla_sparse_fwd(**given, attn_sink=torch.zeros(4))
        assert out.shape == (5, 4, 512) and most.shape == lse.shape == (5, 4)


def test_the_librarys_own_fp8_cache():
    cfg = ntops_mla.MLAConfig(
        hidden_size=64, num_heads=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64,
        v_head_dim=16,
    )  # fmt: skip
    cache = ntops_mla.LatentCache(cfg, num_pages=4, page_size=32, dtype=torch.bfloat16, kv_format="fp8")
    rows = (torch.randn(40, 576) / 10).bfloat16()
    cache.fill(5, rows[:, :512], rows[:, 512:])
    step = cache.step([5], [1])
    q = (torch.randn(1, 1, 2, 576) / 10).bfloat16()
    view = cache.flash_mla_view(0)
    assert view.shape == (4, 32, 1, 656)
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, view, step.block_table, step.seq_lens - 1, 512, *flash_mla.get_mla_metadata(), is_fp8_kvcache=True
    )
    where = step.block_table[0].repeat_interleave(32)[:40] * 32 + torch.arange(40) % 32
    indices = where.int().view(1, 1, 40)
    sparse, sparse_lse = flash_mla.flash_mla_with_kvcache(
        q, view, None, None, 512, *flash_mla.get_mla_metadata(), is_fp8_kvcache=True, indices=indices
    )
    assert_close(sparse, out.double(), cases.SPARSE_OUT)
    assert_close(sparse_lse, lse.double(), Tolerance(1e-5, 1e-4))
