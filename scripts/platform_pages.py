"""Writes the data part of docs/platforms/<name>.md from the platforms' files.

    python scripts/platform_pages.py [--check] [NAME...]

Without a name, every page that is there. A platform that is named and has no page gets one to fill in. --check: status
1 where a page is not current, and nothing is written.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from ntops_mla import checkout, platform_page
from ntops_mla.platform import all_platforms, get_platform

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None, folder: pathlib.Path = ROOT / "docs" / "platforms") -> int:
    """All pages are made before one is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a platform's name or alias")
    args = parser.parse_args(argv)
    try:
        names = [get_platform(name).name for name in args.names]
        names = names or [name for name in all_platforms() if (folder / f"{name}.md").exists()]
        stale = {}
        for name in names:
            path, new = folder / f"{name}.md", made(folder / f"{name}.md", name)
            if not path.exists() or path.read_text(encoding="utf-8") != new:
                stale[path] = new
    except ValueError as error:
        parser.exit(2, f"platform_pages.py: error: {error}\n")
    if args.check:
        for path in stale:
            print(f"{path} is not current: run python scripts/platform_pages.py {path.stem}", file=sys.stderr)
        return 1 if stale else 0
    checkout.write(stale)
    return 0


def made(path: pathlib.Path, name: str) -> str:
    """The page as it ought to be."""
    platform = get_platform(name)
    if not path.exists():
        return platform_page.skeleton(platform)
    return platform_page.with_data(path.read_text(encoding="utf-8"), platform)


if __name__ == "__main__":
    sys.exit(main())
