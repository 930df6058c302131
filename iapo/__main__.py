"""The command: iapo train|data|model|warmup|evaluate|report|export ...

    iapo train       train a model; iapo train --dry-run ... shows the configuration
    iapo data        prepare a data set
    iapo model       fetch a small pretrained model
    iapo warmup      teach a model the answer format before training
    iapo evaluate    accuracy and length of a run's validation completions, with intervals
    iapo report      a run before and after training, as a table and a picture
    iapo export      a checkpoint as a Hugging Face model

Each has a page of its own: iapo COMMAND --help. python -m iapo is the same command.
"""

import importlib
import os
import sys
from collections.abc import Callable

from iapo.launch.signals import Terminated, raise_on_sigterm

COMMANDS = {
    "train": "iapo.train",
    "data": "iapo.data",
    "model": "iapo.tools.model",
    "warmup": "iapo.launch.warmup",
    "evaluate": "iapo.tools.evaluate",
    "report": "iapo.tools.report",
    "export": "iapo.tools.export",
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in COMMANDS:
        print(f"iapo: command: {name!r} must be one of {', '.join(COMMANDS)}; see iapo --help.", file=sys.stderr)
        sys.exit(2)
    else:
        run(name, lambda given: importlib.import_module(COMMANDS[name]).main(given), arguments)


def run(name: str, command: Callable[[list[str]], int], arguments: list[str]) -> None:
    """End this process with the exit status of a command.

    A command is imported as it is called: it loads only what it needs, and may be interrupted meanwhile.
    """
    raise_on_sigterm()
    try:
        status = command(arguments)
    except KeyboardInterrupt:
        print(f"iapo.{name}: interrupted", file=sys.stderr)
        status = 130
    except Terminated:
        print(f"iapo.{name}: stopped by SIGTERM", file=sys.stderr)
        status = 143
    if status > 128:  # after a stop while Ray started, the interpreter may crash as it ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
