#!/usr/bin/env bash
# bash scripts/gpu_check.sh [PART...]: checks and measures the kernels on the accelerator of this machine, of whatever
# platform, and leaves what was found in benchmarks/results/BOARD/. Parts, all of them unless some are named; one that
# fails does not keep the next from running:
#   report      python -m ntops_mla env and platforms
#   tests       tests/device without FlashMLA's cases, under NTOPS_MLA_STRICT=1
#   flash_mla   all of FlashMLA's dense correctness cases, likewise
#   sanitizer   compute-sanitizer over a few tests, where it is installed
#   benchmarks  benchmarks/*.py
#   bench       scripts/bench.py beside its peers, its plots, then its sweep over tiles
#   attention   scripts/attention_test.py with the numbers of configs A and R1
# Exit status 1 where a part failed, 2 where no accelerator works or a part is unknown.
#   NTOPS_MLA_DIRECT_PYTHON   a Python to use as it is, instead of .venv: for machines without internet
#   NTOPS_MLA_PYTEST_ARGS     more arguments for pytest, say "-n 4" where pytest-xdist is installed; one that chooses
#                             among the tests (-k graph, where a command may take ten minutes) makes the part "partial"
#   NTOPS_MLA_RESULTS         another folder than benchmarks/results
#   NTOPS_MLA_COMMIT          the commit, where the folder is no git repository
#   NTOPS_MLA_SANITIZER_TOOLS tools of compute-sanitizer, "memcheck" unless named
#   NTOPS_MLA_INTERPRET=1     a rehearsal on the CPU, in Triton's interpreter and at tiny sizes, into a temporary folder
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd "$here/.."

all_parts="report tests flash_mla sanitizer benchmarks bench attention"
[ "$#" -gt 0 ] || set -- $all_parts
for part in "$@"; do
    case " $all_parts " in
    *" $part "*) ;;
    *) echo "gpu_check.sh: no part '$part'; there are: $all_parts" >&2; exit 2 ;;
    esac
done

. scripts/environment.sh
unset NTOPS_MLA_TILES
rehearsal=0
[ "${NTOPS_MLA_INTERPRET:-0}" != 1 ] || rehearsal=1

# "PLATFORM BOARD", or why there is none.
if ! found=$("$python" -W ignore - <<'END'
import re
import sys

from ntops_mla import interpreter
from ntops_mla.devices import best_device, probe

if interpreter.enabled():
    print("cpu interpreter")
    sys.exit(0)
found = best_device()
if found.device.type == "cpu":
    print(found.reason)
    sys.exit(1)
name = probe(found.device).name or found.platform.name
print(found.platform.name, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
END
); then
    echo "gpu_check.sh: ${found:-$python cannot import ntops_mla}" >&2
    exit 2
fi
platform=${found%% *} board=${found##* }
if [ "$rehearsal" = 1 ]; then
    results=${NTOPS_MLA_RESULTS:-$(mktemp -d)}/$board
else
    results=${NTOPS_MLA_RESULTS:-benchmarks/results}/$board
fi
mkdir -p "$results"
echo "gpu_check.sh: $platform, board $board; results go to $results"

run_tests() { # NAME PATH...
    local name=$1
    shift
    # pytest's arguments are words of one variable.
    # shellcheck disable=SC2086
    NTOPS_MLA_STRICT=1 "$python" -m pytest -m device -q --durations=10 -p no:cacheprovider \
        --junitxml "$results/$name.xml" ${NTOPS_MLA_PYTEST_ARGS:-} "$@"
}

part_report() {
    "$python" -m ntops_mla env && "$python" -m ntops_mla platforms && "$python" -m ntops_mla env --json >"$results/env.json"
}

part_tests() {
    run_tests tests tests/device --ignore tests/device/test_device_flash_mla.py
}

part_flash_mla() {
    run_tests flash_mla tests/device/test_device_flash_mla.py
}

part_sanitizer() {
    local tool status=0
    if [ "$rehearsal" = 1 ] || ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed, or there is no device for it: left out"
        return 77
    fi
    # Where its way to the board is barred (a container without the right), that is nothing the kernels did.
    if ! compute-sanitizer --error-exitcode 3 "$python" -W ignore -c \
        'import torch; from ntops_mla.devices import best_device; torch.ones(1, device=best_device().device).tolist()'
    then
        echo "compute-sanitizer cannot run here: left out"
        return 77
    fi
    # Without PyTorch's cache of memory, so that each tensor is an allocation of its own and its ends are seen.
    for tool in ${NTOPS_MLA_SANITIZER_TOOLS:-memcheck}; do
        echo "-- $tool"
        NTOPS_MLA_STRICT=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --report-api-errors no \
            --error-exitcode 3 "$python" -m pytest -m device -q -x -p no:cacheprovider \
            tests/device/test_device_smoke.py || status=1
    done
    return "$status"
}

part_benchmarks() {
    local file name status=0
    for file in benchmarks/*.py; do
        name=$(basename "$file" .py)
        echo "-- $name"
        set -- --json "$results/$name.json"
        if [ "$name" = launch_overhead ] && ! "$python" -c 'import triton.backends.nvidia' 2>/dev/null; then
            echo "compiles for sm_90, which this Triton cannot: left out"
            continue
        fi
        if [ "$rehearsal" = 1 ]; then # these measure compiled code and PyTorch, and the interpreter is neither
            set -- --rounds 2 "$@"
            NTOPS_MLA_INTERPRET=0 "$python" "$file" "$@" || status=1
        else
            "$python" "$file" "$@" || status=1
        fi
    done
    return "$status"
}

part_bench() {
    local status=0
    set -- --json "$results/bench.json" --plots "$results"
    if [ "$rehearsal" = 1 ]; then # as above
        NTOPS_MLA_INTERPRET=0 "$python" scripts/bench.py --cpu --quick "$@"
        return
    fi
    NTOPS_MLA_STRICT=1 "$python" scripts/bench.py "--$platform" "$@" || status=1
    # Apart, since a tile may take the process with it.
    "$python" scripts/bench.py "--$platform" --tiles --json "$results/bench_tiles.json" || status=1
    return "$status"
}

part_attention() {
    local config status=0
    for config in a r1; do
        if [ "$rehearsal" = 1 ]; then
            set -- --cpu --backend kernel --tiny --runs 1 --warmups 0
        else
            set -- "--$platform"
        fi
        NTOPS_MLA_STRICT=1 "$python" scripts/attention_test.py "$@" --config "$config" \
            --json "$results/attention_$config.json" || status=1
    done
    return "$status"
}

# Keeps of earlier runs what was not run now: the parts may be run one at a time.
note() { # PART STATUS SECONDS
    "$python" -W ignore - "$results/check.json" "$board" "$platform" "$@" <<'END'
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import torch

from ntops_mla.version import __version__


def git(*args):
    try:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


path, board, platform, part, status, seconds = sys.argv[1:]
path = pathlib.Path(path)
content = json.loads(path.read_text()) if path.exists() else {}
commit = git("rev-parse", "--short", "HEAD")
if commit:
    # What the checks themselves write makes no other code of it.
    commit += "+" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""
row = {
    "result": {"0": "passed", "77": "left out"}.get(status, "failed"),
    "seconds": int(seconds),
    "date": datetime.date.today().isoformat(),
    "commit": commit or os.environ.get("NTOPS_MLA_COMMIT") or "unknown",
    "torch": torch.__version__,
    "triton": version("triton"),
    "ninetoothed": version("ninetoothed"),
    "ntops_mla": __version__,
    "python": ".".join(map(str, sys.version_info[:3])),
}
report = path.with_name(f"{part}.xml")
if part in ("tests", "flash_mla") and report.exists():
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    row.update({key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")})
    arguments = row["arguments"] = os.environ.get("NTOPS_MLA_PYTEST_ARGS", "").strip()
    everything = r"((-n|--dist|--tb|--durations)[ =]?\S+|-[vqs]+|\s+)*"  # how to run, not what
    if row["result"] == "passed" and not re.fullmatch(everything, arguments):
        row["result"] = "partial"
content.update(board=board, platform=platform)
content.setdefault("parts", {})[part] = row
path.write_text(json.dumps(content, indent=1) + "\n")
END
}

status=0
summary=""
for part in "$@"; do
    echo
    echo "== $part"
    begin=$SECONDS
    case $part in tests | flash_mla) rm -f "$results/$part.xml" ;; esac
    code=0
    "part_$part" || code=$?
    seconds=$((SECONDS - begin))
    note "$part" "$code" "$seconds" || code=1
    case $code in
    0) word=passed ;;
    77) word="left out" ;;
    *) word=FAILED status=1 ;;
    esac
    summary="$summary$(printf '%-12s%-10s%6d s' "$part" "$word" "$seconds")
"
done
echo
echo "== $platform, $board"
printf '%s' "$summary"
echo "results: $results"
exit "$status"
