"""What the model's chat template makes of the prompts, compared with the answer format, before Ray starts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

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


def broken_template(config: DictConfig, render: Callable[..., str]) -> str | None:
    """One line about a template that fails on the simplest prompt, whatever the data are; None if it works."""
    model, key = config.actor_rollout_ref.model, "actor_rollout_ref.model.custom_chat_template"
    if (reason := failure(render)) is None:
        return None
    if model.custom_chat_template:
        return f"{key}: {model.custom_chat_template!r} fails on any prompt ({reason}); correct it."
    return (
        f"actor_rollout_ref.model.path: the chat template of {model.path} fails on any prompt ({reason}); correct "
        f"{template_file(model.path)}, or set {key}."
    )


def failure(render: Callable[..., str]) -> str | None:
    """What a template raises on the simplest prompt."""
    try:
        render([{"role": "user", "content": "1+1="}])
        return None
    except Exception as error:  # whatever the template raises
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def template_file(model: str | Path) -> str:
    """The file that holds a model's template; for a model of the hub, in words."""
    files = (Path(model) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return next((str(file) for file in files if file.is_file()), f"that of {model}")


def template_problems(
    config: DictConfig, field: str, render: Callable[..., str], rendered: Sequence[tuple[list, str]]
) -> Iterator[str]:
    """A template that doesn't fit the format, that depends on the date, or that leaves out a part of a prompt.

    Args:
        field: of `data`, where the prompts come from.
        render: from `chat_template`.
        rendered: (chat messages, text), at least one.
    """
    path = config.actor_rollout_ref.model.path
    for messages, text in rendered:
        if any(content not in text for content in contents(messages)):
            start = (contents(messages) or [""])[0][:60]
            yield (
                f"data.{field}: the chat template of {path} leaves out a part of a prompt, such as an earlier turn; it "
                f"begins {start!r}; change the row, or set actor_rollout_ref.model.custom_chat_template."
            )
            break
    messages, text = rendered[0]
    try:
        undated = render(messages, strftime_now=lambda _: "a day")
    except Exception as error:  # whatever a template does with a date
        undated = f"{type(error).__name__}"
    if undated != text:
        yield (
            f"actor_rollout_ref.model.path: the chat template of {path} writes today's date, so a run that resumes "
            "tomorrow has other prompts; fix it, such as by data.apply_chat_template_kwargs.date_string='26 Jul 2024'."
        )
    last = (contents(messages) or [""])[-1]
    yield from _format(config, text.rpartition(last)[2] if last else text, text)


def contents(messages: list) -> list[str]:
    """The texts of chat messages, without white space around them, which templates drop."""
    return [message["content"].strip() for message in messages if isinstance(message["content"], str)]


def _format(config: DictConfig, begins: str, text: str) -> Iterator[str]:
    """What the template writes after the last message must be what the format leaves to it."""
    name, path = config.iapo.format, config.actor_rollout_ref.model.path
    thinks = FORMATS[name].opening != ""
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
            f"iapo.format: {name!r} {what}, but the chat template of {path} writes it ({begins!r}); set format=boxed "
            "and make the data with iapo data NAME --format boxed, or set actor_rollout_ref.model.custom_chat_template."
        )
    others = {other.instruction: other.name for other in reversed(FORMATS.values())}
    for instruction, other in others.items():
        if instruction != FORMATS[name].instruction and instruction in text:
            yield (
                f"iapo.format: {name!r}, but the prompts ask for {other!r} ({instruction!r}); set format={other}, or "
                f"make the data with iapo data NAME --format {name}."
            )
