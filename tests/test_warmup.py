"""A warm start: what the model is taught, and that verl's trainer, on the CPU, takes exactly that gradient."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from iapo.answer_format import format_ok
from iapo.data import INSTRUCTION
from iapo.data.originals import ORIGINALS
from iapo.data.split import Example
from iapo.launch.warmup import conversations, fitting, gsm8k, main, svamp
from tests.conftest import make_model

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {"question": "Two hens?", "answer": "One hen lays 6.\nSo 2*6 = <<2*6=12>>12 eggs.\n#### 12"},
    {"question": "How much?", "answer": "It costs $<<500*2=1000>>1000 and $80.\n#### 1,080"},
    {"question": "Half?", "answer": "3/2 = 1.5\n#### 1.5"},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("byte") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<user>", "<assistant>", "<end>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": 2, "pad_token_id": 2}  # the embedding of the padding token has no gradient
    weights = make_model("llama", vocab_size=len(vocabulary), max_position_embeddings=1024, **ends)
    weights.save_pretrained(folder)
    return folder


def test_a_solution_loses_its_calculator_and_its_answer():
    assert gsm8k(ROWS[0], "12") == "One hen lays 6.\nSo 2*6 = 12 eggs."
    assert gsm8k(ROWS[1], "1080") == "It costs $1000 and $80."


@pytest.mark.parametrize(
    "equation,answer,reasoning",
    [
        ("( 290.0 / 2.0 )", "145", "290 / 2 = 145"),
        ("( 7.0 - ( 3.0 + 2.0 ) )", "2", "7 - (3 + 2) = 2"),
        ("( ( 8.0 + 4.0 ) / 3.5 )", "3.43", "(8 + 4) / 3.5 = 3.43"),
        ("( 0.05 * 10.0 )", "0.5", "0.05 * 10 = 0.5"),
    ],
)
def test_an_equation_becomes_plain_reasoning(equation, answer, reasoning):
    assert svamp({"Equation": equation}, answer) == reasoning


def test_only_the_train_split_of_a_whole_file_is_taught(tmp_path):
    rows = [
        {
            "ID": f"chal-{i}",
            "Body": f"{i} hens.",
            "Question": "Eggs?",
            "Equation": f"( {i}.0 * 2.0 )",
            "Answer": 2.0 * i,
        }
        for i in range(1, 41)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    taught = list(conversations("svamp", str(tmp_path / "all.jsonl")))
    examples = [Example("", "", i - 1, f"chal-{i}") for i in range(1, 41)]
    train, test = ORIGINALS["svamp"].divide(examples, 0)
    assert 20 < len(train) < 40 and len(test) + len(train) == 40
    first = train[0].index + 1
    assert taught[0] == [
        {"role": "user", "content": f"{first} hens. Eggs?\n\n{INSTRUCTION}"},
        {"role": "assistant", "content": f"<think>{first} * 2 = {2 * first}</think>\n<answer>{2 * first}</answer>"},
    ]
    assert [chat[0]["content"].split()[0] for chat in taught] == [str(example.index + 1) for example in train]


def test_the_model_is_taught_the_format_after_the_prompt_of_iapo_data(source):
    chats = list(conversations("gsm8k", str(source)))
    assert chats[1] == [
        {"role": "user", "content": f"How much?\n\n{INSTRUCTION}"},
        {"role": "assistant", "content": "<think>It costs $1000 and $80.</think>\n<answer>1080</answer>"},
    ]
    assert len(chats) == 3 and all(format_ok(chat[1]["content"]) for chat in chats)


def test_only_the_model_is_required(capsys):
    for arguments in ([], ["--data", "svamp"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err == (
            "iapo.warmup: the following arguments are required: MODEL_DIR; see iapo warmup --help.\n"
        )


def test_only_answers_that_fit_are_taught(source, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = list(conversations("gsm8k", str(source)))
    sizes = [len(chat[1]["content"]) + 1 for chat in chats]  # a token per byte, and the end
    for limit in sorted(sizes):
        taught = list(fitting(iter(chats), tokenizer, limit))
        assert [chat for chat, _ in taught] == [chat for chat, size in zip(chats, sizes, strict=True) if size <= limit]
    (_, whole), *_ = taught
    assert whole == 1 + len(chats[0][0]["content"]) + 1 + 1 + sizes[0]


def warm_up(*arguments, **environment):
    """The command in a process of its own, as it sets the process's environment and its process group."""
    command = [sys.executable, "-m", "iapo", "warmup", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.e2e
def test_a_step_is_one_on_the_mean_surprisal_of_the_answers_tokens(source, model, tmp_path):
    """theta' = theta - lr * grad mean_{answer tokens of the batch} -log p, by transformers alone."""
    lr, out = 0.5, tmp_path / "a/warm"
    sgd = ["optim.optimizer=SGD", f"optim.lr={lr}", "optim.weight_decay=0", "optim.clip_grad=1000"]
    once = ["optim.lr_warmup_steps=0", "optim.lr_scheduler_type=constant", "data.train_batch_size=3"]
    result = warm_up(model, "--data", "gsm8k", "--source", source, "--out", out, "--max-tokens", 200, *sgd, *once)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("iapo warmup: 1 steps in ")

    tokenizer, before = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total, count = 0, 0
    for chat in conversations("gsm8k", str(source)):
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        ids = torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])
        logp = before(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total - logp.sum(), count + len(logp)
    (total / count).backward()
    after = AutoModelForCausalLM.from_pretrained(out)
    moved = 0.0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(new, old - lr * old.grad, atol=2e-5, rtol=1e-4, msg=name)
        moved = max(moved, (new - old).abs().max().item())
    assert moved > 1e-2 and after.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert [path.name for path in out.parent.iterdir()] == ["warm"]
    assert "attn_implementation" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["none"], "MODEL_DIR: none is no folder; make it with iapo model, or give another."),
        (["{model}", "--out", "{source}"], "--out: {source} exists; choose another, or remove it."),
        (
            ["{model}", "--source", "/no/such"],
            "source: '/no/such' does not exist; give a file, a directory or a hub id.",
        ),
        (["{model}"], "--examples: 3 of at most 96 tokens are fewer than data.train_batch_size=8; raise --max-tokens"),
        (["{model}", "--data", "math"], "--data: 'math' must be one of gsm8k, svamp."),
        (["{model}", "--max-tokens", "9"], "--examples: 0 of at most 9 tokens are fewer than data.train_batch_size=8;"),
        (["{model}", "optim.lrr=1"], "optim.lrr: unknown key; did you mean optim.lr?"),
        (["{mute}"], "MODEL_DIR: {mute} has a tokenizer without a chat template; add chat_template.jinja."),
        (
            ["{raising}"],
            "MODEL_DIR: the chat template of {raising} fails on any prompt (UndefinedError: list object has no element "
            "9); correct {raising}/chat_template.jinja.",
        ),
        (["{torn}"], "MODEL_DIR: the tokenizer of {torn} can't be loaded (JSONDecodeError: "),
        (["{endless}"], "MODEL_DIR: {endless} has a tokenizer without eos_token; add it to its configuration."),
        (["{empty}"], "MODEL_DIR: {empty} holds no weights (*.safetensors or *.bin); put them there."),
        (["{cut}"], "MODEL_DIR: {cut}/model.safetensors is cut short; get it again."),
        (["{strip}"], "MODEL_DIR: its chat template writes other text than the answer after the prompt, so the model"),
    ],
)
def test_what_cannot_be_taught_gets_one_line_and_leaves_nothing(
    source, model, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    names = {"source": source, "model": model} | {
        name: Path(name) for name in ("mute", "strip", "raising", "torn", "endless", "empty", "cut")
    }
    shutil.copytree(model, "torn")
    Path("torn/tokenizer.json").write_text("{")
    shutil.copytree(model, "cut")
    Path("cut/model.safetensors").write_text("x")
    shutil.copytree(model, "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    templates = {
        "mute": None,
        "raising": "{{ messages[9].content }}",
        "strip": TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"),
    }
    for name, template in templates.items():
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(name)
    tokenizer.eos_token = None
    tokenizer.save_pretrained("endless")
    given = [argument.format(**names) for argument in arguments]
    options = [] if "--source" in given else ["--source", str(source)]
    options += [] if "--data" in given else ["--data", "gsm8k"]
    options += [] if "--out" in given else ["--out", "out/warm"]
    before = dict(os.environ)
    try:
        assert main([*given, *options]) == 2
    finally:
        os.environ.clear()
        os.environ.update(before)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iapo")]
    assert line.startswith("iapo.warmup: " + message.format(**names))
    assert not list(Path("out").glob("*")) and not list(Path("out").glob(".*"))
