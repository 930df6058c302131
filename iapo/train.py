"""Train: python -m iapo.train [--dry-run] [variant=...] [model=...] [data=...] [platform=...] [key=value ...]

variant   iapo (the paper), iapo_rate (ours), grpo, dapo, or another file of recipes/variant; several that act together
          as variant=[iapo_rate,gfpo]
model     tiny, qwen2.5-0.5b-instruct, qwen2.5-1.5b-instruct, qwen2.5-7b-instruct, or any folder or hub name
data      verbose_arithmetic, gsm8k, math500, dapo_math_17k, or a folder with train.parquet and test.parquet
platform  cpu or gpu; by default what the machine has
key=value any key of recipes/iapo_defaults.yaml or of verl, e.g. iapo.alpha=0.05 trainer.total_training_steps=100

--dry-run prints the resolved configuration and checks it, but not that data, model and GPUs are there.
"""

import difflib
import logging
import os
import re
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

from iapo.folder_lock import FolderInUse, lock

# What platform=cpu needs in the environment of every process, before verl is imported.
CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # verl's own switch: it has no engine for "cpu" and runs the one for "cuda"
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQ_NUM_THREADS": "1",
}

# Signals that end a run politely, with exit status 128 + number.
STOPS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted"}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 trained, 1 failed, 2 wrong configuration (nothing was started or written), 130/143 stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    dry_run = "--dry-run" in arguments
    unknown = [argument for argument in arguments if argument.startswith("-") and argument != "--dry-run"]
    if unknown:
        print(f"iapo.train: {unknown[0]}: unknown option; known are --dry-run and --help", file=sys.stderr)
        return 2
    overrides = [argument for argument in arguments if argument != "--dry-run"]
    platform = choose_platform(overrides)
    if platform not in ("cpu", "gpu"):
        print(f"iapo.train: platform: {platform} must be cpu or gpu", file=sys.stderr)
        return 2
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of source code
    # It tells at every start what is set here.
    logging.getLogger("verl.plugin.platform.platform_manager").addFilter(lambda r: r.levelno > logging.INFO)
    if platform == "cpu":
        os.environ.update(CPU_ENVIRONMENT)

    from iapo.checks import ConfigError, check

    try:
        config = resolve([f"platform={platform}", *overrides])
        if not dry_run:
            prepare_data(config)
            check_machine(config)
        check(config, files=not dry_run)
        check_with_verl(config)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"iapo.train: {line}", file=sys.stderr)
        return 2
    if dry_run:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config))
        return 0
    try:
        with lock_run_dir(config):
            return run(config)
    except FolderInUse as error:
        print(f"iapo.train: run_dir: {error}", file=sys.stderr)
        return 2


def lock_run_dir(config) -> AbstractContextManager:
    """No second run in the same folder at the same time, whose files would mix; held by this process alone.

    Raises:
        FolderInUse: there is one.
    """
    try:
        file = lock(Path(config.run_dir) / "run.lock")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        return file
    except OSError as error:  # some network file systems
        warnings.warn(f"run_dir: {config.run_dir} can't be locked ({error}); start no second run in it.", stacklevel=2)
        return nullcontext()


def choose_platform(overrides: list[str]) -> str:
    """The last platform=... of the command line, else what the machine has."""
    for override in reversed(overrides):
        if override.startswith("platform="):
            return override.removeprefix("platform=")
    return "gpu" if gpu_count() else "cpu"


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def resolve(overrides: list[str]):
    """Compose the recipes with `overrides`, resolve every interpolation, name the run and its folder.

    Raises:
        ConfigError: an unknown recipe, an unknown key, a value of the wrong form.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from iapo.checks import ConfigError, check_numbers

    register_resolvers()
    try:
        expanded = [part for override in overrides for part in expand(override)]
        variants = chosen_variants(expanded)
        variant = "+".join(variants)
        with initialize_config_dir(str(recipes_dir()), version_base=None):
            config = compose("iapo", overrides=expanded, return_hydra_config=True)
        for line in overwritten(variants) if len(variants) > 1 else ():
            warnings.warn(line, stacklevel=2)
        choices = config.hydra.runtime.choices
        with open_dict(config):
            del config["hydra"]
            model = Path(config.actor_rollout_ref.model.path).name if choices.model == "path" else choices.model
            files = config.data.train_files
            first = files if isinstance(files, str) or not files else files[0]
            data = Path(str(first)).parent.name if choices.data == "parquet" else choices.data
            config.trainer.experiment_name = config.trainer.experiment_name or f"{variant}-{model}-{data}"
            config.run_dir = os.path.abspath(config.run_dir or Path("runs") / config.trainer.experiment_name)
            environment = {"TENSORBOARD_DIR": f"{config.run_dir}/tensorboard"}
            if config.trainer.device == "cpu":
                environment |= CPU_ENVIRONMENT
            config.ray_kwargs.ray_init.runtime_env.env_vars = environment
            if os.environ.get("RAY_ADDRESS"):  # Ray refuses resources for a cluster that is running already
                config.ray_kwargs.ray_init.num_cpus = None
                config.ray_kwargs.ray_init.num_gpus = None
        if wrong := [line for line in check_numbers(config) if line.startswith("data.")]:
            raise ConfigError("\n".join(wrong))  # other keys are computed from these
        OmegaConf.resolve(config)
        return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(str(error), getattr(error, "override", None))) from None


def chosen_variants(overrides: list[str]) -> list[str]:
    """The recipes of variant=..., which Hydra's list of choices leaves out where there are several.

    Raises:
        ConfigError: one that isn't there, or twice.
    """
    from iapo.checks import ConfigError

    given = [override.removeprefix("variant=") for override in overrides if override.startswith("variant=")]
    if not given:
        return ["iapo_rate"]
    value = given[-1].strip("'\"")
    listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    names = [name.strip() for name in listed.split(",")]
    known = sorted(path.stem for path in (recipes_dir() / "variant").glob("*.yaml"))
    for name in names:
        if name not in known:
            raise ConfigError(f"variant: {name!r} must be one of {', '.join(known)}, or several as [iapo_rate,gfpo].")
        if names.count(name) > 1:
            raise ConfigError(f"variant: {value} names {name} twice; name it once.")
    return names


def overwritten(variants: list[str]) -> Iterator[str]:
    """What an earlier recipe of variant=[...] sets and a later one sets otherwise, one line each."""
    settings: dict[str, tuple[str, object]] = {}
    for name in variants:
        for key, value in settings_of(name).items():
            before, old = settings.get(key, (name, value))
            if old != value:
                yield f"variant: {name} sets {key}={value}, in place of {old} of {before}; order them as you mean it."
            settings[key] = (name, value)


def settings_of(variant: str) -> dict[str, object]:
    """The values of a recipe by dotted key, nothing resolved, those of the variants that it builds on included."""
    from omegaconf import OmegaConf

    from iapo.provenance import by_dotted_key

    recipe = OmegaConf.to_container(OmegaConf.load(recipes_dir() / "variant" / f"{variant}.yaml"))
    bases = [base.removeprefix("/variant/") for base in recipe.pop("defaults", []) if isinstance(base, str)]
    settings = {}
    for base in bases:
        if (recipes_dir() / "variant" / f"{base}.yaml").is_file():  # not _self_
            settings |= settings_of(base)
    return settings | by_dotted_key(recipe)


def explain(hydra_error: str, override: str | None = None) -> str:
    """One line with the field, the value and the fix from what Hydra says, of an override that it can't read."""
    from hydra import compose, initialize_config_dir

    if unknown := re.match("Could not override '(.*)'", hydra_error):
        with initialize_config_dir(str(recipes_dir()), version_base=None):
            known = list(flat(compose("iapo")))
        section, _, name = unknown[1].rpartition(".")
        beside = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
        likely = [f"{section}.{key}".lstrip(".") for key in difflib.get_close_matches(name, beside, n=1)]
        likely += [key for key in known if key.endswith(f".{name}")]
        return f"{unknown[1]}: unknown key; " + (f"did you mean {likely[0]}?" if likely else "--dry-run lists all.")
    # What follows, where Hydra looked or that it could start several runs, doesn't help.
    text = " ".join(re.split("Config search path|See https|3. To sweep", hydra_error)[0].split())
    if override and override not in text:
        text = f"{override}: {text}"
    if override or "expecting" in text or "parsing override" in text:
        text += " (an argument is key=value; a value with spaces or any of ,:=()[]{} is quoted twice: 'key=\"a, b\"')"
    return text


def flat(node, prefix: str = "") -> Iterator[str]:
    """The dotted names of every key, without resolving anything."""
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from flat(child, f"{prefix}{key}.")


def register_resolvers() -> None:
    """The interpolations of the recipes."""
    from omegaconf import OmegaConf

    resolvers = {
        "iapo.asset": lambda name: str(Path(__file__).parent / "assets" / name),
        "iapo.recipe": lambda name: str(recipes_dir() / name),
        "iapo.dataset": lambda name: str(data_dir() / name),
        "iapo.part": lambda length, share: int(Fraction(str(share)) * int(length)),
        "iapo.pack": lambda tokens, prompt, response: max(int(tokens), int(prompt) + int(response)),
        "iapo.gpu_count": lambda: gpu_count(),
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def data_dir() -> Path:
    return Path(os.environ.get("IAPO_DATA_DIR", "data")).absolute()


def recipes_dir() -> Path:
    """recipes/ beside the package in a checkout, inside it in an installed wheel."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "recipes"


def expand(override: str) -> list[str]:
    """model= and data= also take a path or a hub name: whatever is no recipe and is a folder or holds a slash."""
    key, _, value = override.partition("=")
    if key not in ("model", "data") or (recipes_dir() / key / f"{value}.yaml").is_file():
        return [override]
    if "/" not in value and not Path(value).is_dir():
        return [override]
    local = os.path.abspath(os.path.expanduser(value))
    if key == "data":
        return ["data=parquet", f"data.train_files='{local}/train.parquet'", f"data.val_files='{local}/test.parquet'"]
    return ["model=path", f"actor_rollout_ref.model.path='{local if os.path.isdir(local) else value}'"]


def prepare_data(config) -> None:
    """Generate the embedded data set if this run uses it and it isn't there yet."""
    from iapo.checks import ConfigError
    from iapo.data import prepare

    folder = data_dir() / "verbose_arithmetic"
    if Path(str(config.data.train_files)).parent == folder and not (folder / "test.parquet").is_file():
        try:
            prepare("verbose_arithmetic", data_dir())
        except OSError as error:
            raise ConfigError(
                f"IAPO_DATA_DIR: the data can't be written to {folder} ({error.strerror}); set the variable to a "
                "folder that can be written to."
            ) from None


def check_machine(config) -> None:
    """The platform is usable: verl loaded this package's plugin, whose failure it hides; GPUs and Ray are there."""
    from verl.plugin.platform import PlatformRegistry
    from verl.utils.device import auto_set_device

    from iapo.checks import ConfigError

    known = os.environ.get("RAY_ADDRESS") or config.ray_kwargs.ray_init.get("address")
    if config.trainer.nnodes > 1 and not known:
        raise ConfigError(
            f"trainer.nnodes: {config.trainer.nnodes}, but RAY_ADDRESS names no Ray cluster; start one on the nodes, "
            "as scripts/slurm/iapo.sbatch does, and set RAY_ADDRESS=auto, or use trainer.nnodes=1."
        )
    if config.trainer.device == "cpu":
        if PlatformRegistry.get("cpu") is None:
            raise ConfigError(
                "platform: 'cpu', but verl didn't load this package's plugin (entry point verl.plugins); install the "
                "package with pip install -e '.[cpu]' and leave VERL_USE_EXTERNAL_PLUGINS unset."
            )
    else:
        most = gpu_count() if config.trainer.nnodes == 1 else 1024
        if not 1 <= config.trainer.n_gpus_per_node <= most:
            raise ConfigError(
                f"trainer.n_gpus_per_node: {config.trainer.n_gpus_per_node}, but this machine has {gpu_count()} usable "
                f"GPU(s); {f'set it to between 1 and {most}' if most else 'run on one with GPUs'}, or use platform=cpu "
                "model=tiny."
            )
    check_vllm_plugin()
    check_ray_answers(os.environ.get("RAY_ADDRESS", ""))
    auto_set_device(config)


def check_vllm_plugin() -> None:
    """vLLM will load this package's plugin, without which the trainer waits for ever to hand over its first weights."""
    from importlib.metadata import entry_points

    from iapo.checks import ConfigError
    from iapo.verl_adapter.vllm_plugin import ENTRY_POINT

    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS: '{allowed}' leaves out '{ENTRY_POINT}', which iapo needs; add or unset it.")
    plugins = list(entry_points(group="vllm.general_plugins", name=ENTRY_POINT))
    try:
        plugins[0].load()  # vLLM swallows what goes wrong here
    except (IndexError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"iapo: its vLLM plugin isn't installed ({error!r}); install the package as it is now: pip install -e ."
        ) from None


def check_ray_answers(address: str) -> None:
    """Ray itself would try for minutes to reach a cluster at host:port that isn't there."""
    from iapo.checks import ConfigError

    if not (match := re.fullmatch(r"([\w.-]+):(\d+)", address)):
        return  # none, or "auto", "local", ray://...
    try:
        socket.create_connection((match[1], int(match[2])), timeout=5).close()
    except (OSError, OverflowError) as error:
        reason = f"RAY_ADDRESS: nothing answers at {address} ({error})"
        raise ConfigError(f"{reason}; start Ray there, or unset the variable.") from None


def check_with_verl(config) -> None:
    """verl's own validation of a resolved configuration."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from iapo.checks import ConfigError

    try:
        with redirect_stdout(sys.stderr):  # a dry run prints nothing but the configuration
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"verl: {' '.join(str(error).split()) or type(error).__name__}") from None


def run(config) -> int:
    import ray
    from omegaconf import OmegaConf
    from verl.trainer.main_ppo import run_ppo

    from iapo.provenance import save, tracker_file
    from iapo.report import print_table
    from iapo.shared_memory import RUN_ID, removes_own_segments
    from iapo.signals import recorded_signals
    from iapo.verl_adapter.runner import IapoTaskRunner

    save(config)
    print(f"iapo: run folder {config.run_dir}", flush=True)
    runner_class = ray.remote(IapoTaskRunner)

    def stopped_by():
        return next((number for number in STOPS if number in arrived()), None)

    def stop(*_):
        sys.exit()

    def start_runner(*arguments, **options):
        # A polite stop (Slurm, kill) unwinds through the clean-up below. Ray puts in a handler of its own when it
        # starts, so ours comes again after that; what arrived meanwhile may have been lost in one of Ray's destructors.
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
        on = "goes on from the last checkpoint" if tracker_file(config).is_file() else "starts anew: no checkpoint yet"
        print(f"iapo.train: {STOPS[stop_signal]}; the same command {on}", file=sys.stderr)
        return 128 + stop_signal
    if failure is not None:  # last of all, behind what Ray still had to print
        reason = (str(failure).strip().splitlines() or [""])[-1]
        print(f"iapo.train: the run failed: {type(failure).__name__}: {reason}", file=sys.stderr)
        return 1
    print_table(Path(config.run_dir))
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:  # `run` handles those that come while something is running
        print("iapo.train: interrupted", file=sys.stderr)
        status = 130
    if status > 128:  # a Ray that was stopped while it started may crash the interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
