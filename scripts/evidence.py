"""Collects what the Triton of this Python shows: numerics in its interpreter, and every tile compiled.

    python scripts/evidence.py [--folder benchmarks/evidence] [--op mla_decode ...]

Writes FOLDER/triton-VERSION.json: versions, date, commit, `interpreted` (kernel -> tests passed and failed) and
`compiled` (a row for each platform, architecture, target, kernel and dtype: the worst numbers of its tiles), `sources`
(fingerprints of kernels and tiles, by which README's table tells what has changed since). With --op
only those ops are collected anew, by the tests that name them; what the file held of others stays, and `kept` names the
commit that it is of: for changes that touch no other kernel.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> int:
    """Status 1 where a test fails or a tile must not be shipped; the file says which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "benchmarks" / "evidence")
    parser.add_argument("--op", action="append", help="of this op alone; may be repeated")
    args = parser.parse_args()
    path = args.folder / f"triton-{importlib.metadata.version('triton')}.json"
    kept = None
    if args.op is not None:
        if unknown := set(args.op) - set(names("ops")):
            parser.error(f"--op: there is no op {', '.join(sorted(unknown))}")
        if not path.exists():
            parser.error(f"--op: {path} does not exist, so that there is nothing to put it into")
        kept = json.loads(path.read_text(encoding="utf-8"))
    interpreted = {path.stem.removeprefix("test_"): run_tests(path) for path in interpreted_files(args.op)}
    compiled = compile_all(args.op)
    tried = sources(kept, compiled)
    if kept is not None:
        interpreted = {**kept["interpreted"], **interpreted}
        compiled = [row for row in kept["compiled"] if row["op"] not in args.op] + compiled
    found = {
        "triton": importlib.metadata.version("triton"),
        "ninetoothed": importlib.metadata.version("ninetoothed"),
        "torch": importlib.metadata.version("torch"),
        "numpy": importlib.metadata.version("numpy"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "--porcelain", "kernels", "ntops_mla", "platforms", "tests") else ""),
        "kept": kept and {"commit": kept["commit"], "date": kept["date"], "but": sorted(args.op)},
        "sources": tried,
        "interpreted": interpreted,
        "compiled": compiled,
    }
    args.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, counts in interpreted.items() if counts["failed"]]
    spoiled = [row for row in compiled if row["problems"]]
    print(f"{path}: interpreted {len(interpreted)} files, failed: {failed or 'none'}; compiled "
          f"{sum(row['tiles'] for row in compiled)} kernels, {len(spoiled)} rows with problems")  # fmt: skip
    return 1 if failed or spoiled else 0


def sources(kept: dict | None, compiled: list[dict]) -> dict[str, str]:
    """The fingerprints of what was tried: where only some ops were, anew of their kernels' files."""
    sys.path.insert(0, str(ROOT))
    from ntops_mla.support_table import fingerprints

    now = fingerprints(ROOT)
    if kept is None:
        return now
    files = {f"kernels/{row['kernel']}.py" for row in compiled if row["kernel"]}
    return {**kept["sources"], **{name: now[name] for name in files if name in now}}


def interpreted_files(ops: list[str] | None) -> list[pathlib.Path]:
    """The files of tests/interpreted, of `ops` those that name one."""
    files = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))
    if ops is None:
        return files
    named = re.compile(rf"\b({'|'.join(ops)})\b")
    return [path for path in files if named.search(path.read_text(encoding="utf-8"))]


def run_tests(path: pathlib.Path) -> dict[str, int]:
    """Runs one file of interpreted tests; a file that does not run counts as one failure."""
    environment = {**os.environ, "NTOPS_MLA_INTERPRET": "1", "NTOPS_MLA_STRICT": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    print(f"  interpreting {path.name}", end=" ", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    print(last[0], flush=True)
    if done.returncode:  # what names a failure, and the seed that repeats it
        for line in done.stdout.splitlines():
            if line.startswith(("NTOPS_MLA_TEST_SEED", "FAILED", "ERROR", "E  ")):
                print(f"    {line}", flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last[0])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode not in (0, 1) and not failed:
        failed = 1
    return {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}


def compile_all(ops: list[str] | None) -> list[dict]:
    """The rows of `python -m ntops_mla compile --all`, put together; ops: None for all."""
    runs = [run_compile()] if ops is None else [run_compile("--op", op) for op in ops]
    rows = None if None in runs else list(itertools.chain(*runs))
    if rows is None:
        print("  the compiler ended the process: one for each platform and op", flush=True)
        rows = []
        for platform, op in itertools.product(names("platforms"), ops or names("ops")):
            found = run_compile("--platform", platform, "--op", op)
            rows += ended(platform, op) if found is None else found
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("platform", "arch", "target", "stand_in", "op", "kernel", "dtype"))
        grouped.setdefault(key, []).append(row)
    return [
        {
            **dict(zip(("platform", "arch", "target", "stand_in", "op", "kernel", "dtype"), key)),
            "tiles": len(members),
            **{
                f"most_{name}": max((row.get(name) or 0) for row in members)
                for name in ("registers", "spill_bytes", "shared_bytes")
            },
            "problems": sorted({problem for row in members for problem in row["problems"]}),
        }
        for key, members in grouped.items()
    ]


def ended(platform: str, op: str) -> list[dict]:
    """What stands for the rows of an op whose compilation ended the process."""
    return [
        {
            **dict.fromkeys(("arch", "target", "stand_in"), None),
            **{"platform": platform, "op": op, "kernel": op, "dtype": dtype},
            "problems": ["this Triton's compiler ended the process"],
        }
        for dtype in ("bfloat16", "float16", "float32")
    ]


def run_compile(*arguments: str) -> list[dict] | None:
    """The rows of one run, None where the compiler ended it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        command = [sys.executable, "-W", "ignore", "-m", "ntops_mla", "compile", "--all", "--json", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            for count, _ in enumerate(process.stdout, 1):
                if count % 50 == 0:
                    print(f"  compiled {count}", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else None


def names(of: str) -> list[str]:
    """The platforms that compile something, or the ops."""
    code = {
        "platforms": "from ntops_mla.platform import all_platforms as a; print(*(n for n in a() if n != 'cpu'))",
        "ops": "from ntops_mla import ops; print(*ops.names())",
    }[of]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def git(*args: str) -> str:
    """What git says, empty where there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
