"""scripts/attention_test.py: what it prints, writes and returns."""

import builtins
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import attention_test
from attention_rows import interpreter, measure, transformers_row
from ntops_mla import MLA, MLAConfig
from ntops_mla.ops import get
from tests.fakes.boards import Machine

SCRIPT = Path(attention_test.__file__)
TINY = ["--cpu", "--tiny", "--runs", "1", "--warmups", "0"]


def run(capsys, *flags) -> tuple[int, str, str]:
    status = attention_test.main([*TINY, *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_row_is_checked_and_timed(capsys, tmp_path):
    file = tmp_path / "result.json"
    status, out, _ = run(capsys, "--json", str(file))
    assert status == 0
    for words in ("average latency per batch", "average throughput", "Test Summary", "all rows match float64"):
        assert words in out
    result = json.loads(file.read_text())
    assert result["device"] == result["platform"] == "cpu"
    assert result["config"] == "a-tiny" and result["dtype"] == "bfloat16"
    assert result["threads"] == torch.get_num_threads()
    rows = {(row["scenario"], row["implementation"]): row for row in result["rows"]}
    implementations = {"torch_loop", "ntops_mla"} | ({"transformers"} if not transformers_row.unavailable() else set())
    assert set(rows) == {(s, i) for s in ("prefill", "decode") for i in implementations}
    for row in rows.values():
        assert row["latency_ms"] > 0 and row["tokens_per_s"] > 0
        assert 0 < row["max_error"] < 0.1 and 0 < row["cos_diff"] < measure.COS_DIFF[torch.bfloat16]
    assert result["interpreted"] is False
    # what ran, and nothing else: config a has no q LoRA and so no norm of its own, decode no prefill
    ran = {scenario: rows[scenario, "ntops_mla"]["choices"] for scenario in ("prefill", "decode")}
    assert set(ran["decode"]) == {"latent_append", "mla_decode"}
    assert {"latent_append", "mla_prefill"} <= set(ran["prefill"]) <= {*ran["decode"], "mla_prefill"}
    for choices in ran.values():
        assert all(choice["backend"] == "reference" and choice["reason"] for choice in choices.values())
    assert "choices" not in rows["decode", "torch_loop"]
    for scenario in ran:
        assert f"What ran each op of ntops_mla in {scenario}, and why" in out
    assert "rms_norm" not in out


def test_the_norm_of_r1_is_among_what_ran(capsys, tmp_path):
    file = tmp_path / "result.json"
    run(capsys, "--config", "r1", "--no-check", "--implementation", "ntops_mla", "--json", str(file))
    assert all("rms_norm" in row["choices"] for row in json.loads(file.read_text())["rows"])


@pytest.mark.parametrize("config", ["a", "r1"])
@pytest.mark.parametrize("dtype", ["fp32", "float16"])
def test_dtypes_and_configs(capsys, config, dtype):
    status, out, _ = run(capsys, "--config", config, "--dtype", dtype)
    assert status == 0, out


@pytest.mark.parametrize("name", attention_test.IMPLEMENTATIONS)
def test_one_row_only(capsys, name):
    if name == "transformers" and (reason := transformers_row.unavailable()):
        pytest.skip(reason)
    status, out, _ = run(capsys, "--implementation", name)
    assert status == 0
    assert sum(f"Attention {title}:" in out for title in attention_test.TITLES.values()) == 1


def change_append(monkeypatch, factor):
    """latent_append's rotated queries are wrong by a factor."""
    op = get("latent_append")
    right = op.spec

    def wrong(*args):
        right.reference(*args)
        args[7].mul_(factor)

    monkeypatch.setattr(op, "spec", right.__class__(right.name, right.key, wrong, right.supports))


def test_a_wrong_row_is_status_1(capsys, monkeypatch, tmp_path):
    change_append(monkeypatch, 1.2)
    file = tmp_path / "result.json"
    status, out, _ = run(capsys, "--json", str(file))
    assert status == 1
    assert "ntops_mla against float64" in out and "MISMATCH" in out
    assert file.exists()


def test_a_row_of_nan_is_status_1_and_valid_json(capsys, monkeypatch, tmp_path):
    change_append(monkeypatch, float("nan"))
    file = tmp_path / "result.json"
    status, _, _ = run(capsys, "--json", str(file), "--implementation", "ntops_mla")
    assert status == 1
    assert all(row["max_error"] is None for row in json.loads(file.read_text())["rows"])


def test_no_check_says_so(capsys):
    status, out, _ = run(capsys, "--no-check", "--implementation", "ntops_mla")
    assert status == 0 and "not checked" in out and "against float64" not in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nvidia"], "no NVIDIA device"),
        (["--mthreads"], "no Moore Threads device"),
        (["--metax"], "no MetaX device"),
        (["--tianshu"], "no Iluvatar CoreX device"),
        (["--cpu", "--tiny", "--backend", "kernel"], "kernel was asked for"),
        (["--cpu", "--model_path", "/nowhere"], "does not exist"),
        (["--cpu", "--json", "/nowhere/result.json"], "--json"),
        (["--cpu", "--tiny", "--model_path", "."], "--model_path"),
        (["--cpu", "--layer", "3"], "--layer"),
        (["--cpu", "--nvidia"], "not allowed with"),
        (["--runs", "0"], "--runs"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(capsys, flags, says):
    if flags[0] in ("--nvidia", "--mthreads", "--metax", "--tianshu") and "cpu" not in str(torch.__version__):
        pytest.skip("this torch may have that device")
    try:
        status = attention_test.main(flags)
    except SystemExit as leaving:  # argparse
        status = leaving.code
    err = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert says in err[-1] and "error:" in err[-1]
    assert not any(line.startswith("Traceback") for line in err)


OURS = ["--tiny", "--runs", "1", "--warmups", "0", "--no-check", "--implementation", "ntops_mla"]


def script(*flags, **variables) -> subprocess.CompletedProcess:
    """The script by itself: what it does before it imports torch counts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NTOPS_MLA_", "TRITON_"))}
    environment = {**kept, "PYTHONPATH": str(SCRIPT.parents[1]), **variables}
    command = [sys.executable, str(SCRIPT), *OURS, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_without_a_flag_the_best_device_is_named():
    done = script()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no device flag: ")


@pytest.mark.slow
def test_kernels_on_a_cpu_are_interpreted(tmp_path):
    file = tmp_path / "result.json"
    done = script("--cpu", "--backend=kernel", "--json", str(file))
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert "NTOPS_MLA_INTERPRET=1" in first and any("on CPU (cpu, interpreted)" in line for line in rest)
    result = json.loads(file.read_text())
    assert result["interpreted"] is True
    assert {choice["backend"] for row in result["rows"] for choice in row["choices"].values()} == {"kernel"}


@pytest.mark.parametrize(
    ("flags", "value", "expected"),
    [
        (["--cpu", "--backend", "kernel"], None, True),
        (["--json", "x", "--backend=kernel", "--cpu", "--tiny"], "", True),
        (["--cpu", "--backend", "kernel"], "0", False),  # as the caller has it
        (["--cpu", "--backend", "kernel"], "1", False),
        (["--cpu", "--backend", "auto"], None, False),
        (["--cpu", "--backend"], None, False),
        (["--backend", "kernel"], None, False),
        ([], None, False),
    ],
)
def test_when_the_interpreter_is_wanted(monkeypatch, flags, value, expected):
    monkeypatch.delenv("NTOPS_MLA_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("NTOPS_MLA_INTERPRET", value)
    assert interpreter.wanted(flags) is expected


@pytest.mark.parametrize("flags", [["--cpu"], []], ids=["cpu", "no flag"])
def test_a_platform_that_the_device_cannot_be_is_refused(capsys, monkeypatch, flags):
    """Else a CPU's figures would bear an accelerator's name."""
    with Machine(monkeypatch):
        monkeypatch.setenv("NTOPS_MLA_PLATFORM", "nvidia")
        status = attention_test.main([*OURS, *flags])
        captured = capsys.readouterr()
        assert status == 2 and captured.out == ""
        (line,) = captured.err.splitlines()
        assert "NTOPS_MLA_PLATFORM=nvidia" in line and "type cuda" in line and "cpu" in line
        monkeypatch.setenv("NTOPS_MLA_PLATFORM", "cpu")
        assert attention_test.main([*OURS, *flags]) == 0
        # interpreted, that platform's kernels do run on a CPU
        monkeypatch.setenv("NTOPS_MLA_PLATFORM", "nvidia")
        monkeypatch.setenv("NTOPS_MLA_INTERPRET", "1")
        assert attention_test.main([*OURS, *flags, "--backend", "reference"]) == 0
        assert "on NVIDIA (cpu, interpreted)" in capsys.readouterr().out


def test_json_through_a_link_and_over_a_file(capsys, tmp_path):
    file, link = tmp_path / "there" / "result.json", tmp_path / "link.json"
    file.parent.mkdir()
    file.write_text("old")
    link.symlink_to("there/result.json")
    umask = os.umask(0o027)
    try:
        status, _, _ = run(capsys, "--no-check", "--implementation", "ntops_mla", "--json", str(link))
    finally:
        os.umask(umask)
    assert status == 0
    assert link.is_symlink() and json.loads(file.read_text())["rows"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_json_into_a_pipe(capsys, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    status, _, _ = run(capsys, "--no-check", "--implementation", "ntops_mla", "--json", str(pipe))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(60)
    assert status == 0 and json.loads(read[0])["rows"]


def test_a_transformers_that_does_not_import_is_left_out(capsys, monkeypatch):
    def broken(name, *_, **__):
        if name.startswith("transformers"):
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return original(name, *_, **__)

    original = builtins.__import__
    monkeypatch.setattr(transformers_row.importlib.metadata, "version", lambda name: "5.20.0")
    monkeypatch.setattr(builtins, "__import__", broken)
    reason = transformers_row.unavailable()
    assert "transformers 5.20.0 does not import: RuntimeError: operator torchvision::nms does not exist" == reason
    status, out, _ = run(capsys, "--no-check")
    assert status == 0 and f"row transformers left out: {reason}" in out
    status, _, err = run(capsys, "--implementation", "transformers")
    assert status == 2 and reason in err


@pytest.mark.parametrize("version", ["4.57.1", "5.0rc1", "5.14.dev0"])
def test_an_old_transformers_is_left_out(monkeypatch, version):
    monkeypatch.setattr(transformers_row.importlib.metadata, "version", lambda name: version)
    assert "is older than 5.15" in transformers_row.unavailable()


def checkpoint(folder: Path, layers: tuple[int, ...], cfg: MLAConfig) -> dict[int, dict[str, torch.Tensor]]:
    """A Hugging Face directory of one file, without an index."""
    from safetensors.torch import save_file

    config = {
        "model_type": "deepseek_v3",
        "hidden_size": cfg.hidden_size,
        "num_attention_heads": cfg.num_heads,
        "q_lora_rank": cfg.q_lora_rank,
        "kv_lora_rank": cfg.kv_lora_rank,
        "qk_nope_head_dim": cfg.qk_nope_head_dim,
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "v_head_dim": cfg.v_head_dim,
        "max_position_embeddings": cfg.max_position_embeddings,
        "rope_theta": cfg.rope_theta,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in layers:
        for name, value in MLA(cfg, dtype=torch.bfloat16).state_dict().items():
            tensors[f"model.layers.{layer}.self_attn.{name}"] = value.clone()
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.slow
def test_a_model_directory_is_read_at_its_lowest_layer(capsys, tmp_path):
    cfg = MLAConfig(
        hidden_size=64,
        num_heads=2,
        q_lora_rank=32,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=2048,
    )
    checkpoint(tmp_path, (5, 3), cfg)
    flags = ["--cpu", "--runs", "1", "--warmups", "0", "--model_path", str(tmp_path)]
    status = attention_test.main([*flags, "--implementation", "ntops_mla"])
    out = capsys.readouterr().out
    assert status == 0 and "layer 3" in out and "all rows match float64" in out
    assert attention_test.main([*flags, "--layer", "4"]) == 2
    assert "layer 4 does not exist" in capsys.readouterr().err


def test_the_middle_half_is_averaged():
    assert measure._middle_mean([1.0, 1.0, 3.0, 900.0]) == 2.0
    assert measure._middle_mean([5.0]) == 5.0


def test_decode_feeds_back_and_prefill_rewinds():
    """What `measure` gives the rows: decode's next input is its last output, prefill's is always the same."""
    from attention_rows import scenario

    class Row:
        name = "row"

        def __init__(self):
            self.seen, self.rewound = [], 0

        def start(self, histories, room):
            self.room = room

        def run(self, x, lengths):
            self.seen.append(x.clone())
            return x + 1

        def rewind(self):
            self.rewound += 1

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            pass

    x = torch.zeros(4, 2)
    decode, prefill = Row(), Row()
    measure.measure([decode], scenario.TINY_DECODE, [], x, 1, 12, lambda count: Bar())
    measure.measure([prefill], scenario.TINY_PREFILL, [], x, 1, 12, lambda count: Bar())
    assert [seen[0, 0].item() for seen in decode.seen] == list(range(13))
    assert decode.room == 13 and decode.rewound == 0
    assert all(not seen.any() for seen in prefill.seen) and prefill.rewound == 13
