"""What can be wrong with a run's configuration and is known before Ray starts.

The options are checked here, alone and together; `iapo.launch.check_files` checks what they point to. Each check
yields its problems, one line each: field, value, fix.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.data import EVALUATION
from iapo.launch.check_files import file_problems
from iapo.launch.check_prompts import OUR_REWARD, is_embedded
from iapo.methods import Method, acts_by, conflicts, make_methods
from iapo.probe.supported_models import TURN_OFF


class ConfigError(ValueError):
    """One or more problems of a configuration, one line each."""


def check(config: DictConfig, files: bool = True) -> None:
    """Look for everything that is wrong; warn of options without effect.

    Args:
        config: resolved.
        files: also look at data, model and run folder.

    Raises:
        ConfigError: every problem, a line each.
    """
    try:
        iapo = IapoConfig.from_mapping(OmegaConf.to_container(config.iapo, resolve=True))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    problems = list(check_numbers(config))
    if not problems:  # the checks below compare them
        problems += [
            *_terms(config, iapo),
            *_trainer(config),
            *_data(config),
            *_overlong(config),
            *_methods(config, iapo),
        ]
        problems += [*_engine(config, iapo), *_format(config, iapo)]
        if files:
            problems += file_problems(config, iapo)
    if problems:
        raise ConfigError("\n".join(problems))
    for line in [*_layout(config, iapo), *_without_effect(config, iapo)]:
        warnings.warn(line, stacklevel=2)


def check_with_verl(config) -> None:
    """verl's own validation of a resolved configuration.

    Raises:
        ConfigError: the first thing that verl refuses.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    said = StringIO()
    try:
        with redirect_stdout(said):
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"verl: {' '.join(str(error).split()) or type(error).__name__}") from None
    for line in said.getvalue().splitlines():
        if "checks passed" not in line:  # which would say more than is true: verl looks at no file
            print(line, file=sys.stderr)  # a dry run prints nothing but the configuration


# verl finds these wrong only after Ray and vLLM have started, if at all: field, type, smallest value.
NUMBERS = (
    ("data.train_batch_size", int, 1),
    ("data.max_prompt_length", int, 1),
    ("data.max_response_length", int, 1),
    ("actor_rollout_ref.rollout.n", int, 1),
    ("actor_rollout_ref.rollout.temperature", float, 0.01),  # vLLM takes less for greedy, or raises it
    ("actor_rollout_ref.actor.optim.lr", float, 0),
    ("actor_rollout_ref.actor.ppo_mini_batch_size", int, 1),
    ("data.train_max_samples", int, -1),
    ("data.val_max_samples", int, -1),
    ("trainer.total_training_steps", int, 1),
    ("trainer.total_epochs", int, 1),
    ("trainer.test_freq", int, -1),
    ("trainer.save_freq", int, -1),
    ("trainer.nnodes", int, 1),
    ("trainer.n_gpus_per_node", int, 0),
)
LARGEST_SEED = 2**32 - 1  # that numpy's global generator takes
# What takes `seed` unless it is set by itself.
SEEDS = (
    "data.seed",
    "actor_rollout_ref.actor.data_loader_seed",
    "actor_rollout_ref.actor.fsdp_config.seed",
    "actor_rollout_ref.rollout.seed",
)

# Losses of verl that average in their own way, whatever loss_agg_mode says, by loss_mode: what they take the mean of.
OWN_MEAN = {"sapo": "each completion's tokens first", "geo_mean": "completions"}
WEIGHTS = ("outcome", "alpha", "beta", "rho", "progress")
# The terms of `IapoConfig` whose advantage differs from token to token.
PER_TOKEN = ("alpha", "beta", "progress")

# What verl's loggers import, where that has another name.
LOGGER_PACKAGES = {"vemlp_wandb": "volcengine_ml_platform"}
BUILT_IN_LOGGERS = ("console", "file")

# By option of `data`: the one value with which it says what happens. Prompts that are too long are left out or refused.
UNREAD_DATA_OPTIONS = {
    "truncation": "error",
    "return_raw_input_ids": False,
    "return_raw_chat": True,
    "return_full_prompt": False,
    "reward_fn_key": "data_source",
}


def check_numbers(config: DictConfig) -> Iterator[str]:
    """One line for each of `NUMBERS` that has another type or is too small, and for each seed that is none."""
    for field, kind, smallest in NUMBERS:
        value = OmegaConf.select(config, field)
        if value is None and field == "trainer.total_training_steps":
            continue  # trainer.total_epochs decides
        right_type = isinstance(value, int | kind) and not isinstance(value, bool)
        if not right_type or value < smallest:
            name = "a whole number" if kind is int else "a number"
            yield f"{field}: {value!r} must be {name} of at least {smallest}."
    others = {field: OmegaConf.select(config, field) for field in SEEDS}
    own = {field: value for field, value in others.items() if value not in (None, config.seed)}
    for field, value in ({"seed": config.seed} | own).items():
        if type(value) is not int or not 0 <= value <= LARGEST_SEED:
            yield f"{field}: {value!r} must be a whole number from 0 to {LARGEST_SEED}."


def _terms(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    estimator = config.algorithm.adv_estimator
    if estimator != "iapo" and not iapo.is_grpo:
        names = [name for name in WEIGHTS if getattr(iapo, name) != getattr(IapoConfig, name)]
        given = " ".join(f"iapo.{name}={getattr(iapo, name)}" for name in names)
        yield (
            f"{given}: no effect with algorithm.adv_estimator={estimator}; set algorithm.adv_estimator=iapo, or the "
            "weights to their defaults."
        )


def _trainer(config: DictConfig) -> Iterator[str]:
    from verl.utils.tracking import Tracking

    mode = config.trainer.v1.trainer_mode
    if mode != "iapo":
        yield f"trainer.v1.trainer_mode: {mode!r} must be 'iapo'; the asynchronous trainers are not supported."
    if config.trainer.device == "cpu" and config.trainer.n_gpus_per_node < 1:
        yield f"trainer.n_gpus_per_node: {config.trainer.n_gpus_per_node} must be at least 1; it counts ranks on a CPU."
    if not config.trainer.use_v1:
        yield "trainer.use_v1: false, but this recipe is a v1 trainer; leave it true."
    n = config.actor_rollout_ref.rollout.n
    if n < 2:
        yield f"actor_rollout_ref.rollout.n: {n} gives groups of one, whose advantage is 0 or raw; use at least 2."
    if config.algorithm.filter_groups.enable and config.algorithm.filter_groups.metric not in ("acc", "reward"):
        metric = config.algorithm.filter_groups.metric
        yield f"algorithm.filter_groups.metric: {metric!r} must be 'acc' (DAPO) or 'reward'."
    if config.trainer.val_only and not config.trainer.val_before_train:  # verl would train one step
        yield "trainer.val_before_train: false leaves nothing to do with trainer.val_only=true; set it to true."
    actor = config.actor_rollout_ref.actor
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and not actor.loss_scale_factor:
        yield (
            f"actor_rollout_ref.actor.loss_scale_factor: {actor.loss_scale_factor}, so loss_agg_mode="
            "seq-mean-token-sum-norm divides by the longest response of each micro-batch, and a token's weight depends "
            f"on its neighbours; set it to data.max_response_length={config.data.max_response_length}."
        )
    mini_batch, batch = config.actor_rollout_ref.actor.ppo_mini_batch_size, config.data.train_batch_size
    if mini_batch > batch:  # verl would pad the batch up to it
        yield (
            f"actor_rollout_ref.actor.ppo_mini_batch_size: {mini_batch} must not exceed data.train_batch_size={batch}."
        )
    ranks, rollouts = config.trainer.nnodes * config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout.n
    if ranks and mini_batch * rollouts % ranks:  # a worker would fail on it, after the first rollouts
        yield (
            f"actor_rollout_ref.actor.ppo_mini_batch_size: {mini_batch} prompts with rollout.n={rollouts} completions "
            f"can't be shared equally by {ranks} ranks; set it to a multiple of {ranks // math.gcd(ranks, rollouts)}."
        )
    known = Tracking.supported_backend
    chosen = config.trainer.logger
    for name in [chosen] if isinstance(chosen, str) else chosen or []:
        package = LOGGER_PACKAGES.get(name, name)
        if name not in known:
            yield f"trainer.logger: {name!r} must be one of {', '.join(known)}."
        elif name not in BUILT_IN_LOGGERS and find_spec(package) is None:
            yield f"trainer.logger: {name!r} needs the package {package}, which isn't installed; install it or drop it."
        elif name == "wandb" and not _wandb_can_log_in():
            yield (
                "trainer.logger: 'wandb' has no API key; run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline."
            )


def _wandb_can_log_in() -> bool:
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def _data(config: DictConfig) -> Iterator[str]:
    """Test splits as training data, and options that verl's v1 trainer accepts and never reads."""
    files = config.data.train_files
    for name in [files] if isinstance(files, str) else files or []:
        if Path(str(name)).parent.name in EVALUATION and not config.trainer.val_only:
            yield (
                f"data.train_files: {name} is for evaluation only; train on another data=, with data.val_files={name}, "
                "or set trainer.val_only=true."
            )
    for name, only in UNREAD_DATA_OPTIONS.items():
        if (value := OmegaConf.select(config, f"data.{name}")) != only:
            yield f"data.{name}: {value!r} has no effect in verl's v1 trainer; leave it at {only!r}."


def _overlong(config: DictConfig) -> Iterator[str]:
    overlong, length = config.reward.reward_kwargs.overlong_buffer_cfg, config.data.max_response_length
    if not overlong.enable:
        return
    if not (type(overlong.len) in (int, float) and 1 <= overlong.len <= length):
        yield (
            f"reward.reward_kwargs.overlong_buffer_cfg.len: {overlong.len} must be between 1 and "
            f"data.max_response_length={length}."
        )
    factor = overlong.penalty_factor
    if not (type(factor) in (int, float) and 0 <= factor < float("inf")):
        yield f"reward.reward_kwargs.overlong_buffer_cfg.penalty_factor: {factor} must be a number of at least 0."


def _methods(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    try:
        methods = make_methods(OmegaConf.to_container(config, resolve=True)["methods"])
    except ValueError as error:
        yield str(error)
        return
    estimator = config.algorithm.adv_estimator
    if methods and estimator != "iapo":
        yield (
            f"methods.{next(iter(methods))}: no effect with algorithm.adv_estimator={estimator}; set "
            "algorithm.adv_estimator=iapo."
        )
    rollouts, length = config.actor_rollout_ref.rollout.n, config.data.max_response_length
    for name, method in methods.items():
        yield from (f"methods.{name}.{problem}" for problem in method.problems(rollouts, length))
    yield from conflicts(methods)
    yield from _ignored_by(config, methods)
    yield from _policy_loss(config, iapo, methods)
    yield from _correction(config, iapo, methods)


def _ignored_by(config: DictConfig, methods: dict[str, Method]) -> Iterator[str]:
    """Options of verl that a method leaves without effect, or that leave it without what it is for."""
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg.enable
    for name, method in methods.items():
        hooks = acts_by(method)
        if overlong and "overlong" in method.ignores:
            reason = method.ignores["overlong"]
            yield (
                f"reward.reward_kwargs.overlong_buffer_cfg.enable: true has no effect with {name}: {reason}; set it "
                "to false."
            )
        if config.algorithm.filter_groups.enable and "filter_groups" in method.ignores:
            reason = method.ignores["filter_groups"]
            yield f"algorithm.filter_groups.enable: true does not go with {name}: {reason}; set it to false."
        if config.algorithm.use_kl_in_reward and "shape_reward" in method.ignores:
            reason = method.ignores["shape_reward"]
            yield f"algorithm.use_kl_in_reward: true has no effect with {name}: {reason}; set it to false."
        if not config.algorithm.norm_adv_by_std_in_grpo and "outcome_advantage" in hooks:
            yield (
                f"algorithm.norm_adv_by_std_in_grpo: false has no effect with {name}, which has an advantage of its "
                "own; set it to true."
            )
        mode = config.actor_rollout_ref.actor.loss_agg_mode
        if mode != "token-mean" and "loss_mask" in hooks:
            yield (
                f"actor_rollout_ref.actor.loss_agg_mode: {mode!r} counts the completions that {name} leaves out; set "
                "it to token-mean."
            )


def _policy_loss(config: DictConfig, iapo: IapoConfig, methods: dict[str, Method]) -> Iterator[str]:
    """Losses of verl that don't do what terms and methods rely on."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    mode, key = config.actor_rollout_ref.actor.policy_loss.loss_mode, "actor_rollout_ref.actor.policy_loss.loss_mode"
    known = sorted(POLICY_LOSS_REGISTRY.keys() - {"bypass_mode"})  # verl's own name for a rollout correction
    if mode not in known:
        yield f"{key}: {mode!r} must be one of {', '.join(known)}."
    hooks = {name: set(acts_by(method)) for name, method in methods.items()}
    if mode in OWN_MEAN:
        for name in (name for name in hooks if "loss_mask" in hooks[name]):
            yield (
                f"{key}: {mode!r} takes the mean over {OWN_MEAN[mode]}, which counts the completions that {name} "
                "leaves out; set it to vanilla."
            )
    if mode == "geo_mean":
        per_token = [f"iapo.{term}={weight}" for term in PER_TOKEN if (weight := getattr(iapo, term))]
        per_token += [name for name in hooks if {"outcome_advantage", "token_weight"} & hooks[name]]
        if per_token:
            yield (
                f"{key}: 'geo_mean' gives a completion one advantage, the mean of its tokens', which undoes "
                f"{' and '.join(per_token)}; set it to vanilla."
            )


def _correction(config: DictConfig, iapo: IapoConfig, methods: dict[str, Method]) -> Iterator[str]:
    """verl's correction of rollouts cuts responses, or computes no old log-probs."""
    correction = config.algorithm.rollout_correction
    if correction and correction.rollout_rs and (methods or not iapo.is_grpo):
        yield (
            f"algorithm.rollout_correction.rollout_rs: {correction.rollout_rs!r} cuts tokens out of responses, so "
            "methods and terms would see wrong lengths; set it to null."
        )
    needing = [name for name, method in methods.items() if "entropy" in method.needs]
    needing += ["iapo.score=next_token_entropy"] if iapo.needs_next_token_entropy else []
    if needing and correction and correction.bypass_mode:
        yield (
            "algorithm.rollout_correction.bypass_mode: true gives no next-token entropies for "
            f"{' and '.join(needing)}; set it to false."
        )


def _engine(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    if actor.strategy not in ("fsdp", "fsdp2"):
        yield f"actor_rollout_ref.actor.strategy: {actor.strategy!r} must be fsdp or fsdp2."
    size = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    if config.trainer.device == "cpu" and size != 1:
        yield f"actor_rollout_ref.rollout.tensor_model_parallel_size: {size!r} must be 1 with platform=cpu."
    if not iapo.probes:
        return
    off = f"or {TURN_OFF}."
    if model.use_fused_kernels:
        yield f"actor_rollout_ref.model.use_fused_kernels: true returns no logits to measure; set it to false {off}"
    if actor.ulysses_sequence_parallel_size > 1:
        size = actor.ulysses_sequence_parallel_size
        yield (
            f"actor_rollout_ref.actor.ulysses_sequence_parallel_size: {size} splits a sequence over ranks, which the "
            f"probe pass does not support; set it to 1 {off}"
        )


def _format(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    """What is probed must be what `iapo.reward` pays for: another answer format is one that training removes."""
    reward = config.reward.custom_reward_function
    if not iapo.probes or (reward.path, reward.name) != OUR_REWARD:
        return
    answer_format = FORMATS[iapo.format]
    own = "or set a reward function of your own"
    for other in FORMATS.values():
        if other is not answer_format and iapo.probe == other.probe:
            yield (
                f"iapo.format: {iapo.format!r} with the probe {iapo.probe!r} of {other.name!r}; set "
                f"format={iapo.format} without iapo.probe, or format={other.name}."
            )
            return
    opening = answer_format.opening
    if not answer_format.well_formed(text := f"{opening}{iapo.probe}0{answer_format.answer_end}"):
        yield (
            f"iapo.probe: {iapo.probe!r} asks for a format that iapo.reward does not pay for, such as {text!r}; set "
            f"{answer_format.probe!r}, {own}."
        )
    elif iapo.region == "reasoning" and not iapo.probe.lstrip().startswith(iapo.exit_marker):
        yield (
            f"iapo.exit_marker: {iapo.exit_marker!r} is not how iapo.probe={iapo.probe!r} begins, so it does not end "
            "the reasoning that iapo.reward pays for; set them to begin alike, " + own + "."
        )
    text = f"{opening}{answer_format.probe}0{iapo.answer_end}"
    if iapo.score in ("answer_logprob", "reference_answer") and not answer_format.well_formed(text):
        yield (
            f"iapo.answer_end: {iapo.answer_end!r} ends no answer that iapo.reward pays for, such as {text!r}; set "
            f"{answer_format.answer_end!r}, {own}."
        )


def _layout(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    own = iapo.probe != FORMATS[iapo.format].probe  # such as one that pins the beginning of the answer
    if iapo.probes and iapo.score == "first_token_entropy" and not is_embedded(config) and not own:
        yield (
            "iapo.score: 'first_token_entropy' on a model of natural text, where the first token after the probe is "
            "often layout, such as a blank, and says little about the answer; iapo.score=auto, "
            "which is reference_answer here, measures the right answer itself."
        )


def _without_effect(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    of_format = {name: getattr(FORMATS[iapo.format], name) for name in ("exit_marker", "probe", "answer_end")}
    default = IapoConfig(format=iapo.format, **of_format)
    actor = config.actor_rollout_ref.actor
    if (mode := actor.policy_loss.loss_mode) in OWN_MEAN and actor.loss_agg_mode != "seq-mean-token-mean":
        yield (
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode} has no effect on the policy loss {mode}, "
            f"which is a mean over {OWN_MEAN[mode]}; seq-mean-token-mean averages the KL loss alike."
        )
    if iapo.gate != "all" and iapo.alpha == 0:
        yield f"iapo.gate={iapo.gate} has no effect with iapo.alpha=0."
    if iapo.score == "next_token_entropy" and iapo.alpha == 0:
        yield "iapo.score=next_token_entropy has no effect with iapo.alpha=0."
    if iapo.share_log_prob_forward != IapoConfig.share_log_prob_forward and not iapo.needs_exit_entropy:
        yield f"iapo.share_log_prob_forward={iapo.share_log_prob_forward} has no effect: no term needs a probe pass."
    if not iapo.probes:
        of_pass = {"probe_at", "stride", "max_gap", "probe", "probe_tokens", "answer_end"}
        if not iapo.needs_next_token_entropy:
            of_pass |= {"region", "score", "exit_marker"}
        for name in sorted(of_pass):
            if getattr(iapo, name) != getattr(default, name):
                yield f"iapo.{name}={getattr(iapo, name)!r} has no effect without a probe pass."
        return
    for name, choice, value in (
        ("exit_marker", "region", "response"),
        ("stride", "probe_at", "boundaries"),
        ("stride", "probe_at", "ends"),
        ("max_gap", "probe_at", "ends"),
        ("max_gap", "probe_at", "stride"),
        ("answer_end", "score", "first_token_entropy"),
        ("answer_end", "score", "next_token_entropy"),
    ):
        if getattr(iapo, choice) == value and getattr(iapo, name) != getattr(default, name):
            yield f"iapo.{name} has no effect with iapo.{choice}={value}."
