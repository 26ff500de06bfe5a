"""docs/: what is generated is current, and what a page names is there."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

import platform_pages
from ntops_mla import flash_mla, platform_page
from ntops_mla.cli import COMMANDS
from ntops_mla.platform import Fact, all_platforms, get_platform, register_platform, unregister_platform

ROOT = Path(__file__).resolve().parent.parent
PLATFORM_PAGES = sorted((ROOT / "docs" / "platforms").glob("*.md"))
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# What the worked examples make; tests/test_adding.py makes it
BLOCK = re.compile(r"^```python (\S+/\S+)\n", re.MULTILINE)
MADE = {path for page in PAGES for path in BLOCK.findall(page.read_text(encoding="utf-8"))} | {"docs/platforms/acme.md"}
HEADINGS = ["Install", "Known limits", "What is proven, and what is not", "Send evidence back"]


def by_hand(page: Path) -> str:
    """A page without its generated part, which names other projects' files."""
    text = page.read_text(encoding="utf-8")
    return re.sub(f"{platform_page.BEGIN}.*{platform_page.END}", "", text, flags=re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


# --- the platforms' pages ---


def test_the_generated_parts_are_current(capsys):
    assert platform_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_a_platform_in_the_readme_has_a_page():
    """A new file is a platform at once; it is in README's table, and has a page, when somebody has written them."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("support table: begin")[2]
    shown = {platform.name for platform in all_platforms().values() if f"| {platform.title} |" in table} | {"cpu"}
    pages = {page.stem for page in PLATFORM_PAGES} - {"README"}
    assert len(shown) >= 5 and shown <= pages <= set(all_platforms())
    overview = (ROOT / "docs" / "platforms" / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.md" for name in pages} <= set(re.findall(r"\]\((\w+\.md)\)", overview))


@pytest.mark.parametrize("page", [page for page in PLATFORM_PAGES if page.stem != "README"], ids=lambda page: page.stem)
def test_a_page_says_all_that_it_has_to(page):
    text = by_hand(page)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*HEADINGS, "What the platform's file says"]
    assert "TODO" not in text
    platform = get_platform(page.stem)
    assert text.startswith(f"# {platform.title}\n")
    if platform.limits:
        assert f"bash scripts/ci.sh {platform.name}" in text and "Nothing has been run on a board" in text


def test_the_data_is_what_the_file_says():
    platform = get_platform("metax")
    text = platform_page.data(platform)
    for part in (
        "| names on the command line | metax, muxi |",
        "| version attributes | maca |",
        "InternLM/lmdeploy#3495",
        "| all others | float64 | reference | no float64 products in kernels on this platform |",
        "| `mla_decode` | bfloat16, float16; rows from 17 | block_h 32, block_n 16, block_c 512 | 4 | 1 |",
        "- kernels that spin while they wait (",
        "| scenario | mla | launch |",
        "MACA_PATH",
        "| runner | Metax |",
    ):
        assert part in text, part
    assert platform_page.data(replace(platform, notes=(Fact("a | b", "here"),))).count("- a \\| b (here)") == 1
    assert "?" in platform_page.data(get_platform("iluvatar"))
    assert "Triton from 3.2 before 3.7; rows from 33; latent 512" in platform_page.data(get_platform("nvidia"))


@pytest.fixture
def toy():
    """A made-up platform, registered for the test."""
    platform = replace(get_platform("metax"), name="toy", title="Toy", aliases=())
    register_platform(platform)
    yield platform
    unregister_platform("toy")


def test_pages_are_made_checked_and_kept(tmp_path, toy, capsys):
    page = tmp_path / "toy.md"
    assert platform_pages.main([], tmp_path) == 0 and not page.exists()  # a platform may be without one
    assert platform_pages.main(["--check", "toy"], tmp_path) == 1 and not page.exists()
    assert "toy.md is not current" in capsys.readouterr().err
    assert platform_pages.main(["toy"], tmp_path) == 0
    assert page.read_text().startswith("# Toy\n") and "TODO" in page.read_text() and "| toy |" in page.read_text()
    page.write_text(page.read_text().replace("TODO", "By hand").replace("| 65536 |", "| 1 |"))
    assert platform_pages.main(["--check"], tmp_path) == 1
    assert platform_pages.main([], tmp_path) == 0 and platform_pages.main(["--check"], tmp_path) == 0
    assert "By hand" in page.read_text() and "| 65536 |" in page.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        platform_page.BEGIN,
        f"{platform_page.END}\n{platform_page.BEGIN}",
        f"{platform_page.BEGIN * 2}{platform_page.END}",
    ],
)
def test_a_page_without_its_marks_is_refused_and_stays(tmp_path, toy, text, capsys):
    (tmp_path / "toy.md").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        platform_pages.main([], tmp_path)
    assert stopped.value.code == 2 and "the page of toy must hold" in capsys.readouterr().err
    assert (tmp_path / "toy.md").read_text() == text


def test_an_unknown_platform_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        platform_pages.main(["tpu"], tmp_path)
    assert stopped.value.code == 2 and "unknown platform 'tpu'" in capsys.readouterr().err


# --- what the pages name ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", by_hand(page)):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        path = page.parent / file if file else page
        assert path.is_file(), target
        if not heading:
            continue
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert heading in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_are_there(page):
    folders = "kernels|platforms|ntops_mla|tests|scripts|docs|benchmarks"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w/?", by_hand(page)):
        # Results are left there by the first board.
        assert path in MADE or path.startswith("benchmarks/results/") or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_are_read_somewhere(page):
    sources = [*(ROOT / "ntops_mla").glob("**/*.py"), *(ROOT / "scripts").glob("*.*")]
    known = "".join(path.read_text(encoding="utf-8") for path in sources)
    for variable in re.findall(r"NTOPS_MLA_[A-Z_]+", by_hand(page)):
        assert variable in known, variable


def options(parser: argparse.ArgumentParser) -> set[str]:
    """All flags of a parser and of those below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set(action.choices).union(*(options(below) for below in action.choices.values()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_subcommands_are_there(page):
    for name, rest in re.findall(r"python -m ntops_mla (\w+)([^`\n#>|]*)", by_hand(page)):
        assert name in COMMANDS, name
        parser = argparse.ArgumentParser()
        importlib.import_module(f"ntops_mla.cli.{name}").configure(parser)
        assert set(re.findall(r"--[\w-]+", rest)) <= options(parser) | {"--json"}, (name, rest)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_scripts_are_there(page):
    made = {f"--{Path(path).stem}" for path in MADE}
    platforms = {f"--{name}" for platform in all_platforms().values() for name in (platform.name, *platform.aliases)}
    for script, rest in re.findall(r"scripts/(\w+)\.(?:sh|py)([^`\n#>|]*)", by_hand(page)):
        text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob(f"{script}.*"))
        for flag in re.findall(r"--[\w-]+", rest):
            assert flag in made | platforms or f'"{flag}"' in text or f" {flag}" in text, (script, flag)


# --- FlashMLA's functions ---


@pytest.mark.parametrize("name", [name for name in flash_mla.__all__ if name.islower()])
def test_every_argument_of_flash_mla_has_a_row(name):
    text = (ROOT / "docs" / "flash_mla.md").read_text(encoding="utf-8")
    sections = {heading: body for heading, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE)}
    (body,) = [body for heading, body in sections.items() if name in heading.split(", ")]
    rows = [line.split("|")[1].strip().split(", ") for line in body.splitlines() if line.startswith("|")]
    arguments = {argument for row in rows[2:] for argument in row}

    def named(function):
        parameters = inspect.signature(getattr(flash_mla, function)).parameters.items()
        return {name for name, p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    assert named(name) <= arguments
    known = set().union(*(named(function) for function in flash_mla.__all__ if function.islower()))
    assert arguments <= known | {"whatever else"}
