"""Two ranks of a process group, for tests of the worker.

Importing verl takes longer than what the ranks compute. So they are forked from Python's fork server, a process of its
own that imports verl once per test session.
"""

import multiprocessing

import torch.multiprocessing


def run_ranks(function, *arguments) -> None:
    """Call `function(rank, *arguments)` for the ranks 0 and 1, in a process each; what one raises is raised here."""
    multiprocessing.set_forkserver_preload(["tests.ranks_preload"])
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
