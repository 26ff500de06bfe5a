"""Shared fixtures: fresh seeds, NaN in every uninitialised buffer, a dispatcher without memory."""

import os
import random
import zlib

import pytest
import torch

import ntops_mla.dispatch

# In processes of their own, which tests/test_interpreted.py and tests/test_simulated.py start.
collect_ignore = [] if os.environ.get("NTOPS_MLA_INTERPRET", "").strip() == "1" else ["interpreted"]
if not os.environ.get("NTOPS_MLA_TEST_BOARD"):
    collect_ignore.append("simulated")

# In the environment, so that all workers of a run have the same one
if not os.environ.get("NTOPS_MLA_TEST_SEED"):
    os.environ["NTOPS_MLA_TEST_SEED"] = str(random.SystemRandom().randrange(1 << 30))
_SEED = int(os.environ["NTOPS_MLA_TEST_SEED"])


def pytest_report_header():
    return f"NTOPS_MLA_TEST_SEED={_SEED} repeats this run's random inputs"


@pytest.fixture(autouse=True)
def _seed(request):
    """Fresh random inputs in every run and test; the header says how to repeat them."""
    torch.manual_seed(_SEED + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _poison():
    """`torch.empty` gives NaN, so that an element nobody wrote cannot look right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _fresh_dispatch():
    """No choice, failure or setting of one test reaches another."""
    ntops_mla.dispatch.reset()
    yield
    ntops_mla.dispatch.reset()
