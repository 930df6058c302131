"""What the chat templates of the models that people train write, and how it fits the answer formats.

The templates in tests/templates are ours, in the structure of the real ones.
"""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import iapo
from iapo.answer_format import FORMATS
from iapo.launch.check_template import chat_template, template_problems

TEMPLATES = Path(__file__).parent / "templates"
QUESTION = [{"role": "user", "content": "What is 2+2?"}]


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
