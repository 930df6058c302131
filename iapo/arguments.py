"""The arguments of the commands. Imports nothing heavy."""

import argparse
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors look like all others: one line, `iapo.X: what is wrong; fix`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.replace(' ', '.')}: {message}; see {self.prog} --help.\n")


def obstacle(folder: Path) -> str | None:
    """Why a folder can't be made or written into, in words that follow its name; None if it can."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # permissions say little to root, and about /proc
    except OSError as error:
        return f"can't be made, {existing} can't be written to ({error.strerror})"
    return None
