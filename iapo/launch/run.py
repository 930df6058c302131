"""One run, from a checked configuration to its exit status: lock, Ray, verl's trainer, signals, clean-up."""

import os
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import ray
from omegaconf import DictConfig, OmegaConf
from verl.trainer.main_ppo import run_ppo

from iapo.checkpoints import tracker_file
from iapo.launch.folder_lock import lock_run_dir
from iapo.launch.provenance import save
from iapo.launch.shared_memory import removes_own_segments
from iapo.launch.signals import recorded_signals
from iapo.verl_adapter.runner import IapoTaskRunner
from iapo.verl_adapter.vllm_plugin import RUN_ID

# Signals that end a run politely, with exit status 128 + number.
STOPS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted"}


def run(config: DictConfig) -> int:
    """Train, and leave nothing but the run folder; returns the exit status of `iapo.train.main`.

    Raises:
        FolderInUse: another run works in the folder.
    """
    with lock_run_dir(Path(config.run_dir)):
        return _run(config)


def _run(config: DictConfig) -> int:
    save(config)
    print(f"iapo: run folder {config.run_dir}", flush=True)
    runner_class = ray.remote(IapoTaskRunner)

    def stopped_by():
        return next((number for number in STOPS if number in arrived()), None)

    def stop(*_):
        sys.exit()

    def start_runner(*arguments, **options):
        # A polite stop (Slurm, kill) unwinds through the clean-up below. Ray installs a handler of its own when it
        # starts, so ours is installed again. A signal that arrived meanwhile may be lost in one of Ray's destructors.
        signal.signal(signal.SIGTERM, stop)
        if stopped_by():
            stop()
        return runner_class.remote(*arguments, **options)

    failure = None
    with recorded_signals() as arrived, removes_own_segments():
        OmegaConf.update(
            config, f"ray_kwargs.ray_init.runtime_env.env_vars.{RUN_ID}", os.environ[RUN_ID], force_add=True
        )
        try:
            signal.signal(signal.SIGTERM, stop)
            run_ppo(config, task_runner_class=SimpleNamespace(remote=start_runner, options=runner_class.options))
        except ray.exceptions.RayError as error:
            print(error, file=sys.stderr)
            failure = getattr(error, "cause", None) or error
        except Exception as error:  # Ray's start raises plain ones
            traceback.print_exc()
            failure = error
        except (SystemExit, KeyboardInterrupt):
            if not stopped_by():
                raise
        finally:
            stop_signal = stopped_by()
            for number in STOPS:  # a second one must not cut the clean-up short
                signal.signal(number, signal.SIG_IGN)
            ray.shutdown()
    if stop_signal:
        how = "resumes from the last checkpoint" if tracker_file(config).is_file() else "starts over: no checkpoint yet"
        print(f"iapo.train: {STOPS[stop_signal]}; the same command {how}", file=sys.stderr)
        return 128 + stop_signal
    if failure is not None:  # last of all, after what Ray still had to print
        reason = (str(failure).strip().splitlines() or [""])[-1]
        print(f"iapo.train: the run failed: {type(failure).__name__}: {reason}", file=sys.stderr)
        return 1
    return 0
