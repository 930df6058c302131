"""What the model's chat template makes of the prompts, compared with the answer format, before Ray starts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from omegaconf import DictConfig, OmegaConf

from iapo.answer_format import EXIT_MARKER, FORMATS, THINK


def chat_template(config: DictConfig) -> tuple[object, Callable[..., str]]:
    """The model's tokenizer, and a function from chat messages to the text of a prompt, as the rollouts make it."""
    from transformers import AutoTokenizer

    model = config.actor_rollout_ref.model
    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    options = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create())
    options |= {"chat_template": model.custom_chat_template, "tokenize": False, "add_generation_prompt": True}
    return tokenizer, partial(tokenizer.apply_chat_template, **options)


def template_problems(
    config: DictConfig, field: str, render: Callable[..., str], rendered: Sequence[tuple[int, list, str]]
) -> Iterator[str]:
    """A template that doesn't fit the format, that depends on the date, or that leaves out a part of a prompt.

    Args:
        field: of `data`, where the prompts come from.
        render: from `chat_template`.
        rendered: (number of the row, chat messages, text), at least one.
    """
    path = config.actor_rollout_ref.model.path
    for number, messages, text in rendered:
        contents = [message["content"] for message in messages if isinstance(message["content"], str)]
        if any(content.strip() not in text for content in contents):
            yield (
                f"data.{field}: the chat template of {path} leaves out a part of row {number}, such as an earlier "
                "turn; change the row, or set actor_rollout_ref.model.custom_chat_template."
            )
            break
    _, messages, text = rendered[0]
    if render(messages, strftime_now=lambda _: "a day") != text:
        yield (
            f"actor_rollout_ref.model.path: the chat template of {path} writes today's date, so a run that resumes "
            "tomorrow has other prompts; fix it, such as by +data.apply_chat_template_kwargs.date_string='26 Jul 2024'."
        )
    yield from _format(config, generation_prompt(text, render(messages, add_generation_prompt=False)), text)


def generation_prompt(text: str, without: str) -> str:
    """What the template writes after the last message, where the completion begins."""
    same = next((i for i, pair in enumerate(zip(text, without, strict=False)) if len(set(pair)) > 1), len(without))
    return text[same:]


def _format(config: DictConfig, begins: str, text: str) -> Iterator[str]:
    """What the template writes where the completion begins must be what the format leaves to it."""
    name, path = config.iapo.format, config.actor_rollout_ref.model.path
    if EXIT_MARKER in begins:
        yield (
            f"actor_rollout_ref.model.path: the chat template of {path} ends the reasoning before the model begins "
            f"({begins!r}); let it think, such as by +data.apply_chat_template_kwargs.enable_thinking=true."
        )
    elif THINK in begins and name == "tags":
        yield (
            f"iapo.format: 'tags' asks the model for {THINK}, but the chat template of {path} writes it ({begins!r}); "
            "set format=boxed, or actor_rollout_ref.model.custom_chat_template."
        )
    for other in FORMATS.values():
        if other.name != name and other.instruction in text:
            yield (
                f"iapo.format: {name!r}, but the prompts ask for {other.name!r} ({other.instruction!r}); set "
                f"format={other.name}, or make the data with iapo data NAME --format {name}."
            )
