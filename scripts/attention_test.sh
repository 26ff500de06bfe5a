#!/usr/bin/env bash
# bash scripts/attention_test.sh [flags]: sets up .venv where needed, then runs attention_test.py with the flags.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
bash "$here/bootstrap.sh"
# No cd: paths in the flags are relative to where the caller stands.
exec "$here/../.venv/bin/python" "$here/attention_test.py" "$@"
