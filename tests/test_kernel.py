"""The launch cache: what it hands over is what NineToothed's own launch would, and it keeps nothing alive."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

# A driver without a device, whose launcher notes what it is given; each test is a process, since the driver is global.
SETUP = """
import gc, weakref
import torch
from ntops_mla import interpreter, kernel
interpreter.install_driver()
import triton
given = []
class Launcher:
    def __init__(self, *args): ...
    def __call__(self, *args): given.append(args)
driver = triton.runtime.driver.active
driver.launcher_cls = Launcher
driver.utils.load_binary = lambda *args: (0, 0, 0, 0, 1024)
made = kernel.make("rms_norm", 4, 1, direct=True, width=512)
def arguments(tokens=3, offset=0):
    x = torch.zeros(tokens * 512 + offset)[offset:].view(tokens, 512)
    return x, torch.ones(512), 1e-6, torch.empty(tokens, 512)
"""


def run(script):
    """The script after SETUP, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP + script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_cache_hands_over_what_the_generated_launch_would():
    run("""
args = arguments()
made(*args)
made.plain(*args)
other = arguments()
made(*other)
made.plain(*other)
def form(call):
    head = 9  # grid, stream, function, metadata, hooks
    return [call[:4]] + [(a.data_ptr(), a.shape) if isinstance(a, torch.Tensor) else a for a in call[head:]]
assert len(given) == 4, len(given)
assert form(given[0]) == form(given[1]) and form(given[2]) == form(given[3])
assert form(given[0]) != form(given[2])  # other tensors, and not the first ones again
assert len(made._launches) == 1
""")


def test_alignment_shape_and_numbers_make_launches_of_their_own():
    run("""
for args in (arguments(), arguments(5), arguments(offset=1), (*arguments()[:2], 1e-5, arguments()[3])):
    made(*args)
assert len(made._launches) == 4
assert given[0][0] == 3 and given[1][0] == 5  # the grid
""")


def test_tensors_are_not_kept_alive():
    run("""
args = arguments()
gone = [weakref.ref(a) for a in args if isinstance(a, torch.Tensor)]
made(*args)
made(*args)
given.clear()
del args
gc.collect()
assert [ref() for ref in gone] == [None] * 3
""")


def test_a_tensor_given_twice_is_two_arguments():
    run("""
rope = kernel.make("rope", 4, 1, direct=True, block_h=4, width=64)
q, cos, sin, out = torch.zeros(3, 4, 64), torch.ones(3, 32), torch.zeros(3, 32), torch.empty(3, 4, 64)
rope(q, cos, cos, out)
rope(q, cos, sin, out)
pointers = [a.data_ptr() for a in given[1] if isinstance(a, torch.Tensor)]
assert sorted(pointers) == sorted(t.data_ptr() for t in (q, cos, sin, out))
""")


def test_decode_in_one_dtype_is_not_launched_for_another():
    run("""
import importlib
from ntops_mla import ops
from ntops_mla.board import Board
from ntops_mla.platform import get_platform
prepare, prepared = kernel.Kernel._prepare, []
def noting(self, args):
    # Behind its out: lse, and mla_decode's whole
    out = args[{"mla_decode": -3, "mla_combine": -2}[self.name]]
    prepared.append((self.name, args[0].dtype, out.dtype))
    return prepare(self, args)
kernel.Kernel._prepare = noting
platform = get_platform("nvidia")
board = Board(platform, platform.limits_for((9, 0)), None, 132)
op = ops.get("mla_decode")
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
    args = op.example("cpu", dtype, tokens=2, heads=16)
    op.spec.kernel(board, *args[:-2], 4, None)
    op.spec.kernel(board, *args)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    assert ("mla_decode", dtype, torch.float32) in prepared and ("mla_decode", dtype, dtype) in prepared, prepared
    assert ("mla_combine", torch.float32, dtype) in prepared, prepared
""")


def test_the_cache_is_bounded():
    run("""
kernel._MAX_LAUNCHES = 4
for tokens in range(1, 12):
    made(*arguments(tokens))
assert 1 <= len(made._launches) <= 4 and len(given) == 11
""")


def test_a_platform_that_was_not_tried_launches_through_triton():
    run("""
from ntops_mla.board import Board
from ntops_mla.platform import get_platform
import torch
for name, direct in (("nvidia", True), ("moore", False), ("metax", False), ("iluvatar", False)):
    board = Board(get_platform(name))
    assert board.make("rms_norm", board.tile("rms_norm", torch.float32, width=512), width=512)._direct is direct, name
""")


def test_options_and_variables_reach_the_compiler_of_a_direct_launch():
    run("""
import os
variables = (("NTOPS_X", "1", ()), ("NTOPS_Y", "1", ("bfloat16",)))
own = kernel.make("rms_norm", 4, 1, (("maxnreg", 64),), variables, True, width=512)
seen, stock = [], own.function.warmup
def warmup(*args, **keywords):
    seen.append((keywords["maxnreg"], os.environ.get("NTOPS_X"), os.environ.get("NTOPS_Y")))
    return stock(*args, **keywords)
own.function.warmup = warmup
own(*arguments())
assert seen == [(64, "1", None)], seen
assert "NTOPS_X" not in os.environ
""")
