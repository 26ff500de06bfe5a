"""`tune` on a board that is not there: kernels are tried in the interpreter, and a clock of the test times them."""

import dataclasses
import itertools
import json
import os

import pytest
import torch
import vendor_board

from conftest import SHOW, example
from ntops_mla import board as boards
from ntops_mla import child, dispatch, ops, tile_table, tuning, tuning_trial
from ntops_mla.__main__ import main
from ntops_mla.platform import detect

BOARD = os.environ["NTOPS_MLA_TEST_BOARD"]
LOAD = ("--batch", "1", "--keys", "40", "--tokens", "4")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few candidates and rounds, and a clock by which each piece of work takes less than the last one; what it ran."""
    seen, ran = [], set()

    def measure(work):
        vendor_board.state.launches.clear()
        work()
        ran.update(launch["kernel"] for launch in vendor_board.state.launches)
        if work not in seen:
            seen.append(work)
        return 100.0 - seen.index(work)

    around = tuning._around
    monkeypatch.setattr(tuning, "_around", lambda centre: itertools.islice(around(centre), 3))
    monkeypatch.setattr(tuning, "Clock", lambda device: measure)
    monkeypatch.setattr(tuning, "WARMUPS", 1)
    monkeypatch.setattr(tuning, "ROUNDS", 2)
    monkeypatch.setattr(tuning_trial, "_SMALL", tuning_trial.Load(batch=2, keys=40, tokens=3))
    return ran


@pytest.fixture
def here(monkeypatch):
    """Trials in this process, which has the board already; questions asked."""
    asked = []

    def ask(arguments, environment, timeout):
        assert arguments[:2] == ["tune", "--child"] and tile_table.VARIABLE not in environment
        asked.append(json.loads(arguments[2]))
        vendor_board.state.launches.clear()
        answer = tuning_trial.examine(asked[-1])
        for launch in vendor_board.state.launches:
            if launch["kernel"] == asked[-1]["case"]["kernel"]:
                for name in ("num_warps", "num_stages"):
                    assert launch["options"][name] == asked[-1]["tile"][name], "another tile was tried"
        return answer

    monkeypatch.setattr(child, "ask", ask)
    return asked


@pytest.fixture
def only(monkeypatch):
    """Tune one case: the kernel's first, in bfloat16."""

    def choose(kernel):
        case = next(case for case in tuning.cases([torch.bfloat16]) if case.kernel == kernel)
        if "heads" in case.call:
            case = dataclasses.replace(case, call={**case.call, "heads": 16})
        monkeypatch.setattr(tuning, "cases", lambda dtypes, names: [case])
        return case

    return choose


# The attention kernels are slow in the interpreter: on one board each
KERNELS = ("rms_norm", *{"moore": ["mla_decode"], "moore-s4000": ["mla_combine"]}.get(BOARD, ()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_table_is_made_and_taken(device, tried, quick, here, only, launches, monkeypatch, tmp_path, capsys, kernel):
    case, path = only(kernel), tmp_path / "table.json"
    assert main(["tune", *LOAD, "--output", str(path), "--json", str(tmp_path / "all.json")]) == 0
    said = capsys.readouterr().out
    assert f"{tile_table.VARIABLE}={path}" in said and "1 of 1 tiles are better" in said
    assert quick == {kernel}, "only the launches that the tile bears on are timed"
    table = json.loads(path.read_text())
    assert (table["platform"], table["device"], table["triton"]) == (SHOW.platform, SHOW.name, SHOW.triton)
    (row,) = table["rows"]
    before = row["before"]
    assert row["microseconds"] < before["microseconds"] == 100
    (told,) = json.loads((tmp_path / "all.json").read_text())["cases"]
    assert len(told["candidates"]) == len(here) > 1 and all(one["works"] for one in told["candidates"])

    args = example(case.op, device, **case.call)
    args = (*args[:-2], 2, None) if case.op == "mla_decode" else args
    for tiles, wanted in (("", before), (str(path), row)):
        monkeypatch.setenv(tile_table.VARIABLE, tiles)
        dispatch.reset()
        tile = boards.board_of(detect(device)).tile(kernel, torch.bfloat16, **case.point)
        assert tuning.tile_data(tile) == {name: wanted[name] for name in ("blocks", "num_warps", "num_stages")}
        launches.clear()
        getattr(ops, case.op)(*args)
        (launch,) = [launch for launch in launches if launch["kernel"] == kernel]
        assert launch["options"]["num_warps"] == wanted["num_warps"]
        assert launch["options"]["num_stages"] == wanted["num_stages"]


def test_a_wrong_and_a_failing_tile_are_dropped(device, here, only, monkeypatch, tmp_path, capsys):
    """The platform's fails, the next is wrong: one that is left takes its place, and the reasons are told."""
    only("rms_norm")
    answers = child.ask

    def fault(kernel, args):
        if len(here) == 1:
            raise RuntimeError("this compiler does not know that")
        if len(here) == 2:
            next(arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2).zero_()  # the input

    def ask(*question):
        vendor_board.state.fault = fault
        try:
            return answers(*question)
        finally:
            vendor_board.state.fault = None

    monkeypatch.setattr(child, "ask", ask)
    path = tmp_path / "table.json"
    assert main(["tune", *LOAD, "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert "RuntimeError: this compiler does not know that" in said and "elements differ" in said
    (row,) = json.loads(path.read_text())["rows"]
    assert row["before"] is None and row["num_warps"] == here[-1]["tile"]["num_warps"]


def test_what_dispatch_refuses_is_never_tried(platform, device, only, monkeypatch, tmp_path):
    """Nobody has run `doctor` here: on a board whose compiler may end the process, no small product is launched."""
    limits = platform.limits_for(SHOW.capability)
    only("mla_decode")
    asked = []

    def ask(arguments, environment, timeout):
        asked.append(json.loads(arguments[2])["tile"]["blocks"])
        return {"works": False, "reason": "not tried by this test"}

    monkeypatch.setattr(child, "ask", ask)
    main(["tune", *LOAD, "--output", str(tmp_path / "table.json")])
    least = limits.least_product.value if limits.least_product else 0
    assert bool(asked) == (least == 0), "the nearest tiles are all too small there"
    assert all(min(blocks["block_h"], blocks["block_n"]) >= least for blocks in asked)
    assert list(tmp_path.iterdir()) == []


def test_stopped_halfway_nothing_is_left(device, here, only, monkeypatch, tmp_path, capsys):
    only("rms_norm")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "take_turns", stop)
    assert main(["tune", *LOAD, "--output", str(tmp_path / "table.json")]) == 130
    assert list(tmp_path.iterdir()) == [] and "nothing was written" in capsys.readouterr().out


@pytest.mark.skipif(SHOW.platform != "metax", reason="a process of its own takes seconds, and is alike on all boards")
def test_a_tile_that_ends_the_process(device, only, monkeypatch):
    """A real child: it is gone, the tuner is not."""
    case = only("rms_norm")
    plan = tuning.plan(boards.board_of(detect(device)), case)
    assert tuning.trial(case, plan.tiles[0], tuning_trial.Load(1, 40, 4), device, 300)["works"] is True
    monkeypatch.setenv(vendor_board.ABORT, "rms_norm")
    answer = tuning.trial(case, plan.tiles[0], tuning_trial.Load(1, 40, 4), device, 300)
    assert answer["works"] is False and "ended by SIGABRT" in answer["reason"]
