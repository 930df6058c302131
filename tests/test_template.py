"""What the chat templates of the models that people train write, how it fits the answer formats, and how they end.

The templates in tests/templates are ours, in the structure of the real ones.
"""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import iapo
from iapo.answer_format import FORMATS
from iapo.launch.check_files import other_end
from iapo.launch.check_template import chat_template, template_problems
from iapo.launch.compose import recipe_names, recipes_dir
from iapo.probe.text import end_tokens
from iapo.tasks.embedded import TASK_OF

TEMPLATES = Path(__file__).parent / "templates"
QUESTION = [{"role": "user", "content": "What is 2+2?"}]

SMOLLM2 = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
DEEPSEEK = {"<｜end▁of▁sentence｜>": 151643, "<｜User｜>": 151644, "<｜Assistant｜>": 151645}
# Of the models that the recipes name, as published: which of our templates has the structure of theirs, their special
# tokens, the tokenizer's eos_token, the generation configuration's eos_token_id. Last: a token that ends nothing.
R1 = ("opens_think", DEEPSEEK, "<｜end▁of▁sentence｜>", 151643, "<｜Assistant｜>")
QWEN3 = ("may_think", QWEN, "<|im_end|>", [151645, 151643], "<|im_start|>")
INSTRUCT = ("plain", QWEN, "<|im_end|>", [151645, 151643], "<|im_start|>")
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": R1,
    "deepseek-r1-distill-qwen-7b": R1,
    "qwen2.5-0.5b-instruct": INSTRUCT,
    "qwen2.5-1.5b-instruct": INSTRUCT,
    "qwen2.5-7b-instruct": INSTRUCT,
    "qwen2.5-math-1.5b": ("plain", QWEN, "<|endoftext|>", 151643, "<|im_end|>"),  # a base model
    "qwen3-0.6b": QWEN3,
    "qwen3-1.7b": QWEN3,
    "qwen3-4b": QWEN3,
    "smollm2-135m-instruct": ("plain", SMOLLM2, "<|im_end|>", 2, "<|endoftext|>"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each template, with the embedded model's tokenizer."""
    folders = {}
    for template in TEMPLATES.glob("*.jinja"):
        folder = folders[template.stem] = tmp_path_factory.mktemp(template.stem)
        for path in (Path(iapo.__file__).parent / "assets/tiny").glob("*.json"):
            shutil.copy(path, folder)
        shutil.copy(template, folder / "chat_template.jinja")
    return folders


def problems(folder, name, messages=QUESTION, **options):
    config = OmegaConf.create(
        {
            "iapo": {"format": name},
            "data": {"apply_chat_template_kwargs": options},
            "actor_rollout_ref": {
                "model": {"path": str(folder), "trust_remote_code": False, "custom_chat_template": None}
            },
        }
    )
    _, render = chat_template(config)
    return list(template_problems(config, "train_files", render, [(messages, render(messages))]))


@pytest.mark.parametrize(
    "template,options,fits",
    [
        ("plain", {}, ["tags", "boxed", "boxed_no_think"]),
        ("may_think", {}, ["tags", "boxed", "boxed_no_think"]),
        ("may_think", {"enable_thinking": True}, ["tags", "boxed", "boxed_no_think"]),
        ("may_think", {"enable_thinking": False}, ["boxed_no_think"]),
        ("opens_think", {}, ["boxed"]),
    ],
)
def test_which_formats_fit_a_template(models, template, options, fits):
    found = {name: problems(models[template], name, **options) for name in FORMATS}
    assert [name for name, lines in found.items() if not lines] == fits
    assert all(len(lines) == 1 for name, lines in found.items() if name not in fits)


def test_a_mismatch_is_refused_with_its_fix(models):
    (line,) = problems(models["opens_think"], "tags")
    assert line.startswith("iapo.format: 'tags' asks the model for <think>, but the chat template of /")
    assert line.endswith(
        r"writes it ('<|im_end|>\n<|im_start|>assistant\n<think>\n'); set format=boxed and make the data with "
        "iapo data NAME --format boxed, or set actor_rollout_ref.model.custom_chat_template."
    )
    (line,) = problems(models["opens_think"], "boxed_no_think")
    assert "iapo.format: 'boxed_no_think' has no <think>, but the chat template of /" in line
    assert "; set format=boxed and make" in line
    (line,) = problems(models["may_think"], "boxed", enable_thinking=False)
    assert "ends the reasoning before the model begins" in line
    assert line.endswith("; set data.apply_chat_template_kwargs.enable_thinking=true, or format=boxed_no_think.")


@pytest.mark.parametrize("asked,given", [("tags", "boxed"), ("boxed", "tags")])
def test_prompts_that_ask_for_another_format_are_refused(models, asked, given):
    messages = [{"role": "user", "content": f"What is 2+2?\n\n{FORMATS[asked].instruction}"}]
    (line,) = problems(models["plain"], given, messages)
    assert line.startswith(f"iapo.format: {given!r}, but the prompts ask for {asked!r} (")
    assert line.endswith(f"); set format={asked}, or make the data with iapo data NAME --format {given}.")
    assert problems(models["plain"], asked, messages) == []


def test_a_template_that_writes_the_date_is_refused(models):
    (line,) = problems(models["dated"], "boxed")
    assert "writes today's date, so a run that resumes tomorrow has other prompts" in line
    assert problems(models["dated"], "boxed", date_string="26 Jul 2024") == []


def test_a_template_that_leaves_out_an_earlier_turn_is_refused(models):
    turns = [*QUESTION, {"role": "assistant", "content": "<think>2+2</think> 4"}, {"role": "user", "content": "Why?"}]
    (line,) = problems(models["opens_think"], "boxed", turns)
    assert line.startswith("data.train_files: the chat template of /")
    assert "leaves out a part of a prompt, such as an earlier turn; it begins 'What is 2+2?'; change the row" in line
    assert problems(models["plain"], "boxed", turns) == []


def test_a_template_that_opens_the_reasoning_whatever_it_is_asked(models, tmp_path):
    """And one that can't do without the opening, which is not asked to."""
    shutil.copytree(models["plain"], tmp_path / "m")
    always = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_start|>assistant\n<think>\n"
    for template in (always, "{% if not add_generation_prompt %}{{ raise_exception('x') }}{% endif %}" + always):
        (tmp_path / "m/chat_template.jinja").write_text(template)
        (line,) = problems(tmp_path / "m", "tags")
        assert "'tags' asks the model for <think>, but the chat template of" in line
        assert problems(tmp_path / "m", "boxed") == []


def published(folder, template, special, eos_token, ends):
    """A folder with the end tokens of a published model, and its tokenizer, whose vocabulary is its special tokens."""
    words = special | {"unknown": max(special.values()) + 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="unknown")),
        eos_token=eos_token,
        additional_special_tokens=list(special),
    )
    tokenizer.save_pretrained(folder)
    shutil.copy(TEMPLATES / f"{template}.jinja", folder / "chat_template.jinja")
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_model_that_a_recipe_names_is_below():
    assert sorted(PUBLISHED) == [name for name in recipe_names("model") if name not in (*TASK_OF, "path")]


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_template_and_the_end_tokens_of_a_recipes_model_are_accepted(model, tmp_path):
    template, special, eos_token, ends, _ = PUBLISHED[model]
    tokenizer = published(tmp_path, template, special, eos_token, ends)
    assert tokenizer.eos_token_id == special[eos_token]
    assert other_end(str(tmp_path), tokenizer, model_config=None) is None
    expected = set(ends) if isinstance(ends, list) else {ends}
    assert end_tokens(tokenizer, GenerationConfig.from_pretrained(tmp_path)) == expected
    recipe = OmegaConf.load(recipes_dir() / "model" / f"{model}.yaml")
    (name,) = [entry["override /format"] for entry in recipe.get("defaults", [])] or ["tags"]
    options = OmegaConf.select(recipe, "data.apply_chat_template_kwargs") or {}
    assert problems(tmp_path, name, **options) == []


@pytest.mark.parametrize("model", PUBLISHED)
def test_an_end_token_that_does_not_end_a_recipes_model_is_refused(model, tmp_path):
    template, special, _, ends, wrong = PUBLISHED[model]
    tokenizer = published(tmp_path, template, special, wrong, ends)
    listed = sorted(ends if isinstance(ends, list) else [ends])
    assert other_end(str(tmp_path), tokenizer, model_config=None) == (
        f"actor_rollout_ref.model.path: {tmp_path} has eos_token {wrong!r} ({special[wrong]}), but its "
        f"generation_config.json ends at eos_token_id {listed}; correct the one that is wrong."
    )
