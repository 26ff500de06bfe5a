"""What a vendor's board gets: its device, gates, limits, tiles and launch options, and kernels that compute there."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vendor_board
from torch.utils._python_dispatch import TorchDispatchMode

import attention_test
import ntops_mla
from conftest import SHOW, example
from ntops_mla import board as boards
from ntops_mla import devices, dispatch, doctor, flash_mla, ops
from ntops_mla.interpreter import enabled
from ntops_mla.platform import best_device, detect, device_module, synchronize
from ntops_mla.testing import Float64MLA

FAKES = Path(vendor_board.__file__).parent
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CFG = ntops_mla.MLAConfig(
    hidden_size=128, num_heads=2, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128,
)  # fmt: skip


def test_the_board_is_found_by_its_own_marks(platform, device):
    found = best_device()
    assert (found.platform, found.device) == (platform, device)
    assert device == torch.device(SHOW.device_type, 0)
    assert not enabled(), "the dispatcher knows nothing of the interpreter"
    board = boards.board_of(detect(device))
    assert board.problem is None and board.device == SHOW.name and board.triton_version == SHOW.triton
    assert board.limits is platform.limits_for(SHOW.capability)


def test_tensors_and_the_cache_lie_on_the_board(device):
    cache = ntops_mla.LatentCache(CFG, num_pages=4, page_size=16, device=device, dtype=torch.bfloat16)
    step = cache.step([1], [3])
    for tensor in (cache.kv_cache[0], cache.pe_cache[0], step.block_table, step.seq_lens):
        assert tensor.device.type == ("musa" if SHOW.device_type == "musa" else "cpu"), (
            "there is no cuda on a CPU torch"
        )
    assert device_module(device) is getattr(torch, SHOW.device_type)
    if SHOW.device_type == "musa":
        assert device_module(device).is_current_stream_capturing() is False
    synchronize(device)


def test_streams_and_graphs_are_asked_of_the_boards_own_module(device, monkeypatch):
    module, asked = getattr(torch, SHOW.device_type), []
    assert SHOW.device_type in (devices.graph_problem(device) or SHOW.device_type)
    for name in (f"{SHOW.device_type.upper()}Graph", "graph"):
        monkeypatch.setattr(module, name, None, raising=False)
    assert devices.graph_problem(device) is None
    stream = SimpleNamespace(wait_stream=asked.append)
    monkeypatch.setattr(module, "Stream", lambda: stream, raising=False)
    monkeypatch.setattr(module, "current_stream", lambda: "the current one", raising=False)
    monkeypatch.setattr(module, "stream", lambda one: asked.append(one) or contextlib.nullcontext(), raising=False)
    monkeypatch.setattr(module, "device", lambda one: asked.append(one) or contextlib.nullcontext(), raising=False)
    with devices.side_stream(device):
        pass
    assert asked == [device, "the current one", stream]


def test_triton_tells_target_and_limits():
    from triton.runtime import driver

    target = driver.active.get_current_target()
    assert (target.backend, target.arch, target.warp_size) == SHOW.target
    assert driver.active.utils.get_device_properties(0)["max_shared_mem"] == SHOW.shared_memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.names())
def test_the_kernel_of_every_op_computes_there(platform, device, tried, launches, name, dtype):
    """As `doctor` tries it: small calls that take every tile; compared with float64 on the CPU."""
    found = doctor.examine(name, dtype, device)
    if platform.gate(name, dtype).mode == "reference":
        assert found == {"works": None, "reason": ops.get(name).explain(*example(name, device, dtype)).reason}
        assert launches == []
        return
    assert (found["works"], found["reason"]) == (True, "")
    limits, kind = platform.limits_for(SHOW.capability), str(dtype).removeprefix("torch.")
    # mla_decode's tile is as its rows are
    tiles = {
        (tile.num_warps, tile.num_stages)
        for tile in platform.tiles
        if tile.kernel == name and limits.arch in (tile.arch or (limits.arch,)) and kind in (tile.dtypes or (kind,))
    }
    if name == "mla_decode":
        assert {launch["kernel"] for launch in launches} == {"mla_decode", "mla_combine"}
    if name == "latent_append":
        assert {launch["kernel"] for launch in launches} == {"latent_append", "latent_append_rope"}
    if name == "latent_append_fp8":
        assert {launch["kernel"] for launch in launches} == {"latent_append_fp8", "latent_append_fp8_rope"}
    mine = [launch["options"] for launch in launches if launch["kernel"] == name]
    assert mine
    for options in mine:
        assert (options["num_warps"], options["num_stages"]) in tiles
        assert options["num_warps"] <= limits.max_warps.value


@pytest.mark.parametrize("name", ops.names())
def test_choices_name_the_board(platform, device, tried, name):
    args = example(name, device)
    with dispatch.record() as ran, ntops_mla.use(strict=True):
        getattr(ops, name)(*args)
    assert (ran[name].platform, ran[name].backend) == (platform.name, "kernel")
    assert ran[name].reason == "the platform's kernel"


def attention(name, device):
    getattr(ops, name)(*example(name, device))


@pytest.mark.parametrize("name", ["mla_decode", "mla_prefill"])
def test_launch_options_that_this_triton_knows(device, tried, launches, triton_is, name, monkeypatch):
    monkeypatch.delenv("MUSA_ENABLE_SQMMA", raising=False)
    scenario = {"mla_decode": "mla", "mla_prefill": "flashattn-fwd"}[name] if SHOW.platform == "metax" else None
    # Triton 3.6's compiler for MUSA does not read the variable
    sqmma = "1" if SHOW.platform == "moore" and SHOW.triton < "3.6" else None
    attention(name, device)
    (launch,) = [launch for launch in launches if launch["kernel"] == name]
    float32 = [] if SHOW.platform == "iluvatar" else [example(name, device, torch.float32)]
    for args in float32:
        getattr(ops, name)(*args)
        assert launches[-1]["sqmma"] is None, "it is for two-byte inputs"
    assert (launch["options"].get("scenario"), launch["sqmma"]) == (scenario, sqmma)
    assert set(launch["options"]) == {"num_warps", "num_stages"} | ({"scenario"} if scenario else set())
    assert "MUSA_ENABLE_SQMMA" not in os.environ, "other kernels have not asked for it"


@pytest.mark.skipif(SHOW.platform != "metax", reason="the one platform with a keyword of its own that is passed")
def test_a_triton_that_does_not_know_an_option_gets_none(device, tried, launches, monkeypatch):
    monkeypatch.setattr(vendor_board.state, "show", dataclasses.replace(SHOW, options=()))
    from triton.backends import backends

    monkeypatch.setitem(backends, "metax", SimpleNamespace(compiler=vendor_board._compiler(), driver=None))
    dispatch.reset()  # the board is looked at anew
    attention("mla_prefill", device)
    assert set(launches[0]["options"]) == {"num_warps", "num_stages"}


@pytest.mark.skipif(SHOW.platform != "moore", reason="a variable of Moore's compiler")
def test_a_variable_that_the_user_has_set_stays(device, launches, monkeypatch):
    monkeypatch.setenv("MUSA_ENABLE_SQMMA", "0")
    attention("mla_decode", device)
    assert launches[0]["sqmma"] == "0" and os.environ["MUSA_ENABLE_SQMMA"] == "0"


def test_mla_over_two_steps(device, tried):
    """Prefill and decode, as a user writes them, against float64 on the CPU."""
    mla = ntops_mla.MLA(CFG, device=device, dtype=torch.bfloat16).requires_grad_(False)
    cache = ntops_mla.LatentCache(CFG, num_pages=8, page_size=16, device=device, dtype=torch.bfloat16)
    x = torch.randn(9, CFG.hidden_size, dtype=torch.bfloat16)
    with dispatch.record() as ran, ntops_mla.use(strict=True), torch.no_grad():
        first = mla(x[:7].to(device), cache.step([5, 6], [4, 3]))
        then = mla(x[7:].to(device), cache.step([5, 6], [1, 1]))
    assert {choice.platform for choice in ran.values()} == {SHOW.platform}
    assert {choice.backend for choice in ran.values()} == {"kernel"}
    weights = {name: value.detach().cpu() for name, value in mla.named_parameters()}
    exact = Float64MLA(CFG, weights)
    for request, (rows, last) in enumerate(((slice(0, 4), 7), (slice(4, 7), 8))):
        out, _ = exact(torch.cat([x[rows], x[last : last + 1]]))
        mine = torch.cat([first[rows], then[request : request + 1]])
        scale = out.abs().max()
        assert ((mine.cpu().double() - out).abs().max() / scale) < 0.03


class Launched(TorchDispatchMode):
    """What PyTorch launches a kernel for: no views, no allocation, and of our ops what they launch themselves."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "ntops_mla" and not function.is_view and "empty" not in function.__name__:
            self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(SHOW.device_type != "musa", reason="PyTorch's own launches are those of a CPU there")
@pytest.mark.parametrize("kv_format", [None, "fp8"])
@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_a_decode_step_launches_few_kernels(device, launches, q_lora_rank, kv_format):
    """No copy, no concatenation, nothing that waits for the device; the step's plan is made once for all layers."""
    cfg = dataclasses.replace(CFG, q_lora_rank=q_lora_rank)
    made = {"device": device, "dtype": torch.bfloat16}
    mla = ntops_mla.MLA(cfg, **made).requires_grad_(False)
    cache = ntops_mla.LatentCache(cfg, num_pages=8, page_size=16, kv_format=kv_format, **made)
    for _ in range(2):  # the first step makes the absorbed weights
        step, x = cache.step([5, 6], [1, 1]), torch.randn(2, cfg.hidden_size, dtype=torch.bfloat16).to(device)
        launches.clear()
        with Launched() as launched, torch.no_grad():
            mla(x, step)
    own = [launch["kernel"] for launch in launches]
    over = ["latent_append_rope", "mla_decode"] if kv_format is None else ["latent_append_fp8_rope", "mla_decode_fp8"]
    assert own == ["rms_norm"] * (q_lora_rank is not None) + over, "one split: no combine"
    # q and kv_a in one product; (q_b;) absorb; value up-projection; o_proj
    projections = ["mm"] * (1 if q_lora_rank is None else 2)
    assert launched.names == [*projections, "bmm", "bmm", "mm"]


def test_flash_mlas_functions(device, tried):
    _, on_cpu = next(doctor.small_calls("mla_decode", torch.bfloat16))
    args = doctor.moved(on_cpu, device)
    q, pages = torch.cat(args[:2], -1), torch.cat(args[2:4], -1)[:, :, None]
    metadata, splits = flash_mla.get_mla_metadata(args[5], 16, 1)
    with dispatch.record() as ran:
        result = flash_mla.flash_mla_with_kvcache(
            q, pages, args[4], args[5], 512, metadata, splits, softmax_scale=args[6], causal=True
        )
    assert (ran["mla_decode"].platform, ran["mla_decode"].backend) == (SHOW.platform, "kernel")
    doctor.compare("mla_decode", on_cpu, args, result)


def test_attention_test(device, tried, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--tiny", "--runs", "1", "--warmups", "0", "--implementation", "ntops_mla", "--json", str(report)]
    status = attention_test.main([f"--{SHOW.platform}", *arguments])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "all rows match float64" in said
    data = json.loads(report.read_text())
    assert (data["platform"], data["device"]) == (SHOW.platform, str(device))
    chosen = [choice for row in data["rows"] for choice in row["choices"].values()]
    assert chosen and {choice["backend"] for choice in chosen} == {"kernel"}
    assert {choice["platform"] for choice in chosen} == {SHOW.platform}


def test_ops_called_through_ntops(device, tried, monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES / "ntops_stub"))
    assert ntops_mla.register()["mla_decode"] in ("added", "present")
    import ntops.torch

    args = example("mla_decode", device)
    choice = ntops.torch.mla_decode.explain(*args)
    assert (choice.platform, choice.backend) == (SHOW.platform, "kernel")
    for mine, theirs in zip(ops.mla_decode(*args), ntops.torch.mla_decode(*args)):
        assert torch.equal(mine.cpu(), theirs.cpu())


def test_a_first_explain_imports_no_triton():
    """And says that it has not asked it. 5 ms are allowed; what is looked at is not timed here."""
    code = """
import sys
import ntops_mla
from ntops_mla import ops
from ntops_mla.platform import best_device
device = best_device().device
args = ops.get("rms_norm").example(device)
choice = ops.rms_norm.explain(*args)
assert "triton" not in sys.modules
assert choice.backend == "kernel", choice
assert choice.reason.startswith("the platform's kernel; Triton ") and choice.reason.endswith(" was not asked"), choice
ops.rms_norm(*args)
choice = ops.rms_norm.explain(*args)
assert choice.reason == "the platform's kernel", choice
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("command", ["env", "platforms", "explain"])
def test_commands_speak_of_the_board(command):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ntops_mla", command, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(done.stdout)
    if command == "env":
        assert data["platform"]["name"] == SHOW.platform and data["device"]["name"] == SHOW.name
        assert data["device"]["triton_target"] == "{}:{}, {} lanes".format(*SHOW.target)
    elif command == "platforms":
        assert [row["name"] for row in data if row["works"]] == [SHOW.platform, "cpu"]
    else:
        assert {row["platform"] for row in data} == {SHOW.platform}
