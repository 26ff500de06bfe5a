"""The subcommands of `python -m ntops_mla`, one module each.

A subcommand module has `HELP`, `configure(parser)`, `report(args)`, which returns plain data, and `text(data)`, which
puts it for people; `--json` prints the data itself. One that takes long has `run(args)` instead, prints as it goes and
returns the exit status. A new subcommand is a new module and its name in `COMMANDS`.
"""

COMMANDS = ("platforms", "env", "ops", "explain", "doctor", "tune", "compile", "evidence")
