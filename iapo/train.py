"""Train: iapo train [--dry-run] [variant=...] [model=...] [data=...] [platform=...] [key=value ...]

variant   iapo (the paper), iapo_rate, iapo_progress (ours), grpo, dapo, or another file of recipes/variant; several
          that act together as variant=[iapo_rate,gfpo]
model     tiny, tiny-worked, tiny-registers, smollm2-135m-instruct (made by iapo model), qwen2.5-0.5b-instruct,
          qwen2.5-1.5b-instruct, qwen2.5-7b-instruct, or any folder or hub name
data      verbose_arithmetic, worked_sums, checked_registers, gsm8k, svamp, math500, dapo_math_17k, or a folder with
          train.parquet and test.parquet; for validation only aime24, aime25, amc23, minerva, olympiadbench
platform  cpu or gpu; by default what the machine has
key=value any key that --dry-run shows, e.g. iapo.alpha=0.05 trainer.total_training_steps=100

--dry-run prints the resolved configuration and checks it, but not that data, model and GPUs are there.
python -m iapo.train is the same command.
"""

import io
import logging
import os
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Exit status: 0 trained, 1 failed, 2 wrong configuration (nothing was started or written), 130/143 stopped."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    dry_run = "--dry-run" in arguments
    unknown = [argument for argument in arguments if argument.startswith("-") and argument != "--dry-run"]
    if unknown:
        return refuse(f"{unknown[0]}: unknown option; known are --dry-run and --help.")
    # Imported only now, so that a Ctrl-C during these seconds gets its one line too.
    from iapo.launch.checks import ConfigError
    from iapo.launch.folder_lock import FolderInUse
    from iapo.launch.machine import choose_platform, cpu_environment
    from iapo.tools.report import print_table

    overrides = [argument for argument in arguments if argument != "--dry-run"]
    platform = choose_platform(overrides)
    if platform not in ("cpu", "gpu"):
        return refuse(f"platform: {platform!r} must be cpu or gpu.")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of source code
    # It would repeat at every start what is set here.
    logging.getLogger("verl.plugin.platform.platform_manager").addFilter(lambda r: r.levelno > logging.INFO)
    try:
        if platform == "cpu":
            os.environ.update(cpu_environment(os.environ))
        from iapo.launch.compose import checked_config  # imports verl, which reads these

        given = [f"platform={platform}", *overrides]
        if dry_run:
            return print_config(given)
        config = checked_config(given)
        from iapo.launch.run import run  # imports verl's trainer, which needs the platform that was checked

        status = run(config)
    except ConfigError as error:
        return refuse(str(error))
    except FolderInUse as error:
        return refuse(f"run_dir: {error}")
    if status == 0:
        print_table(Path(config.run_dir))
    return status


def print_config(arguments: list[str]) -> int:
    """The dry run: the configuration on standard output, and after its thousand lines what the checks had to say."""
    from omegaconf import OmegaConf

    from iapo.launch.compose import checked_config

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            config = checked_config(arguments, files=False)
        print(OmegaConf.to_yaml(config), flush=True)
    finally:
        sys.stderr.write(said.getvalue())
    print(
        "iapo: a dry run doesn't check machine, data, model and run folder; a run does, before it starts",
        file=sys.stderr,
    )
    return 0


def refuse(problems: str) -> int:
    """Say what is wrong, a line each; the exit status."""
    for line in problems.splitlines():
        print(f"iapo.train: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    from iapo.__main__ import run as end_with

    end_with("train", main, sys.argv[1:])
