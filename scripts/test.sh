#!/usr/bin/env bash
# bash scripts/test.sh: sets up .venv where needed, then checks the style and runs the tests.
# bash scripts/test.sh ARGS...: pytest with ARGS alone; paths are relative to the repository's root.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bash "$here/bootstrap.sh"
cd "$here/.."
python=.venv/bin/python
if [ "$#" -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
# Both checks, then the tests, even where one fails: one run tells everything.
status=0
"$python" -m ruff format --check --quiet . || { echo "style: run .venv/bin/python -m ruff format ."; status=1; }
"$python" -m ruff check --quiet . || status=1
# A file stays with one worker, since fixtures of whole files are dear; more than four workers only wait for each other.
workers=$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')
# Threads of several workers on one processor wait for each other: three times as long.
threads=$("$python" -c "import os; print(max(1, (os.cpu_count() or 1) // $workers))")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
"$python" -m pytest -q --durations=10 -n "$workers" --dist loadfile || status=$?
exit "$status"
