"""From the command line to one resolved configuration: the recipes, composed by Hydra."""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.data import default_dir, prepare
from iapo.launch.check_prompts import OUR_REWARD, is_embedded
from iapo.launch.checks import ConfigError, check, check_numbers, check_with_verl
from iapo.launch.machine import ALL_CORES, check_hub, check_machine, cpu_environment, gpu_count
from iapo.launch.provenance import by_dotted_key
from iapo.launch.weights import size_bucket
from iapo.tasks.embedded import TASKS
from iapo.verl_adapter import ENGINE_VENDOR
from iapo.verl_adapter.old_log_probs import needs_old_log_probs
from iapo.verl_adapter.vllm_plugin import RANKS

PACKAGE = Path(__file__).parent.parent
# The format that `iapo.reward` pays for, as `iapo.format`.
REWARD_FORMAT = "reward.custom_reward_function.reward_kwargs.format"


def checked_config(overrides: list[str], files: bool = True) -> DictConfig:
    """The configuration that a command line asks for, after every check that is possible before Ray starts.

    Args:
        overrides: the arguments of the command line.
        files: also make the embedded data, and look at machine, data, model and run folder.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    config = resolve(overrides)
    if files:
        check_hub(str(config.actor_rollout_ref.model.path))
        prepare_data(config)
        check_machine(config)
        size_bucket(config)
    check(config, files=files)
    if not needs_old_log_probs(config):  # verl's metric of entropy comes with them
        config.actor_rollout_ref.actor.calculate_entropy = True
    check_with_verl(config)
    return config


def resolve(overrides: list[str]) -> DictConfig:
    """Compose the recipes with `overrides`, resolve every interpolation, name the run and its folder.

    Raises:
        ConfigError: an unknown recipe, an unknown key, a value of the wrong form.
    """
    data_dir()  # which may be refused, and a resolver would wrap that
    register_resolvers()
    register_defaults()
    try:
        expanded = [part for override in overrides for part in expand(override)]
        check_readable(expanded)
        variants = chosen_variants(expanded)
        variant = "+".join(variants)
        with initialize_config_dir(str(recipes_dir()), version_base=None):
            config = compose("run", overrides=expanded, return_hydra_config=True)
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
            set_environment(config)
            if os.environ.get("RAY_ADDRESS"):  # Ray refuses resources for a cluster that is running already
                config.ray_kwargs.ray_init.num_cpus = None
                config.ray_kwargs.ray_init.num_gpus = None
        if wrong := [line for line in check_numbers(config) if line.startswith("data.")]:
            raise ConfigError("\n".join(wrong))  # other keys are computed from these
        OmegaConf.resolve(config)
        for name in ("exit_marker", "probe", "answer_end"):  # neither a shell nor Hydra makes a line break of \n
            if isinstance(text := config.iapo[name], str):
                config.iapo[name] = text.replace("\\n", "\n")
        choose_score(config)
        reward = config.reward.custom_reward_function
        if (reward.path, reward.name) == OUR_REWARD and config.iapo.format != IapoConfig().format:
            if (given := OmegaConf.select(config, REWARD_FORMAT)) not in (None, config.iapo.format):
                raise ConfigError(
                    f"{REWARD_FORMAT}: {given!r} is not iapo.format={config.iapo.format!r}; leave it out."
                )
            OmegaConf.update(config, REWARD_FORMAT, config.iapo.format, force_add=True)
        return config
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(str(error))) from None


def choose_score(config: DictConfig) -> None:
    """Put what the model and the terms need in place of `iapo.score=auto`, and print it. Another score stays."""
    if config.iapo.score == "auto":
        entropy = is_embedded(config) and not config.iapo.progress
        config.iapo.score = "first_token_entropy" if entropy else "reference_answer"
        print(f"iapo: iapo.score=auto is {config.iapo.score} in this run", file=sys.stderr)


def check_readable(overrides: list[str]) -> None:
    """Refuse what Hydra can't read, and recipes that don't exist, by the name of the key.

    Raises:
        ConfigError: the first such argument.
    """
    parser = OverridesParser.create()
    for override in overrides:
        key, found, value = override.partition("=")
        if not found:
            raise ConfigError(f"{override!r}: an argument is key=value; see iapo train --help.")
        if key in GROUPS and value not in (known := recipe_names(key)):
            listed = ", ".join(name for name in known if name not in INNER_RECIPES)
            raise ConfigError(f"{key}: {value!r} must be one of {listed}, or {GROUPS[key]}.")
        try:
            parsed = parser.parse_override(override)
        except HydraException:
            raise ConfigError(
                f"{key}: {value!r} can't be read; a value with spaces or any of ,:=()[]{{}}<> is quoted twice: "
                "'key=\"a, b\"'."
            ) from None
        if parsed.is_sweep_override():  # Hydra could start several runs
            several = f"a list as '{key}=[1,2]', or a text with commas quoted twice, '{key}=\"a, b\"'"
            if key == "variant":
                several = "or several that act together as variant=[iapo_rate,gfpo]"
            raise ConfigError(f"{key}: {value!r} stands for several runs; give one, {several}.")
        if key == "format" and value not in FORMATS:
            raise ConfigError(f"format: {value!r} must be one of {', '.join(FORMATS)}.")
        if key.lstrip("+") == "iapo.format":
            raise ConfigError(
                f"iapo.format: {value!r} sets neither markers nor probe; give format={value} in its place, one of "
                f"{', '.join(FORMATS)}."
            )


# What else a group of recipes takes, and the recipes that are chosen by giving that or by other recipes.
GROUPS = {
    "model": "a folder that holds a model, or a hub name (org/name)",
    "data": "a folder that holds train.parquet and test.parquet",
}
INNER_RECIPES = ("path", "parquet", "iapo_data", "evaluation")


def recipe_names(group: str) -> list[str]:
    return sorted(path.stem for path in (recipes_dir() / group).glob("*.yaml"))


def set_environment(config: DictConfig) -> None:
    """Complete the environment of the run's processes; what the user gave, here or in the shell, stays."""
    given = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    given = {name: str(value) for name, value in given.items()}
    environment = {"TENSORBOARD_DIR": f"{config.run_dir}/tensorboard", "VERL_ENGINE_VENDOR": ENGINE_VENDOR} | given
    if config.trainer.device == "cpu":
        users = {
            name: value for name, value in os.environ.items() if name != ALL_CORES or "OMP_NUM_THREADS" not in given
        }
        environment |= cpu_environment(users | given) | {RANKS: str(config.trainer.n_gpus_per_node)}
    config.ray_kwargs.ray_init.runtime_env.env_vars = environment


def chosen_variants(overrides: list[str]) -> list[str]:
    """The recipes of variant=...; Hydra's list of choices lacks them if there are several.

    Raises:
        ConfigError: one that doesn't exist, or one twice.
    """
    given = [override.removeprefix("variant=") for override in overrides if override.startswith("variant=")]
    if not given:
        listed = OmegaConf.to_container(OmegaConf.load(recipes_dir() / "run.yaml"))["defaults"]
        return [entry["variant"] for entry in listed if isinstance(entry, dict) and "variant" in entry]
    value = given[-1].strip("'\"")
    several = value.startswith("[") and value.endswith("]")
    names = [name.strip() for name in value[1:-1].split(",")] if several else [value]
    known = recipe_names("variant")
    for name in names:
        if name not in known:
            raise ConfigError(f"variant: {name!r} must be one of {', '.join(known)}, or several as [iapo_rate,gfpo].")
        if names.count(name) > 1:
            raise ConfigError(f"variant: {value} names {name} twice; name it once.")
    return names


def overwritten(variants: list[str]) -> Iterator[str]:
    """What one recipe of variant=[...] sets and a later one sets to something else, one line each."""
    settings: dict[str, tuple[str, object]] = {}
    for name in variants:
        for key, value in settings_of(name).items():
            before, old = settings.get(key, (name, value))
            if old != value:
                yield f"variant: {name} sets {key}={value}, in place of {old} of {before}; put the one you want last."
            settings[key] = (name, value)


def settings_of(variant: str) -> dict[str, object]:
    """The values of a recipe by dotted key, not resolved, with those of the variants that it builds on."""
    recipe = OmegaConf.to_container(OmegaConf.load(recipes_dir() / "variant" / f"{variant}.yaml"))
    bases = [base.removeprefix("/variant/") for base in recipe.pop("defaults", []) if isinstance(base, str)]
    settings = {}
    for base in bases:
        if (recipes_dir() / "variant" / f"{base}.yaml").is_file():  # not _self_
            settings |= settings_of(base)
    return settings | by_dotted_key(recipe)


def explain(hydra_error: str, recipe: str = "run", lists_all: str = "--dry-run lists all.") -> str:
    """One line with field, value and fix, from Hydra's error about the keys of a recipe."""
    if unknown := re.match("Could not override '(.*)'", hydra_error):
        with initialize_config_dir(str(recipes_dir()), version_base=None):
            known = list(flat(compose(recipe)))
        section, _, name = unknown[1].rpartition(".")
        siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
        likely = [f"{section}.{key}".lstrip(".") for key in difflib.get_close_matches(name, siblings, n=1)]
        likely += sorted(
            (key for key in known if key.endswith(f".{name}")), key=lambda key: not key.startswith("iapo.")
        )
        return f"{unknown[1]}: unknown key; " + (f"did you mean {likely[0]}?" if likely else lists_all)
    # The rest says where Hydra looked; that doesn't help.
    return " ".join(re.split("Config search path|See https", hydra_error)[0].split())


def flat(node, prefix: str = "") -> Iterator[str]:
    """The dotted name of every key; nothing is resolved."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from flat(child, f"{prefix}{key}.")


def register_resolvers() -> None:
    """The interpolations of the recipes."""
    resolvers = {
        "iapo.asset": lambda name: str(PACKAGE / "assets" / name),
        "iapo.recipe": lambda name: str(recipes_dir() / name),
        "iapo.dataset": lambda name: str(data_dir() / name),
        "iapo.format": lambda name, field: getattr(FORMATS[name], field),
        "iapo.model": lambda name: str(data_dir() / "models" / name),
        "iapo.part": lambda length, share: int(Fraction(str(share)) * int(length)),
        "iapo.mini_batch": mini_batch,
        "iapo.pack": lambda tokens, prompt, response: max(int(tokens), int(prompt) + int(response)),
        "iapo.gpu_count": gpu_count,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def mini_batch(prompts: int, updates: int) -> int:
    """Prompts per update, so that a batch makes at least that many equal updates, or one per prompt if it has fewer."""
    return next(size for size in range(max(1, prompts // updates), 0, -1) if prompts % size == 0)


def register_defaults() -> None:
    """The part `iapo_config` of recipes/run.yaml: the section `iapo` with the defaults of `IapoConfig`."""
    ConfigStore.instance().store("iapo_config", {"iapo": asdict(IapoConfig())}, package="_global_")


def data_dir() -> Path:
    try:
        return default_dir().absolute()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def recipes_dir() -> Path:
    """The recipes: next to the package in a checkout, inside it in an installed wheel."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def expand(override: str) -> list[str]:
    """model= and data= also take a path or a hub name: whatever is no recipe, and is a folder or holds a slash.

    Hydra reads no value with one of `,:=()[]{}<>` unless it is quoted. Here it may be, and need not be.
    """
    key, _, value = override.partition("=")
    if key not in ("model", "data"):
        return [override]
    if value[:1] in ("'", '"') and value[-1:] == value[:1]:
        value = value[1:-1]
    if key == "data" and Path(value).is_file():
        raise ConfigError(f"data: {value} is a file; give {GROUPS['data']}.")
    is_path = "/" in value or (value and Path(value).is_dir())
    if not is_path or (recipes_dir() / key / f"{value}.yaml").is_file():
        return [f"{key}={value}"]
    local = os.path.abspath(os.path.expanduser(value))
    if key == "data":
        train, test = quoted(f"{local}/train.parquet"), quoted(f"{local}/test.parquet")
        return ["data=parquet", f"data.train_files={train}", f"data.val_files={test}"]
    return ["model=path", f"actor_rollout_ref.model.path={quoted(local if os.path.isdir(local) else value)}"]


def quoted(text: str) -> str:
    """A text as Hydra's grammar reads it, whatever is in it."""
    return QuotedString(text, Quote.single).with_quotes()


def prepare_data(config) -> None:
    """Generate the embedded data set that this run uses, if there is one and it isn't there yet."""
    folder = Path(str(config.data.train_files)).parent
    if folder.parent == data_dir() and folder.name in TASKS and not (folder / "test.parquet").is_file():
        try:
            prepare(folder.name, data_dir())
        except OSError as error:
            raise ConfigError(
                f"IAPO_DATA_DIR: the data can't be written to {folder} ({error.strerror}); set the variable to a "
                "folder that can be written to."
            ) from None
