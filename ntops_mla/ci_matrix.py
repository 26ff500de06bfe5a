"""The CI matrix, made from the platforms' `ci` data: one lane a platform, each of which runs scripts/ci.sh.

`.github/workflows/ci.yml` is GitHub's, and `.github/actionlint.yaml` tells its linter which labels and variables are
ours. `.github/ci_config.yml` is for the reusable workflow and the agents of InfiniTensor/ci, which build on the image
named there and run the stages in it. `python -m ntops_mla platforms --ci --write` writes them; a new platform file with
a lane is in them after that.
"""

from __future__ import annotations

import pathlib
from typing import Any

from ntops_mla.platform import CILane, Platform, all_platforms

WORKFLOW = pathlib.PurePosixPath(".github/workflows/ci.yml")
ACTIONLINT = pathlib.PurePosixPath(".github/actionlint.yaml")
CI_CONFIG = pathlib.PurePosixPath(".github/ci_config.yml")
# A job for a runner that is not there waits for a day: so those that are there are named.
RUNNERS = "NTOPS_MLA_RUNNERS"
PYTHONS = ("3.10", "3.13")  # the oldest that is supported, and the newest that torch and Triton have wheels for

_HEAD = "# Generated from platforms/*.py by `python -m ntops_mla platforms --ci --write`: edit those.\n"
_WORKFLOW_HEAD = f"""\
{_HEAD}#
# The lanes of boards run where the repository variable {RUNNERS}, a JSON list such as ["nvidia", "metax"], names
# their platform. They never run for a fork's pull request, whose code would then run on a machine of ours. A lane that
# runs and finds no device fails.
"""
_CI_CONFIG_HEAD = f"{_HEAD}# In the format of InfiniTensor/ci.\n"
# Only for an agent that has to clone: InfiniTensor/ci's workflow brings the checkout with it.
_REPOSITORY = "https://github.com/InfiniTensor/ntops_mla.git"
_SAME_REPOSITORY = (
    "(github.event_name != 'pull_request' || github.event.pull_request.head.repo.full_name == github.repository)"
)


def files() -> dict[pathlib.PurePosixPath, str]:
    """The text of each generated file, by its path in the repository."""
    return {
        WORKFLOW: _WORKFLOW_HEAD + _yaml(workflow()),
        ACTIONLINT: _HEAD + _yaml(actionlint()),
        CI_CONFIG: _CI_CONFIG_HEAD + _yaml(ci_config()),
    }


def lanes() -> list[tuple[Platform, CILane]]:
    """The platforms that have a lane, the hosted ones first."""
    having = [(platform, platform.ci) for platform in all_platforms().values() if platform.ci is not None]
    return sorted(having, key=lambda pair: pair[1].execution_mode != "hosted")


def workflow() -> dict[str, Any]:
    """GitHub's workflow. A job each lane, since a job's `if` cannot see its matrix."""
    return {
        "name": "ci",
        "on": {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None},
        "permissions": {"contents": "read"},
        "concurrency": {
            "group": "ci-${{ github.ref }}",
            "cancel-in-progress": "${{ github.event_name == 'pull_request' }}",
        },
        "defaults": {"run": {"shell": "bash"}},
        "jobs": {
            platform.name: _hosted(platform, lane) if lane.execution_mode == "hosted" else _board(platform, lane)
            for platform, lane in lanes()
        },
    }


def _hosted(platform: Platform, lane: CILane) -> dict[str, Any]:
    python = "${{ matrix.python }}"
    setup = [
        {"uses": "actions/setup-python@v6", "with": {"python-version": python}},
        *({"run": command} for command in lane.setup),
    ]
    return {
        "name": f"{platform.title}, Python {python}",
        "runs-on": lane.runner,
        "timeout-minutes": lane.timeout_minutes,
        "strategy": {"fail-fast": False, "matrix": {"python": list(PYTHONS)}},
        "env": {"NTOPS_MLA_PYTHON": "python"},
        "steps": _steps(platform, setup, f"{platform.name}-python-{python}"),
    }


def _board(platform: Platform, lane: CILane) -> dict[str, Any]:
    job: dict[str, Any] = {
        "name": platform.title,
        "if": f"contains(fromJSON(vars.{RUNNERS} || '[]'), '{platform.name}') && {_SAME_REPOSITORY}",
        "runs-on": ["self-hosted", "linux", "${{ matrix.runner }}"],
        "timeout-minutes": lane.timeout_minutes,
        # One label a kind of board: where one of them fails, the others go on.
        "strategy": {"fail-fast": False, "matrix": {"runner": [lane.runner]}},
    }
    if lane.image is not None and lane.pulled:  # GitHub pulls it; where it cannot, the runner itself is in the image
        options = [*lane.docker, *(["--gpus=all"] if lane.gpu_style == "nvidia" else []), "--shm-size=16g"]
        job["container"] = {"image": lane.image, "options": " ".join(options)}
        if lane.volumes:
            job["container"]["volumes"] = list(lane.volumes)
    job["steps"] = _steps(platform, [{"run": command} for command in lane.setup], platform.name)
    return job


def _steps(platform: Platform, setup: list[dict[str, Any]], artifact: str) -> list[dict[str, Any]]:
    return [
        {"uses": "actions/checkout@v5"},
        *setup,
        {"name": "The lane", "run": f"bash scripts/ci.sh {platform.name}"},
        {
            "name": "JUnit report, evidence and figures",
            "if": "${{ always() }}",  # those of a lane that failed, or was ended for its time, are wanted most
            "uses": "actions/upload-artifact@v6",
            "with": {"name": artifact, "path": f"build/ci/{platform.name}", "if-no-files-found": "error"},
        },
    ]


def actionlint() -> dict[str, Any]:
    """What actionlint cannot know: labels and variables that somebody gives to the repository and its runners."""
    labels = [lane.runner for _, lane in lanes() if lane.execution_mode != "hosted"]
    return {"self-hosted-runner": {"labels": labels}, "config-variables": [RUNNERS]}


def ci_config() -> dict[str, Any]:
    """What InfiniTensor/ci reads: the lanes that have a name there."""
    return {
        "repo": {"url": _REPOSITORY, "branch": "main"},
        "github": {"status_context_prefix": "ci/ntops_mla"},
        "platforms": {lane.platform: _entry(platform, lane) for platform, lane in lanes() if lane.platform is not None},
    }


def _entry(platform: Platform, lane: CILane) -> dict[str, Any]:
    if lane.image is None:
        raise ValueError(
            f"platform {platform.name!r}: ci: InfiniTensor/ci runs every lane in an image, and none is named"
        )
    results = "/workspace/results"  # InfiniTensor/ci keeps what is left there
    entry: dict[str, Any] = {
        "runner_label": lane.runner,
        "execution_mode": lane.execution_mode,
        # The folder is InfiniTensor/ci's own: its images install a few tools and hold torch at the image's version.
        "image": {"dockerfile": f"images/{lane.platform}/", "build_args": {"BASE_IMAGE": lane.image}},
    }
    if lane.docker:
        entry["docker_args"] = list(lane.docker)
    if lane.volumes:
        entry["volumes"] = list(lane.volumes)
    return {
        **entry,
        "setup": " && ".join([*lane.setup, "bash scripts/bootstrap.sh"]),
        "jobs": {
            "gpu": {
                "type": "unittest",
                "resources": {
                    "ngpus": lane.devices,
                    "gpu_style": lane.gpu_style,
                    "memory": "32GB",
                    "shm_size": "16g",
                    "timeout": lane.timeout_minutes * 60,
                    "queue_timeout": 600,
                    "junit_path": "test-results.xml",
                },
                "stages": [{"name": "test", "run": f"bash scripts/ci.sh {platform.name} --output {results}"}],
            },
        },
    }


def _yaml(data: dict[str, Any]) -> str:
    try:
        import yaml
    except ImportError:
        raise ValueError("the CI files are written with PyYAML, which is not installed") from None
    return yaml.safe_dump(data, sort_keys=False, width=1000, allow_unicode=True)
