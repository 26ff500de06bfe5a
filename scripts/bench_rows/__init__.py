"""What scripts/bench.py is made of.

cases: what is timed, by name and numbers. counting: FLOP and bytes of each. problems: the tensors of a case and what
float64 makes of them. ways: how this library runs it. peers: how others do, where they can be imported. modules: whole
layers and the parts of a step. timing: the clock. ceilings: what the board itself can do. runner: check, then time.
record: the JSON. plots, table: what is shown. report: docs/performance.md out of many JSON files.
"""
