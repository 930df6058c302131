"""The prompts that a run reads, as the model will see them: how long they are, and for how many steps they last."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig

from iapo.answer_format import FORMATS
from iapo.launch.check_template import broken_template, chat_template, template_problems


class Prompts(NamedTuple):
    """Of a data set, as the chat template renders them.

    Attributes:
        rendered: the chat messages and the text of every prompt that the template takes.
        tokens: how many tokens each of these texts has.
        refused: how many prompts it doesn't take; verl leaves them out.
        reason: its error on the first prompt that it doesn't take.
    """

    rendered: list[tuple[list, str]]
    tokens: list[int]
    refused: int = 0
    reason: str = ""


OUR_DATASET = "pkg://iapo.verl_adapter.dataset"
OUR_REWARD = ("pkg://iapo.reward", "compute_score")  # module and name


def is_embedded(config: DictConfig) -> bool:
    """Whether the model is one that comes with this package: its answers begin with the answer itself."""
    return Path(str(config.actor_rollout_ref.model.path)).parent == Path(__file__).parent.parent / "assets"


def prompt_problems(config: DictConfig) -> Iterator[str]:
    """Prompts that don't fit, that are too few, or that don't last for the steps that are asked for.

    Warns of prompts that verl leaves out without a word, and of those that don't ask for the answer format.
    """
    data = config.data
    if data.custom_cls.path != OUR_DATASET:  # it may read anything
        return
    tokenizer, render = chat_template(config)
    if line := broken_template(config, render):
        yield line
        return
    said: set[str] = set()
    texts: dict[str, list[str]] = {}
    for field, needed in (("train_files", data.train_batch_size), ("val_files", 1)):
        if field == "train_files" and config.trainer.val_only:
            continue
        found = read_prompts(tokenizer, render, chosen_messages(config, field))
        fitting = sum(tokens <= data.max_prompt_length for tokens in found.tokens)
        problems = list(_lengths(config, field, found, fitting, needed))
        texts[f"data.{field}"] = [text for _, text in found.rendered]
        if fitting:
            problems += template_problems(config, field, render, found.rendered)
        yield from (line for line in problems if line not in said)
        said |= set(problems)
        if field == "train_files" and not problems:
            yield from _steps(config, fitting)
    if not said:
        warn_if_not_asked(config, texts)


def warn_if_not_asked(config: DictConfig, texts: Mapping[str, list[str]]) -> None:
    """Warn in one line of prompts that don't name what begins an answer of the format that our reward pays for.

    The embedded models write their format unasked.

    Args:
        texts: of the prompts, by field.
    """
    reward, answer_format = config.reward.custom_reward_function, FORMATS[config.iapo.format]
    if (reward.path, reward.name) != OUR_REWARD or is_embedded(config):
        return
    silent = {field: sum(answer_format.answer_begin not in text for text in texts[field]) for field in texts}
    counts = [f"{field}: {count} of the {len(texts[field])} prompts" for field, count in silent.items() if count]
    if counts:
        warnings.warn(
            f"{', '.join(counts)} don't ask for the answer format {answer_format.name!r} (no "
            f"{answer_format.answer_begin!r}), which the reward pays for; unless the model writes it unasked, make the "
            f"data with iapo data NAME --format {answer_format.name}, your own by --question and --answer.",
            stacklevel=2,
        )


def _lengths(config: DictConfig, field: str, found: Prompts, fitting: int, needed: int) -> Iterator[str]:
    data, files = config.data, config.data[field]
    limit, total = data.max_prompt_length, len(found.tokens) + found.refused
    reason = f", and the chat template refuses {found.refused} ({found.reason})" if found.refused else ""
    if total < needed:
        yield (
            f"data.{field}: {files} has {total} rows, {needed} are needed; give more, or lower data.train_batch_size."
        )
    elif found.refused == total:
        path = config.actor_rollout_ref.model.path
        yield (
            f"data.{field}: the chat template of {path} refuses all of the {total} prompts ({found.reason}); change "
            "them, or set actor_rollout_ref.model.custom_chat_template."
        )
    elif fitting < total and not data.filter_overlong_prompts:
        yield (
            f"data.filter_overlong_prompts: false, but {limit} tokens hold only {fitting} of the {total} prompts of "
            f"{files}{reason}, and verl would cut the others on the left; set it to true to leave them out, or raise "
            "data.max_prompt_length."
        )
    elif fitting < needed:
        yield (
            f"data.max_prompt_length: {limit} tokens hold only {fitting} of the {total} prompts of {files}{reason}, "
            f"{needed} are needed; raise it."
        )
    elif fitting < total:
        warnings.warn(
            f"data.{field}: {total - fitting} of the {total} prompts are left out: {len(found.tokens) - fitting} have "
            f"more than data.max_prompt_length={limit} tokens{reason}.",
            stacklevel=2,
        )


def _steps(config: DictConfig, prompts: int) -> Iterator[str]:
    """verl ends without its last checkpoint and validation when the epochs are over before the steps."""
    wanted, epochs = config.trainer.total_training_steps, config.trainer.total_epochs
    per_epoch = prompts // config.data.train_batch_size
    if wanted is not None and wanted > per_epoch * epochs:
        yield (
            f"trainer.total_training_steps: {wanted}, but {prompts} prompts give {per_epoch * epochs} steps of "
            f"{config.data.train_batch_size} in trainer.total_epochs={epochs}; set trainer.total_epochs to at least "
            f"{-(-wanted // per_epoch)}, or trainer.total_training_steps={per_epoch * epochs}."
        )


def chosen_messages(config: DictConfig, field: str) -> list:
    """The chat messages of the rows that verl reads: all, or those it chooses for data.{train,val}_max_samples."""
    import pyarrow.parquet

    data = config.data
    names = [data[field]] if isinstance(data[field], str) else data[field]
    tables = [pyarrow.parquet.read_table(name, columns=[data.prompt_key]) for name in names]
    rows = [message for table in tables for message in table[data.prompt_key].to_pylist()]
    most = data[field.replace("files", "max_samples")]
    if not 0 < most < len(rows):
        return rows
    if not data.shuffle:
        return rows[:most]
    return [rows[i] for i in np.random.default_rng(data.seed).choice(len(rows), size=most, replace=False)]


def read_prompts(tokenizer, render: Callable[..., str], prompts: Sequence[list]) -> Prompts:
    """Render prompts as the rollouts do, and count their tokens."""
    rendered, refused, reason = [], 0, ""
    for messages in prompts:
        try:
            rendered.append((messages, render(messages)))
        except Exception as error:  # whatever the template raises; verl takes the next prompt
            refused, reason = refused + 1, reason or " ".join(str(error).split())
    texts = [text for _, text in rendered]
    tokens = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    return Prompts(rendered, tokens, refused, reason)
