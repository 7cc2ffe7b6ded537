"""`accelerate estimate-memory`: the column Training using Adam.

Takes a model and a number format. Its float16 column is mixed precision with fp32 weights; there
is no column for a run in 16 bits throughout.
"""

from __future__ import annotations

from accelerate.commands.estimate import estimate_command_parser, gather_data

from benchmarks.peers.case import Case


def answer(case: Case) -> int:
    """Return the figure that the command would print, unrounded [bytes]."""
    case.only_one_gpu()
    case.only_in_transformers()
    case.only_methods("full")
    case.only_optimizers("adamw")
    dtype = "float32" if case.precision == "fp32" else "float16"
    arguments = estimate_command_parser().parse_args([case.model, "--dtypes", dtype])
    ((_, _, _, training),) = gather_data(arguments)
    return int(max(training.values()))
