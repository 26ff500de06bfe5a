"""The gates file: its form, and what it changes."""

import json
import os
import stat

import pytest
import torch

from ntops_mla import dispatch, findings, ops

ROW = {"op": "rope", "dtype": "float16", "works": False, "reason": "it hung"}
GOOD = {"platform": "cpu", "device": "cpu", "triton": "3.6.0", "date": "2026-01-01", "kernels": [ROW]}


@pytest.fixture
def gates(tmp_path, monkeypatch):
    """Writes a gates file that is in force."""

    def write(data):
        path = tmp_path / "gates.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        monkeypatch.setenv(findings.VARIABLE, str(path))
        dispatch.reset()
        return path

    return write


def test_what_was_found_broken_is_switched_off(gates):
    gates(GOOD)
    args = ops.get("rope").example("cpu", torch.float16)
    reason = ops.rope.explain(*args).reason
    assert reason == "gate of cpu for rope in float16: NTOPS_MLA_GATES: on cpu, 2026-01-01: it hung"
    assert "it hung" not in ops.rope.explain(*ops.get("rope").example("cpu", torch.float32)).reason
    assert "it hung" not in ops.rms_norm.explain(*ops.get("rms_norm").example("cpu", torch.float16)).reason
    gates({**GOOD, "platform": "metax"})
    assert "it hung" not in ops.rope.explain(*args).reason


@pytest.mark.parametrize(
    "data, words",
    [
        ("{", "cannot be read"),
        ("[]", "an object is needed"),
        ({**GOOD, "device": ""}, "device must be a text"),
        ({key: value for key, value in GOOD.items() if key != "triton"}, "'triton' is missing"),
        ({**GOOD, "kernels": [{**ROW, "works": "yes"}]}, "works must be true, false or null"),
        ({**GOOD, "kernels": [{**ROW, "dtype": "float17"}]}, "'float17' is no dtype"),
        ({**GOOD, "kernels": [{"op": "rope"}]}, "'works' is missing"),
        ({**GOOD, "kernels": 3}, "not a gates file"),
        ({**GOOD, "kernels": [{**ROW, "products": [["a"]]}]}, "not a gates file"),
    ],
    ids=str,
)
def test_a_wrong_file_is_an_error_that_names_it(gates, data, words):
    path = gates(data)
    with pytest.raises(ValueError, match=words) as caught:
        ops.rope(*ops.get("rope").example("cpu", torch.float16))
    assert f"NTOPS_MLA_GATES={path}" in str(caught.value)


def test_a_missing_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(findings.VARIABLE, str(tmp_path / "none.json"))
    dispatch.reset()
    with pytest.raises(ValueError, match="cannot be read"):
        ops.rope(*ops.get("rope").example("cpu", torch.float16))


def test_it_is_written_whole_and_for_all_to_read(tmp_path):
    path = tmp_path / "gates.json"
    findings.write(path, GOOD)
    assert findings.read(path).kernels["rope", "float16"] == findings.Finding(False, "it hung")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with pytest.raises(TypeError):
        findings.write(path, {**GOOD, "device": None})
    assert json.loads(path.read_text()) == GOOD and list(tmp_path.iterdir()) == [path]


def test_what_works_is_so_for_the_products_that_were_tried():
    row = {"op": "mla_decode", "dtype": "float16", "works": True, "reason": ""}
    every = findings._parsed({**GOOD, "kernels": [row]}, "")
    some = findings._parsed({**GOOD, "kernels": [{**row, "products": [[16, 32]]}]}, "")
    assert every.works("mla_decode", torch.float16, (8, 8)) and some.works("mla_decode", torch.float16, (16, 32))
    assert not some.works("mla_decode", torch.float16, (32, 16))
    assert not some.works("mla_decode", torch.bfloat16, (16, 32))
    assert every.of_board("cpu", "cpu", "3.6.0") and not every.of_board("cpu", "cpu", "3.7.0")
