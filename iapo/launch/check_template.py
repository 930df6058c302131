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
            "tomorrow has other prompts; fix it, such as by data.apply_chat_template_kwargs.date_string='26 Jul 2024'."
        )
    yield from _format(config, generation_prompt(text, render(messages, add_generation_prompt=False)), text)


def generation_prompt(text: str, without: str) -> str:
    """What the template writes after the last message, where the completion begins."""
    same = next((i for i, pair in enumerate(zip(text, without, strict=False)) if len(set(pair)) > 1), len(without))
    return text[same:]


def _format(config: DictConfig, begins: str, text: str) -> Iterator[str]:
    """What the template writes where the completion begins must be what the format leaves to it."""
    name, path = config.iapo.format, config.actor_rollout_ref.model.path
    thinks = THINK in FORMATS[name].markers
    if EXIT_MARKER in begins:
        if thinks:
            yield (
                f"iapo.format: {name!r} asks the model to reason, but the chat template of {path} ends the reasoning "
                f"before the model begins ({begins!r}); set data.apply_chat_template_kwargs.enable_thinking=true, or "
                "format=boxed_no_think."
            )
    elif THINK in begins and name != "boxed":
        what = f"asks the model for {THINK}" if thinks else f"has no {THINK}"
        yield (
            f"iapo.format: {name!r} {what}, but the chat template of {path} writes it ({begins!r}); set format=boxed, "
            "or actor_rollout_ref.model.custom_chat_template."
        )
    others = {other.instruction: other.name for other in reversed(FORMATS.values())}
    for instruction, other in others.items():
        if instruction != FORMATS[name].instruction and instruction in text:
            yield (
                f"iapo.format: {name!r}, but the prompts ask for {other!r} ({instruction!r}); set format={other}, or "
                f"make the data with iapo data NAME --format {name}."
            )
