#!/usr/bin/env bash
# Makes .venv in the repository's root ready, or finds that it is. All the work is in bootstrap.py; this file only finds
# a Python to run it with.
#   --again           do every step although nothing changed
#   --offline DIR     take all packages from the wheels in DIR, and ask no index
#   --carry           list what DIR must hold for this machine, and how to fetch it where there is a network
#   NTOPS_MLA_PYTHON  the Python to build on (default: the first with a torch that is new enough, else the first)
#   NTOPS_MLA_TORCH   what to install where there is no torch (a pip requirement)
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv_python=$here/../.venv/bin/python

new_enough() { # it may exist and still not run: pyenv's shims, a venv whose Python is gone
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# Quick way out. -I -S: bootstrap.py needs the standard library only, so no time goes into site-packages.
if [ -x "$venv_python" ] && new_enough "$venv_python" && "$venv_python" -I -S "$here/bootstrap.py" --check "$@"; then
    exit 0
fi

if [ -n "${NTOPS_MLA_PYTHON:-}" ]; then
    pythons=("$NTOPS_MLA_PYTHON")
else
    pythons=(python3 python python3.13 python3.12 python3.11 python3.10)
fi
for python in "${pythons[@]}"; do
    if new_enough "$python"; then
        exec "$python" "$here/bootstrap.py" "$@"
    fi
done
if [ -n "${NTOPS_MLA_PYTHON:-}" ]; then
    echo "ntops_mla: NTOPS_MLA_PYTHON=$NTOPS_MLA_PYTHON is not a Python 3.10 or newer that runs" >&2
else
    echo "ntops_mla: no Python 3.10 or newer found: install one, or name one with NTOPS_MLA_PYTHON" >&2
fi
exit 2
