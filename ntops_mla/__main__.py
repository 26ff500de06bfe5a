"""`python -m ntops_mla`: what is supported, what is here, and what would run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

from ntops_mla.cli import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. A bad argument is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m ntops_mla", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in COMMANDS:
        module = importlib.import_module(f"ntops_mla.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        if not hasattr(module, "run"):
            command.add_argument("--json", action="store_true", help="plain data instead of text")
        module.configure(command)
        command.set_defaults(module=module, parser=command)
    args = parser.parse_args(argv)
    try:
        if hasattr(args.module, "run"):
            return args.module.run(args)
        data = args.module.report(args)
    except (ValueError, TypeError) as error:  # the ops' own checks raise either
        args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")  # not .error(), which prints the usage as well
    try:
        print(json.dumps(data, indent=2) if args.json else args.module.text(data), flush=True)
    except BrokenPipeError:  # the reader, `head` say, has gone; the interpreter's own flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
