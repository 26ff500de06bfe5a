"""What is timed: FlashMLA's shapes, sweeps over length, batch and heads, the two test scenarios, R1's layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from attention_rows import scenario
from ntops_mla.config import MLAConfig

SIZES = ("device", "cpu", "quick")
KINDS = (
    "decode", "decode_fp8", "sparse", "sparse_prefill", "combine", "prefill", "append", "norm", "rope", "query",
    "module", "parts",
)  # fmt: skip
PAGE = 64
K = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One row's numbers. `group`: what the report compares it with; a case may stand in several."""

    kind: str
    name: str
    params: Mapping[str, Any]
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))


def cases(size: str, kinds: tuple[str, ...] = KINDS) -> tuple[Case, ...]:
    """All cases of a size ("device", "cpu": the same rows smaller, "quick": one or two of each kind), by kind."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    made = {
        "decode": _decode, "decode_fp8": _decode_fp8, "sparse": _sparse, "sparse_prefill": _sparse_prefill,
        "combine": _combine, "prefill": _prefill, "append": _append, "norm": _norm, "rope": _rope,
        "query": _query, "module": _module, "parts": _parts,
    }  # fmt: skip
    if unknown := set(kinds) - set(made):
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    return tuple(case for kind in KINDS if kind in kinds for case in _merged(made[kind](size)))


def _merged(found) -> list[Case]:
    """A case that several groups name is timed once."""
    unique: dict[str, Case] = {}
    for case in found:
        groups = unique[case.name].groups if case.name in unique else ()
        unique[case.name] = dataclasses.replace(case, groups=tuple(dict.fromkeys(groups + case.groups)))
    return list(unique.values())


def decode_case(batch: int, s_q: int, context: int, heads: int, causal: bool, varlen: bool, group: str) -> Case:
    """A decode by its numbers; with `varlen`, context is the mean of lengths that are drawn as FlashMLA draws them."""
    words = [f"b{batch}", f"q{s_q}", f"k{context}", f"h{heads}"]
    words += [word for word, said in (("causal", causal and s_q > 1), ("varlen", varlen)) if said]
    numbers = {"batch": batch, "s_q": s_q, "context": context, "heads": heads, "causal": causal, "varlen": varlen}
    return Case("decode", "-".join(words), numbers, (group,))


def _one_long(batch: int, context: int, longest: int, heads: int) -> Case:
    """A decode of requests alike but for the first one."""
    case = decode_case(batch, 1, context, heads, True, False, "ragged")
    return dataclasses.replace(case, name=f"{case.name}-one{longest}", params={**case.params, "longest": longest})


def _decode(size: str):
    if size == "quick":
        yield decode_case(4, 1, 300, 16, True, True, "flashmla")
        yield decode_case(2, 2, 128, 16, True, False, "length")
        return
    device = size == "device"
    batch, heads = (128, 128) if device else (4, 16)
    contexts = (4 * K, 8 * K, 16 * K, 32 * K) if device else (256, 1 * K)
    for context, (s_q, causal) in itertools.product(contexts, ((1, True), (2, True), (2, False))):
        yield decode_case(batch, s_q, context, heads, causal, True, "flashmla")
    for one, context in itertools.product((1, 16) if device else (1,), _contexts(device)):
        yield decode_case(one, 1, context, heads, True, False, "length")
    for count in (1, 2, 4, 8, 16, 32, 64, 128) if device else (1, 4, 16):
        yield decode_case(count, 1, 4 * K if device else K, heads, True, False, "batch")
    for count in (16, 32, 64, 128) if device else (4, 16, 64):
        yield decode_case(batch, 1, 4 * K if device else K, count, True, False, "heads")
    for count in (16, 128) if device else ():
        yield _one_long(128, K, 128 * K, count)


def _decode_fp8(size: str):
    shapes = {
        "device": tuple((128, 1, context, heads) for context in (4 * K, 32 * K) for heads in (16, 64, 128)),
        "cpu": ((4, 1, K, 16), (4, 1, 256, 64)),
        "quick": ((2, 1, 100, 16),),
    }
    for batch, s_q, context, heads in shapes[size]:
        yield dataclasses.replace(decode_case(batch, s_q, context, heads, True, False, "fp8"), kind="decode_fp8")


def sparse_case(kind: str, batch: int, s_q: int, context: int, heads: int, topk: int, fp8: bool, group: str) -> Case:
    """Attention by indices, by its numbers."""
    words = [f"b{batch}", f"q{s_q}", f"k{context}", f"h{heads}", f"top{topk}"] + (["fp8"] if fp8 else [])
    numbers = {"batch": batch, "s_q": s_q, "context": context, "heads": heads, "topk": topk, "fp8": fp8}
    return Case(kind, "-".join(words), numbers, (group,))


def _sparse(size: str):
    shapes = {
        # DeepSeek-V3.2's, as FlashMLA times them, and one request that has to fill a board
        "device": tuple((batch, 2, 32 * K, 128, 2048) for batch in (2, 64, 128)) + ((1, 1, 128 * K, 128, 2048),),
        "cpu": ((4, 1, 4 * K, 16, 512), (4, 2, 4 * K, 64, 512), (2, 1, 4 * K, 128, 2048)),
        "quick": ((2, 1, 200, 16, 64),),
    }
    for shape in shapes[size]:
        for fp8 in (True, False):
            yield sparse_case("sparse", *shape, fp8, "sparse")


def _sparse_prefill(size: str):
    shapes = {
        "device": tuple((1, 4 * K, context, 128, 2048) for context in (8 * K, 32 * K, 128 * K)),
        "cpu": ((1, 64, 4 * K, 64, 512), (1, 64, 4 * K, 128, 2048)),
        "quick": ((1, 5, 128, 16, 64),),
    }
    for shape in shapes[size]:
        yield sparse_case("sparse_prefill", *shape, False, "sparse")


def _contexts(device: bool) -> tuple[int, ...]:
    return (1 * K, 4 * K, 16 * K, 64 * K, 128 * K) if device else (256, 1 * K, 4 * K)


def _combine(size: str):
    shapes = {"device": ((1, 64, 128), (16, 8, 128)), "cpu": ((4, 4, 16),), "quick": ((2, 2, 4),)}[size]
    for batch, splits, heads in shapes:
        yield Case(
            "combine", f"b{batch}-splits{splits}-h{heads}", {"batch": batch, "splits": splits, "heads": heads}, ()
        )


def prefill_case(requests: tuple[tuple[int, int], ...], heads: int, group: str) -> Case:
    """requests: (new tokens, past)."""
    text = "_".join(f"{new}+{past}" if past else f"{new}" for new, past in requests)
    return Case("prefill", f"s{text}-h{heads}", {"requests": requests, "heads": heads}, (group,))


def _prefill(size: str):
    if size == "quick":
        yield prefill_case(((48, 16), (40, 0)), 4, "scenario")
        return
    device = size == "device"
    heads = 128 if device else 16
    for new in (1 * K, 2 * K, 4 * K, 8 * K, 16 * K) if device else (128, 512):
        yield prefill_case(((new, 0),), heads, "length")
    yield prefill_case(tuple(zip(scenario.PREFILL.lengths, scenario.PREFILL.pasts)), heads, "scenario")


def _append(size: str):
    shapes = {"device": ((128, 128), (704, 128), (8192, 128)), "cpu": ((16, 16), (704, 16)), "quick": ((16, 4),)}[size]
    for tokens, heads in shapes:
        yield Case("append", f"t{tokens}-h{heads}", {"tokens": tokens, "heads": heads}, ("fusion",))


def _norm(size: str):
    shapes = {"device": ((128, 1536), (8192, 1536)), "cpu": ((16, 1536), (704, 1536)), "quick": ((16, 512),)}[size]
    for tokens, width in shapes:
        yield Case("norm", f"t{tokens}-w{width}", {"tokens": tokens, "width": width}, ())


def _rope(size: str):
    shapes = {"device": ((128, 128), (8192, 128)), "cpu": ((16, 16), (704, 16)), "quick": ((16, 4),)}[size]
    for tokens, heads in shapes:
        yield Case("rope", f"t{tokens}-h{heads}", {"tokens": tokens, "heads": heads}, ())


def _query(size: str):
    r1 = {"rank": 1536, "columns": 128 * 192}
    shapes = {
        "device": ((16, r1), (128, r1), (704, r1)),
        "cpu": ((16, r1), (704, {"rank": 1536, "columns": 16 * 192})),
        "quick": ((16, {"rank": 128, "columns": 256}),),
    }
    for tokens, sizes in shapes[size]:
        name = f"t{tokens}-r{sizes['rank']}-c{sizes['columns']}"
        yield Case("query", name, {"tokens": tokens, **sizes}, ("fusion",))


def _layer(kind: str, config: str, lengths, pasts, name: str, group: str) -> Case:
    numbers = {"config": config, "lengths": tuple(lengths), "pasts": tuple(pasts)}
    return Case(kind, f"{config}-{name}", numbers, (group,))


def _module(size: str):
    if size == "quick":
        for case in (scenario.TINY_PREFILL, scenario.TINY_DECODE):
            yield _layer("module", "a-tiny", case.lengths, case.pasts, case.name, "scenario")
        return
    device = size == "device"
    for config in ("a", "r1") if device else ("a",):
        for case in (scenario.PREFILL, scenario.DECODE):
            yield _layer("module", config, case.lengths, case.pasts, case.name, "scenario")
    config = "r1" if device else "a"
    for batch, context in itertools.product((1, 8, 32, 128) if device else (1, 4, 16), _contexts(device)):
        yield _layer("module", config, (1,) * batch, (context - 1,) * batch, f"decode-b{batch}-k{context}", "layer")


def _parts(size: str):
    if size == "quick":
        yield _layer("parts", "a-tiny", scenario.TINY_DECODE.lengths, scenario.TINY_DECODE.pasts, "decode", "scenario")
        return
    for config in ("a", "r1"):
        yield _layer("parts", config, scenario.DECODE.lengths, scenario.DECODE.pasts, "decode", "scenario")
    if size == "device":
        yield _layer("parts", "r1", (1,) * 128, (4 * K - 1,) * 128, f"decode-b128-k{4 * K}", "layer")


def config_of(name: str) -> MLAConfig:
    """The numbers that a module's case names."""
    base = scenario.config(name.removesuffix("-tiny"))
    return scenario.tiny(base) if name.endswith("-tiny") else base
