"""Each op once on the device, by its kernel: also what a memory checker is run over, so small and without graphs."""

import pytest
import torch

from ntops_mla import dispatch, interpreter, ops
from tests.device.on_device import DTYPES, NAMES, arguments, check_outcome, on, outcome
from tests.test_ops import decode_inputs, name_of, prefill_inputs

pytestmark = pytest.mark.device


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", NAMES)
def test_each_op(device, name, dtype):
    args = arguments(name, dtype)
    check_outcome(name, args, outcome(name, on(device, args)))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_runs_the_kernel_of_every_op(device, name):
    """Whatever the other gates are: bfloat16 is what the models come in."""
    args = on(device, arguments(name, torch.bfloat16))
    with dispatch.record() as ran:
        getattr(ops, name)(*args)
    choice = ran[name]
    assert choice.backend == "kernel" and choice == getattr(ops, name).explain(*args)
    assert ("interpreter" in choice.reason) == interpreter.enabled()


@pytest.mark.parametrize("rows", [1, 3, 20, 64])
def test_decode_with_every_tile(device, rows):
    """The tables choose by rows; in one split and in three."""
    for num_splits in (1, 3):
        args = [*decode_inputs([70, 0, 33], heads=rows, page_size=64, dtype=torch.bfloat16), True, num_splits]
        check_outcome("mla_decode", args, outcome("mla_decode", on(device, args)))


@pytest.mark.parametrize("dqk, dv", [(192, 128), (256, 256)])
def test_prefill_with_every_tile(device, dqk, dv):
    args = [*prefill_inputs([40, 0, 3], [50, 2, 3], heads=2, dqk=dqk, dv=dv, dtype=torch.bfloat16), True]
    check_outcome("mla_prefill", args, outcome("mla_prefill", on(device, args)))


def test_new_memory_is_poisoned(device):
    """What the other tests rely on."""
    assert torch.empty(3, 5, device=device).isnan().all()
    assert torch.empty(3, 5, device=device, dtype=torch.bfloat16).isnan().all()
