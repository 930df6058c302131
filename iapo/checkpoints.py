"""The checkpoints in a run's folder: which are whole, which one a start resumes from, which are too many.

verl writes `global_step_<N>/` with a folder `actor` that holds three files per rank, and names the last one in a
tracker file. No verl import.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import is_zipfile

TRACKER = "latest_checkpointed_iteration.txt"
# By part of a checkpoint, as verl's `checkpoint.load_contents` names them: how its files begin.
FILES = {"model": "model", "optimizer": "optim", "extra": "extra_state"}


class Resume(NamedTuple):
    """Where a start resumes.

    Attributes:
        step: the newest whole step that the tracker allows; None: there is none.
        problems: what is wrong with the newer ones, one line each.
    """

    step: int | None
    problems: list[str]


def steps(folder: Path) -> list[int]:
    """The numbers of the `global_step_<N>` folders, in order."""
    names = [path.name.removeprefix("global_step_") for path in Path(folder).glob("global_step_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def problem(folder: Path, contents: Sequence[str], ranks: int) -> str | None:
    """Why no run can resume from the folder of a step; None if it is whole.

    Args:
        contents: the parts that the run loads, keys of `FILES`.
        ranks: of the actor.
    """
    needed = [f"actor/{FILES[c]}_world_size_{ranks}_rank_{rank}.pt" for c in contents for rank in range(ranks)]
    for name in [*needed, "data.pt"]:
        path = Path(folder) / name
        if not path.is_file():
            return f"{path} is missing"
        if not is_zipfile(path):  # torch.save writes one; a file that was cut lacks its end
            return f"{path} is cut short"
    return None


def resume(folder: Path, contents: Sequence[str], ranks: int) -> Resume:
    """The newest whole step, not after the one that the tracker names: a later one was never finished.

    A tracker that holds no number allows every step.
    """
    text = (Path(folder) / TRACKER).read_text(errors="replace").strip()
    found, problems = steps(folder), []
    if not text.isdecimal():
        problems.append(f"{TRACKER} holds {text!r} and no step")
    elif int(text) not in found:
        problems.append(f"{TRACKER} names step {text}, which isn't there")
    allowed = [step for step in found if not text.isdecimal() or step <= int(text)]
    for step in reversed(allowed):
        if (reason := problem(Path(folder) / f"global_step_{step}", contents, ranks)) is None:
            return Resume(step, problems)
        problems.append(reason)
    return Resume(None, problems)


def remove_surplus(folder: Path, last: int, keep: int, contents: Sequence[str], ranks: int) -> list[int]:
    """Remove all steps older than the `keep` newest whole ones up to `last`, whichever process wrote them.

    Returns:
        The steps that were removed. None is, where fewer than `keep` are whole.
    """
    folder = Path(folder)
    until = [step for step in steps(folder) if step <= last]
    whole = [step for step in until if problem(folder / f"global_step_{step}", contents, ranks) is None]
    if len(whole) < keep:
        return []
    surplus = [step for step in until if step < whole[-keep]]
    for step in surplus:
        shutil.rmtree(folder / f"global_step_{step}")
    return surplus
