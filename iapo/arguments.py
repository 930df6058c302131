"""The arguments of the commands. Imports nothing heavy."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors look like all others: one line, `iapo.X: what is wrong; fix`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.replace(' ', '.')}: {message}; see {self.prog} --help.\n")
