#!/usr/bin/env bash
# bash scripts/triton_matrix.sh [VERSION...]: the kernels' numerics (Triton's interpreter) and compilation under several
# Tritons: 3.1.0, 3.2.0, 3.6.0 and the one in .venv, unless versions are named. Vendors ship 3.0 to 3.6.
# Each gets an environment of its own in .triton/, with its Triton and the NumPy that it can do with; all else comes from
# .venv. What was found is left in benchmarks/evidence/, from which README's table is made.
set -eu
for version in "$@"; do
    case $version in
        [0-9]*.[0-9]*) ;;
        *) echo "triton_matrix.sh: '$version' is no version of Triton: bash scripts/triton_matrix.sh [VERSION...]" >&2; exit 2 ;;
    esac
done
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd "$here/.."
bash scripts/bootstrap.sh
installed=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("triton"))')
[ "$#" -gt 0 ] || set -- 3.1.0 3.2.0 3.6.0 "$installed"
status=0
for version in "$@"; do
    if [ "$version" = "$installed" ]; then
        python=.venv/bin/python
    else
        python=.triton/$version/bin/python
        if [ ! -x "$python" ]; then
            # Triton 3.1 computes silently wrong with NumPy 2, 3.2 and 3.6 raise with 2.4
            case $version in 3.0* | 3.1*) numpy='numpy<2' ;; *) numpy='numpy<2.4' ;; esac
            rm -rf ".triton/$version.new"
            .venv/bin/python -m venv ".triton/$version.new"
            ".triton/$version.new/bin/python" -m pip install --quiet --disable-pip-version-check \
                "triton==$version" "$numpy" setuptools
            mv ".triton/$version.new" ".triton/$version"
            # Behind its own packages: those of .venv
            .venv/bin/python -c 'import site; print(site.getsitepackages()[0])' \
                > "$("$python" -c 'import site; print(site.getsitepackages()[0])')/of_venv.pth"
        fi
    fi
    echo "== Triton $version"
    "$python" scripts/evidence.py || status=$?
done
exit "$status"
