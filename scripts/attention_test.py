"""MLA over packed requests: prefill latency and decode throughput, checked, beside PyTorch and transformers.

The flags, cases and wording of InfiniLM's attention_test.py. See README.md, or --help.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import stat
import sys
import types

from attention_rows import interpreter

if __name__ == "__main__" and interpreter.wanted(sys.argv[1:]):
    # Before torch and ntops_mla, since Triton decides at its import whether functions are compiled or interpreted.
    os.environ[interpreter.VARIABLE] = "1"
    print(f"--cpu --backend kernel: the kernels run in Triton's interpreter ({interpreter.VARIABLE}=1)", flush=True)

import torch

import ntops_mla
from attention_rows import measure, scenario
from attention_rows.library_row import Library
from attention_rows.torch_loop import TorchLoop
from attention_rows.transformers_row import Transformers, unavailable
from ntops_mla import checkout, checkpoint
from ntops_mla.interpreter import enabled as interpreting
from ntops_mla.platform import DeviceNotFoundError, all_platforms, best_device, detect, find_device
from ntops_mla.testing import Float64MLA

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
IMPLEMENTATIONS = ("torch_loop", "transformers", "ntops_mla")
TITLES = {"torch_loop": "Torch loop", "transformers": "Transformers", "ntops_mla": "ntops_mla"}


class UsageError(Exception):
    """Something the user asked for cannot be done: one line, exit status 2."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="attention_test.py", description=__doc__.splitlines()[0])
    devices = parser.add_mutually_exclusive_group()
    for platform in all_platforms().values():
        flags = [f"--{name}" for name in (platform.name, *platform.aliases)]
        text = f"run on {platform.title}"
        devices.add_argument(*flags, dest="platform", action="store_const", const=platform.name, help=text)
    parser.add_argument(
        "--model_path",
        "--model-path",
        metavar="DIR",
        help="real weights: a Hugging Face directory, in place of --config and --tiny",
    )
    parser.add_argument("--layer", type=_count, help="of the checkpoint (default: the lowest that DIR holds)")
    parser.add_argument("--config", choices=("a", "r1"), help="numbers without a model (default: a)")
    parser.add_argument("--tiny", action="store_true", help="2 heads, tens of tokens")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="this row only")
    parser.add_argument("--no-check", action="store_true", help="time only, without float64")
    parser.add_argument("--dtype", type=_dtype, default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)")
    parser.add_argument(
        "--backend",
        choices=ntops_mla.dispatch.BACKENDS,
        help="what may run; kernel with --cpu: in Triton's interpreter",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--warmups", type=_count, help="passes before timing (default: 10; --tiny: 1)")
    parser.add_argument("--runs", type=_positive, help="passes timed (default: 100; --tiny: 3)")
    parser.add_argument("--seed", type=_count, help="of weights and inputs (default: a fresh one, printed)")
    args = parser.parse_args(argv)
    if args.model_path is None and args.layer is not None:
        parser.error("argument --layer: needs --model_path")
    if args.model_path is not None and (args.tiny or args.config):
        parser.error("argument --model_path: not allowed with --tiny or --config")
    if args.warmups is None:
        args.warmups = 1 if args.tiny else 10
    if args.runs is None:
        args.runs = 3 if args.tiny else 100
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(4), "little")
    return args


def _dtype(text: str) -> str:
    name = ALIASES.get(text.lower(), text.lower())
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}, got {text!r}")
    return name


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        ntops_mla.dispatch.settings()  # what is set wrong is said before anything is made
        with ntops_mla.use(args.backend) if args.backend else contextlib.nullcontext():
            return run(args)
    except (
        UsageError,
        DeviceNotFoundError,
        FileNotFoundError,
        KeyError,
        ValueError,
        ImportError,
        ntops_mla.BackendUnavailableError,
        ntops_mla.StrictFallbackError,
    ) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"attention_test.py: error: {message}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    device, detection = choose_device(args.platform)
    if args.json is not None:
        check_writable(args.json)
    dtype = DTYPES[args.dtype]
    torch.manual_seed(args.seed)
    name, mla = make_model(args, device, dtype)
    rows, left_out = make_rows(args.implementation, mla)
    with torch.inference_mode():
        return run_rows(args, name, mla, detection, rows, left_out)


def run_rows(args: argparse.Namespace, name: str, mla: ntops_mla.MLA, detection, rows, left_out) -> int:
    """Check all rows, then time all, then say what there is to say; 1 where a row differs from float64."""
    print_header(args, name, mla, detection, left_out)
    scenarios = (scenario.TINY_PREFILL, scenario.TINY_DECODE) if args.tiny else (scenario.PREFILL, scenario.DECODE)
    weights = None
    if not args.no_check:
        weights = {key: value.detach().cpu().double() for key, value in mla.named_parameters()}
    results, passed = [], True
    checks = {}
    for case in scenarios:  # correctness of everything before the speed of anything
        checks[case.name] = check_rows(rows, case, mla, weights)
        passed = passed and all(check.passed for check in checks[case.name].values())
    del weights
    for case in scenarios:
        results += time_rows(args, rows, case, mla, checks[case.name])
    print_choices(results)
    print_summary(results, args, passed)
    if args.json is not None:
        write_json(args.json, args, name, mla, detection, results)
        print(f"result written to {args.json}")
    return 0 if passed else 1


def choose_device(platform: str | None):
    if platform is None:
        detection = best_device()
        check_override(detection)
        print(f"no device flag: {detection.platform.title} on {detection.device} ({detection.reason})")
        return detection.device, detection
    device = find_device(platform)
    detection = detect(device)
    check_override(detection)
    return device, detection


def check_override(detection) -> None:
    """NTOPS_MLA_PLATFORM may name a platform that this device cannot be; the result would then bear its name."""
    platform, device = detection.platform, detection.device
    types = (platform.markers.device_type, *platform.markers.also_device_types)
    if device.type in types or is_interpreted(device):
        return
    decided = detection.reason.split(";")[0]
    message = f"{decided}: {platform.title} devices are of type {' or '.join(types)}, and this one is {device}"
    if device.type == "cpu":
        message += f" ({interpreter.VARIABLE}=1 runs its kernels on a CPU, in Triton's interpreter)"
    raise UsageError(message)


def is_interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and interpreting()


def make_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    if args.model_path is None:
        cfg = scenario.config(args.config or "a")
        cfg = scenario.tiny(cfg) if args.tiny else cfg
        name = (args.config or "a") + ("-tiny" if args.tiny else "")
        return name, ntops_mla.MLA(cfg, device=device, dtype=dtype).requires_grad_(False)
    ntops_mla.MLAConfig.from_pretrained(args.model_path)
    held = checkpoint.layers(args.model_path)
    if not held:
        raise UsageError(f"{args.model_path!r} holds no layer with MLA")
    layer = held[0] if args.layer is None else args.layer
    mla = ntops_mla.MLA.from_pretrained(args.model_path, layer, layer_idx=0, device=device, dtype=dtype)
    return f"{args.model_path} layer {layer}", mla


def make_rows(only: str | None, mla: ntops_mla.MLA):
    """The rows to run and, of those left out, why."""
    makers = {"torch_loop": TorchLoop, "transformers": Transformers, "ntops_mla": Library}
    names = list(makers) if only is None else [only]
    left_out = {}
    if "transformers" in names and (reason := unavailable()) is not None:  # asked only where wanted: imports it
        if only is not None:
            raise UsageError(f"--implementation transformers: {reason}")
        left_out["transformers"] = reason
        names.remove("transformers")
    return [makers[name](mla) for name in names], left_out


def check_rows(rows, case, mla, weights) -> dict[str, measure.Check]:
    """Every row against float64; nothing without weights to compute it from."""
    if weights is None:
        return {}
    weight = mla.o_proj.weight
    histories = scenario.histories(mla.cfg, case, weight.device, weight.dtype)
    passes = measure.DECODE_CHECKS if case.name == "decode" else 1
    xs = measure.inputs(case, passes, mla.cfg.hidden_size, weight.device, weight.dtype)
    # MLA's parameters are in pairs, whatever order its checkpoint has.
    oracle = Float64MLA(dataclasses.replace(mla.cfg, rope_interleave=True), weights)
    expected = measure.reference(oracle, case, histories, xs)
    checks = {}
    for row in rows:
        check = checks[row.name] = measure.check(row, case, histories, xs, expected)
        verdict = "match" if check.passed else "MISMATCH"
        print(
            f"\t {case.name}: Attention {TITLES[row.name]} against float64: max error {check.max_error:.3g}, "
            f"cos_diff {check.cos_diff:.3g}: {verdict}"
        )
    return checks


def time_rows(args, rows, case, mla, checks) -> list[dict]:
    print(f"\n{'*' * 40} {case.name} {'*' * 40}")
    print(f"\t seqlens {_short(case.lengths)}, pastlens {_short(case.pasts)}")
    weight = mla.o_proj.weight
    histories = scenario.histories(mla.cfg, case, weight.device, weight.dtype)
    x = measure.inputs(case, 1, mla.cfg.hidden_size, weight.device, weight.dtype)[0]
    latencies = measure.measure(rows, case, histories, x, args.warmups, args.runs, progress_bar(case.name))
    results = []
    for row, latency in zip(rows, latencies):
        check = checks.get(row.name)
        result = {
            "scenario": case.name,
            "implementation": row.name,
            "latency_ms": latency,
            "tokens_per_s": case.tokens / latency * 1e3,
            "max_error": _number(check, "max_error"),
            "cos_diff": _number(check, "cos_diff"),
        }
        if isinstance(row, Library):
            result["choices"] = row.choices()
        results.append(result)
        line = f"\t WARMUPS={args.warmups} RUNS={args.runs}, Attention {TITLES[row.name]}"
        if case.name == "prefill":
            print(f"{line}: average latency per batch: {latency:.3f} ms")
        else:
            print(f"{line}: average throughput: {result['tokens_per_s']:.1f} tokens/s")
    return results


def _number(check: measure.Check | None, field: str) -> float | None:
    """None where nothing was checked, or where a result is not finite: JSON has no NaN."""
    value = None if check is None else getattr(check, field)
    return value if value is not None and math.isfinite(value) else None


def progress_bar(name: str):
    """Of a number of passes: a bar for what takes more than two seconds, where standard error is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:  # a convenience; nothing is lost without it
        return lambda count: contextlib.nullcontext(types.SimpleNamespace(update=lambda: None))
    return lambda count: tqdm(total=count, desc=name, delay=2, disable=None, leave=False)


def print_header(args, name, mla, detection, left_out) -> None:
    cfg = mla.cfg
    print("*" * 90)
    where = f"{detection.device}, interpreted" if is_interpreted(detection.device) else str(detection.device)
    print(f"Test Attention: MLA, {name}, {args.dtype} on {detection.platform.title} ({where})")
    print(f"\t platform {detection.platform.name}: {detection.reason}")
    print(
        f"\t hidden {cfg.hidden_size}, heads {cfg.num_heads}, q_lora_rank {cfg.q_lora_rank}, kv_lora_rank "
        f"{cfg.kv_lora_rank}, head {cfg.qk_nope_head_dim} + {cfg.qk_rope_head_dim} / {cfg.v_head_dim}; "
        f"threads {torch.get_num_threads()}, torch {torch.__version__}, seed {args.seed}"
    )
    for row, reason in left_out.items():
        print(f"\t row {row} left out: {reason}")
    print("*" * 90, flush=True)


def print_choices(results: list[dict]) -> None:
    for result in results:
        if "choices" in result:
            print(f"\nWhat ran each op of {TITLES[result['implementation']]} in {result['scenario']}, and why:")
            for op, choice in result["choices"].items():
                print(f"\t {op:14s} {choice['backend']:10s} {choice['reason']}")


def print_summary(results: list[dict], args, passed: bool) -> None:
    print(f"\n{'=' * 36} Test Summary {'=' * 36}")
    for case in ("prefill", "decode"):
        rows = {result["implementation"]: result for result in results if result["scenario"] == case}
        ours = rows.get("ntops_mla")
        for name, result in rows.items():
            ratio = ""
            if ours is not None and name != "ntops_mla":
                ratio = f"   ntops_mla is {result['latency_ms'] / ours['latency_ms']:.2f}x as fast"
            print(
                f"\t {case:8s} {TITLES[name]:13s} average latency per batch: {result['latency_ms']:10.3f} ms, "
                f"average throughput: {result['tokens_per_s']:10.1f} tokens/s{ratio}"
            )
    if args.no_check:
        print("\t not checked (--no-check)")
    else:
        print("\t all rows match float64" if passed else "\t MISMATCH: a row differs from float64, see above")


def check_writable(file: str) -> None:
    """Before the work, not after it."""
    folder = os.path.dirname(os.path.realpath(file))
    if not os.path.isdir(folder):
        raise UsageError(f"argument --json: folder {folder!r} does not exist")
    if os.path.isdir(file) or not os.access(file if is_special(file) else folder, os.W_OK):
        raise UsageError(f"argument --json: cannot write {file!r}")


def write_json(file: str, args, name: str, mla, detection, results: list[dict]) -> None:
    """Whole or not at all, where `file` is a regular file, or a link to one, or nothing yet. Anything else, a pipe or
    /dev/stdout say, is written to and stays what it is."""
    content = {
        "config": name,
        "device": str(detection.device),
        "platform": detection.platform.name,
        "interpreted": is_interpreted(detection.device),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "warmups": args.warmups,
        "runs": args.runs,
        "seed": args.seed,
        "rows": results,
    }
    text = json.dumps(content, indent=1) + "\n"
    if is_special(file):
        with open(file, "w", encoding="utf-8") as f:
            f.write(text)
        return
    checkout.write({pathlib.Path(file).resolve(): text})


def is_special(file: str) -> bool:
    """Whether it is there and is no regular file."""
    try:
        return not stat.S_ISREG(os.stat(file).st_mode)
    except OSError:  # nothing there, or a link to nothing
        return False


def _short(values: tuple[int, ...]) -> str:
    """[50] * 4 + ... instead of sixteen numbers."""
    parts, i = [], 0
    while i < len(values):
        n = next((k for k in range(i, len(values)) if values[k] != values[i]), len(values)) - i
        parts.append(f"{values[i]}" if n == 1 else f"{n} x {values[i]}")
        i += n
    return "[" + ", ".join(parts) + "]"


if __name__ == "__main__":
    sys.exit(main())
