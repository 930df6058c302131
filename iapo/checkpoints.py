"""The checkpoints in a run's folder: which are whole, which one a start resumes from, which are too many.

verl writes `global_step_<N>/` with a folder `actor` that holds three files per rank, and names the last one in a
tracker file. No verl import.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from omegaconf import DictConfig

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


def step_folder(folder: Path, step: int) -> Path:
    """Where verl keeps the checkpoint of a step."""
    return Path(folder) / f"global_step_{step}"


def steps(folder: Path) -> list[int]:
    """The numbers of the `global_step_<N>` folders, in order."""
    names = [path.name.removeprefix("global_step_") for path in Path(folder).glob("global_step_*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def problem(folder: Path, contents: Sequence[str], ranks: int) -> str | None:
    """Why no run can resume from the folder of a step; None if it is whole.

    Args:
        contents: the parts that the run loads, by verl's names.
        ranks: of the actor whose files are here; 0 where they may be on other machines.
    """
    folder = Path(folder)
    parts = [FILES[name] for name in contents if name in FILES]  # the others, such as hf_model, are not read
    needed = [folder / f"actor/{part}_world_size_{ranks}_rank_{rank}.pt" for part in parts for rank in range(ranks)]
    needed.append(folder / "data.pt")  # verl writes it last
    if missing := next((path for path in needed if not path.is_file()), None):
        return f"{missing} is missing"
    states = [path for path in [folder / "methods.json"] if path.is_file()]
    if cut := next((path for path in [*needed, *states] if not _is_whole(path)), None):
        return f"{cut} is cut short"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a file of torch.save, or of JSON, is there from its beginning to its end; contents aren't compared."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
            return True
        with ZipFile(path) as file:
            for entry in file.infolist():
                file.open(entry).close()  # reads the entry's header, which a file without its beginning lacks
        return True
    except (BadZipFile, ValueError, OSError, EOFError):
        return False


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
        if (reason := problem(step_folder(folder, step), contents, ranks)) is None:
            return Resume(step, problems)
        problems.append(reason)
    return Resume(None, problems)


def resume_point(config: DictConfig) -> Resume | None:
    """The newest whole checkpoint in the run folder and what is wrong with newer ones; None if there is none."""
    if config.trainer.resume_mode != "auto" or not tracker_file(config).is_file():
        return None
    contents = config.actor_rollout_ref.actor.checkpoint.load_contents
    return resume(tracker_file(config).parent, contents, local_ranks(config))


def local_ranks(config: DictConfig) -> int:
    """The actor's ranks whose files are surely in the run folder here; other nodes may have one of their own."""
    return config.trainer.n_gpus_per_node if config.trainer.nnodes == 1 else 0


def tracker_file(config: DictConfig) -> Path:
    """Where verl keeps the number of the last checkpoint."""
    return Path(config.trainer.default_local_dir) / TRACKER


def remove_surplus(
    folder: Path, last: int, keep: int, contents: Sequence[str], ranks: int, spare: Collection[int] = ()
) -> list[int]:
    """Remove all steps older than the `keep` newest whole ones up to `last`, whichever process wrote them.

    Args:
        keep: below 1: all, as in verl.
        spare: steps that stay.

    Returns:
        The removed steps; empty if fewer than `keep` are whole. Steps that can't be deleted stay.
    """
    if keep < 1:
        return []
    folder = Path(folder)
    until = [step for step in steps(folder) if step <= last]
    whole = [step for step in until if problem(step_folder(folder, step), contents, ranks) is None]
    if len(whole) < keep:
        return []
    surplus = [step for step in until if step < whole[-keep] and step not in spare]
    for step in surplus:
        shutil.rmtree(step_folder(folder, step), ignore_errors=True)
    return surplus
