# Sourced, in the repository's root, by scripts that check a machine: sets $python, .venv's unless NTOPS_MLA_DIRECT_PYTHON
# names one, and leaves what runs to be decided by the script alone.
if [ -n "${NTOPS_MLA_DIRECT_PYTHON:-}" ]; then
    python=$NTOPS_MLA_DIRECT_PYTHON
else
    bash scripts/bootstrap.sh
    python=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Some vendors' images set it, and PyTorch's float32 products are then none.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
unset NTOPS_MLA_BACKEND NTOPS_MLA_PLATFORM NTOPS_MLA_STRICT
