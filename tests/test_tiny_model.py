"""The embedded tokenizer and model: token ids, verl's chat handling, and a sampled check of the weights."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import iapo
from iapo.answer_format import PROBE
from iapo.tasks import tiny_model
from iapo.tasks import verbose_arithmetic as task
from iapo.tasks.embedded import TASK_OF, TASKS

ASSETS = Path(iapo.__file__).parent / "assets"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


each_asset = pytest.mark.parametrize("asset", TASK_OF)
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def encoded(tokenizer, text):
    """A completion's ids, EOS included."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def user(text):
    return {"role": "user", "content": text}


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


@each_asset
def test_the_committed_tokenizer_is_the_one_that_the_code_builds(asset):
    tokenizer, built = AutoTokenizer.from_pretrained(ASSETS / asset), tiny_model.build_tokenizer(TASKS[TASK_OF[asset]])
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert type(tokenizer) is type(built)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@each_task
def test_every_trace_survives_encoding_and_skip_special_tokens(task):
    tokenizer, rng = tiny_model.build_tokenizer(task), random.Random(0)
    for _ in range(300):
        numbers = task.sample_problem(rng)
        text = task.trace(numbers, rng)
        ids = encoded(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.decode(ids) == text + "<|im_end|>"
        shortest = encoded(tokenizer, task.minimal_trace(numbers))
        assert len(shortest) == task.minimal_tokens(numbers)


@each_task
def test_the_pieces_of_a_trace_are_the_tokens_of_the_whole(task):
    tokenizer = tiny_model.build_tokenizer(task)
    for seed in range(200):
        problem, pieces = task.lesson(random.Random(seed), task.SCHEDULE)
        text = "".join(text for text, _ in pieces)
        assert problem == task.sample_problem(rng := random.Random(seed)) and text == task.trace(problem, rng)
        ids, labels = tiny_model.lesson_ids(tokenizer, pieces)
        assert ids == encoded(tokenizer, text) and len(labels) == len(ids)
        assert all(label in (token, tiny_model.IGNORED) for token, label in zip(ids, labels, strict=True))
        left_out = sum(label == tiny_model.IGNORED for label in labels)
        assert left_out == len([text for text, has_loss in pieces if not has_loss])  # here of one token each


def test_the_probe_is_the_three_tokens_that_the_model_writes_there(tokenizer):
    probe = tokenizer.encode(PROBE, add_special_tokens=False)
    assert probe == tokenizer.convert_tokens_to_ids(["</think>", "Ċ", "<answer>"])
    completion = tokenizer.encode(task.minimal_trace((1, 2, 3, 4)), add_special_tokens=False)
    start = completion.index(probe[0])
    assert completion[start : start + 3] == probe


def test_a_user_message_is_bos_and_its_text(tokenizer):
    expected = [1, *(tokenizer.convert_tokens_to_ids(c) for c in "1+2+3+4=")]
    for generation in (False, True):
        ids = ids_of(tokenizer, [user("1+2+3+4=")], add_generation_prompt=generation)
        assert ids == expected
    assert ids_of(tokenizer, [{"role": "system", "content": "12"}, user("1+2+3+4=")]) == expected
    assert tiny_model.prompt_ids(tokenizer, (1, 2, 3, 4)) == expected


def test_a_conversation_appends_turn_by_turn(tokenizer):
    turn = [user("1+2="), {"role": "assistant", "content": "<think>"}]
    first, second = ids_of(tokenizer, turn[:1]), ids_of(tokenizer, turn)
    newline, eos, think = tokenizer.convert_tokens_to_ids(["Ċ", "<|im_end|>", "<think>"])
    assert second == [*first, think, eos, newline]
    assert ids_of(tokenizer, [*turn, user("3+4=")]) == [*second, *ids_of(tokenizer, [user("3+4=")])]


def test_verl_builds_the_same_tokens(tokenizer):
    wiring = pytest.importorskip("verl.utils.tokenizer.continuous_token_wiring")
    builder = wiring.create_continuous_token_builder(tokenizer, hf_model_type="qwen2")
    turn = [user("1+2="), {"role": "assistant", "content": "<think>"}]
    assert builder.build_initial_tokens(turn[:1]) == ids_of(tokenizer, turn[:1])
    generated = [*ids_of(tokenizer, turn[:1]), *tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])]
    merged = builder.merge_context_tokens(turn, [*turn, user("3+4=")], generated)
    assert merged.token_ids == ids_of(tokenizer, [*turn, user("3+4=")])


@each_asset
def test_configuration_matches_the_tokenizer(asset):
    tokenizer, model = (cls.from_pretrained(ASSETS / asset) for cls in (AutoTokenizer, AutoModelForCausalLM))
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert model.config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@each_asset
def test_the_assets_are_small_and_name_no_machine(asset):
    assert sum(f.stat().st_size for f in (ASSETS / asset).iterdir()) < 4_000_000
    for file in (ASSETS / asset).glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert isinstance(json.loads(text), dict)
        assert not re.search(r'"(/|~|[A-Z]:\\)|/(home|tmp|root|work|Users)/', text), file.name


@each_asset
def test_the_committed_model_is_right_often_and_verbose(asset):
    tokenizer, model = (cls.from_pretrained(ASSETS / asset) for cls in (AutoTokenizer, AutoModelForCausalLM))
    result = tiny_model.evaluate(model, tokenizer, prompts=64, task=TASKS[TASK_OF[asset]])
    assert 0.7 <= result["accuracy"] <= 0.97
    assert result["ratio"] >= 1.2
    assert result["format"] >= 0.95
    assert result["truncated"] <= 0.02
    assert result["ratio"] == pytest.approx(result["tokens"] / result["minimum"])


def test_evaluation_counts_right_wrong_and_unended_completions(tokenizer):
    class Scripted:
        """Answers the first prompt rightly, the second wrongly, and never ends the third."""

        def eval(self):
            pass

        def generate(self, input_ids, attention_mask, max_new_tokens, **sampling):
            prompts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            right, wrong, endless = (task.minimal_trace(task.parse_prompt(p)) for p in prompts)
            wrong = re.sub(r"<answer>\d+", "<answer>0", wrong)
            rows = [encoded(tokenizer, text) for text in (right, wrong)]
            rows.append((encoded(tokenizer, endless)[:-1] * 9)[:max_new_tokens])
            self.lengths = [len(row) for row in rows]
            padded = [row + [tokenizer.pad_token_id] * (max_new_tokens - len(row)) for row in rows]
            return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    scripted = Scripted()
    result = tiny_model.evaluate(scripted, tokenizer, prompts=3)
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["format"] == pytest.approx(2 / 3)
    assert result["truncated"] == pytest.approx(1 / 3)
    assert scripted.lengths[2] == 128
    assert result["tokens"] == pytest.approx(sum(scripted.lengths) / 3)


@each_task
def test_batches_label_the_completion_only(task):
    tokenizer = tiny_model.build_tokenizer(task)
    input_ids_BL, labels_BL = tiny_model.make_batch(tokenizer, random.Random(0), 4, task)
    for input_ids, labels in zip(input_ids_BL, labels_BL, strict=True):
        prompt, text = tokenizer.decode(input_ids).replace("<|endoftext|>", "").split("<think>")
        problem = task.parse_prompt(prompt.removeprefix("<|im_start|>"))
        text = f"<think>{text}"
        assert text.endswith("</answer><|im_end|>")
        assert task.extract_answer(text.removesuffix("<|im_end|>")) == task.answer(problem)
        labelled = labels != tiny_model.IGNORED
        assert (labels[labelled] == input_ids[labelled]).all()
        first = len(tiny_model.prompt_ids(tokenizer, problem, task))
        assert not labelled[:first].any() and labelled[first]
        assert tokenizer.decode(labels[labelled]).endswith("</answer><|im_end|>")
        if task is not TASKS["checked_registers"]:
            assert tokenizer.decode(labels[labelled]) == text


def test_batches_are_of_their_step(monkeypatch):
    """Of checked registers: small problems at first."""
    task = TASKS["checked_registers"]
    tokenizer = tiny_model.build_tokenizer(task)
    first, later = (tiny_model.make_batch(tokenizer, random.Random(0), 4, task, step) for step in (0, task.SCHEDULE))
    assert first[0].shape[1] < later[0].shape[1]
    steps = []

    def batch(*inputs):
        steps.append(inputs[-1])
        return make_batch(*inputs)

    make_batch = tiny_model.make_batch
    monkeypatch.setattr(tiny_model, "make_batch", batch)
    monkeypatch.setattr(tiny_model, "BATCH", 1)
    tiny_model.train(tiny_model.build_model(tokenizer), tokenizer, task, steps=3, seed=0)
    assert steps == [0, 1, 2]


def test_learning_rate_by_hand():
    assert tiny_model.learning_rate(0, 1500) == pytest.approx(2e-5)  # 1/100 of the peak
    assert tiny_model.learning_rate(750, 1500) == pytest.approx(1e-3)  # half way down the cosine
    assert tiny_model.learning_rate(1000, 1500) == pytest.approx(5e-4)  # 2/3 of the way: (1 + cos 120 degrees) / 2
    assert tiny_model.learning_rate(1500, 1500) == pytest.approx(0.0)


@pytest.mark.parametrize("task", [[], ["--task", "worked_sums"], ["--task", "checked_registers"]])
def test_the_command_writes_a_loadable_directory_and_repeats_itself(tmp_path, capsys, task):
    for run in ("a", "b"):
        arguments = ["--out", str(tmp_path / run), "--steps", "3", "--seed", "5", "--eval-prompts", "4", *task]
        tiny_model.main(arguments)
    out = capsys.readouterr().out
    assert "step 3/3" in out and "accuracy" in out and "ratio" in out
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / run) for run in ("a", "b"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == first.config.vocab_size


@pytest.mark.parametrize(
    ("task", "steps", "most"),
    [
        ("verbose_arithmetic", "0", 1500),
        ("verbose_arithmetic", "1501", 1500),
        ("worked_sums", "3001", 3000),
        ("checked_registers", "3601", 3600),
    ],
)
def test_the_command_refuses_steps_outside_the_schedule(tmp_path, capsys, task, steps, most):
    with pytest.raises(SystemExit):
        tiny_model.main(["--out", str(tmp_path), "--task", task, "--steps", steps])
    assert f"--steps: {steps} must be from 1 to {most}" in capsys.readouterr().err
