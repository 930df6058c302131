"""SmolLM2-135M and GSM8K: exact, trained, resumed, exported, loaded again. By hand: pytest -m real tests/test_real.py

Needs the model in IAPO_DATA_DIR (iapo model smollm2-135m), GSM8K in IAPO_REAL_DATA/gsm8k, 14 GB and ten minutes.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iapo.data import prepare
from iapo.information import Joins, exit_entropies, exit_entropies_naive
from iapo.probe.joins import measured
from iapo.probe.packing import Completion, probe_positions
from iapo.probe.text import answer_ids, decode
from tests.runs import finished, runs

pytestmark = [pytest.mark.real, pytest.mark.e2e, pytest.mark.timeout(2400)]

SMOLLM2 = Path(os.environ.get("IAPO_DATA_DIR", "data")).absolute() / "models" / "smollm2-135m-instruct"
GSM8K = Path(os.environ.get("IAPO_REAL_DATA", "")) / "gsm8k"


@pytest.fixture(scope="module", autouse=True)
def _needed():
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is absent; make it with iapo model smollm2-135m")
    if "IAPO_REAL_DATA" not in os.environ:
        pytest.skip("IAPO_REAL_DATA names no folder of real data sets")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.mark.parametrize("answer", [None, "\\frac{1}{2}</answer>", "72</answer>"])
@pytest.mark.parametrize("natural", [False, True])
def test_the_pass_equals_plain_forwards(tokenizer, answer, natural):
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    probe = "</think>\n<answer>"
    answer_A = None if answer is None else answer_ids(tokenizer, answer)
    completions = []
    for text in ("In May she sold 48 / 2 = 24 clips.\nTogether: 72.", "48 + 24 is $72. So there are 72 clips"):
        ids = torch.tensor(encode(f"<think>{text}"))
        prompt = torch.tensor(encode("<|im_start|>user\nHow many clips?<|im_end|>\n<|im_start|>assistant\n"))
        completions.append(Completion(prompt, ids, probe_positions(len(ids)), answer_A))
    joins = Joins(encode, lambda ids: decode(tokenizer, ids), probe, natural)
    fast, naive = (
        measured(completions, joins, lambda parts, measure=measure: measure(model, parts, encode(probe)))
        for measure in (exit_entropies, exit_entropies_naive)
    )
    for f, n in zip(fast, naive, strict=True):
        torch.testing.assert_close(f, n, atol=1e-4, rtol=0)


def test_two_steps_on_gsm8k_resumed_exported_and_loaded_again(tokenizer, tmp_path):
    from iapo.tools.export import main as export

    prepare("gsm8k", tmp_path / "data", str(GSM8K))
    settings = ["model=smollm2-135m-instruct", f"actor_rollout_ref.model.path={SMOLLM2}", "data=gsm8k"]
    settings += ["variant=iapo_rate", "iapo.score=auto", "trainer.save_freq=1"]
    with runs(tmp_path, tmp_path / "data") as train:
        first = finished(train(*settings, "trainer.total_training_steps=1"), timeout=900).metrics()
        run = finished(train(*settings, "trainer.total_training_steps=2"), timeout=900)
    metrics = run.metrics()
    assert list(metrics) == [1, 2] and metrics[1] == first[1]
    assert all(metrics[step]["iapo/exit_entropy/start"] > 0 for step in (1, 2))
    starts = (run.folder / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start).get("resumes_from") for start in starts] == [None, 1]

    assert export([str(run.folder), "--out", str(tmp_path / "model")]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (SMOLLM2, tmp_path / "model")
    )
    moved = [(before.state_dict()[name] - value).abs().max().item() for name, value in after.state_dict().items()]
    assert 0 < max(moved) < 1e-3  # two steps of Adam
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(after(ids).logits[0, -1].argmax()) == " Paris"
