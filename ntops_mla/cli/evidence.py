"""`evidence`: what runs on boards showed. `collect` it after a lane's run, `add` it here, make README's `table`."""

from __future__ import annotations

import argparse
import json
import pathlib

from ntops_mla import checkout, evidence
from ntops_mla.cli import arguments, env

HELP = "collect what a run on a board showed, add it to the results, make README's table of it"


def configure(parser: argparse.ArgumentParser) -> None:
    """One of three."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="collect|add|table")
    collect = actions.add_parser("collect", help=f"write {evidence.NAME} of what scripts/ci.sh left in a folder")
    collect.add_argument("--platform", type=arguments.platform, required=True, help="whose lane it was")
    collect.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    add = actions.add_parser("add", help="put evidence files with the results here, and into README's table")
    add.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE")
    table = actions.add_parser("table", help="write README's table anew")
    table.add_argument("--check", action="store_true", help="write nothing; exit status 1 where it is not current")


def run(args: argparse.Namespace) -> int:
    """Status 0, or 1 where a check fails."""
    return {"collect": _collect, "add": _add, "table": _table}[args.action](args)


def _collect(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise ValueError(f"argument FOLDER: there is no folder {args.folder}")
    found = evidence.collect(args.platform, args.folder, env.report(args))
    if said := evidence.problems(found):  # of what the steps left: say it here, where it can be mended
        raise ValueError(f"{args.folder}: {'; '.join(said)}")
    path = args.folder / evidence.NAME
    checkout.write({path: json.dumps(found, indent=1) + "\n"})
    why_not = evidence.refusal(found)
    print(f"{path}: " + (f"not for the table: {why_not}" if why_not else f"{found['board']}, commit {found['commit']}"))
    return 0


def _add(args: argparse.Namespace) -> int:
    for path in evidence.add(args.files, checkout.root()):
        print(f"{path}: written, and README's table with it")
    return 0


def _table(args: argparse.Namespace) -> int:
    root = checkout.root()
    new = evidence.readme(root)
    if not args.check:
        checkout.write({root / "README.md": new})
        return 0
    if new == (root / "README.md").read_text(encoding="utf-8"):
        return 0
    print("README.md: the support table is not current; python -m ntops_mla evidence table writes it anew")
    return 1
