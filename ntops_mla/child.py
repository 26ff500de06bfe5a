"""A question put to a process of its own: a vendor's compiler may end the process, or never return.

The child runs a subcommand of `python -m ntops_mla`, and its last words are one line, made by `answer`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

_ANSWER = "ntops_mla answers: "  # what a child's last line begins with


def ask(arguments: Sequence[str], environment: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """The answer of `python -m ntops_mla` with `arguments`; {`works`: False, `reason`} says what ended it otherwise."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ntops_mla", *arguments],
        env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return {"works": False, "reason": f"no answer within {timeout:g} seconds"}
    except BaseException:
        _end(process)
        raise
    lines = [line for line in output.splitlines() if line.strip()]
    for line in reversed(lines):  # a compiler's words may stand before it, without an end of line
        if _ANSWER in line:
            return json.loads(line.partition(_ANSWER)[2])
    last = f": {lines[-1][:300]}" if lines else ""
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"works": False, "reason": f"the process was ended by {name}{last}"}
    return {"works": False, "reason": f"the process ended with status {process.returncode}{last}"}


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a compiler's own children too
    process.communicate()


def reply(data: Mapping[str, Any]) -> NoReturn:
    """What a child ends with."""
    print(answer(data), flush=True)
    os._exit(0)  # a driver that was brought up may hang or crash on the way out


def answer(data: Mapping[str, Any]) -> str:
    """The line by which a child answers."""
    return _ANSWER + json.dumps(data)
