"""IapoRewardManager on real DataProtos: DAPO's penalty by hand, lengths, truncation, errors handed on."""

import asyncio
import json
import math
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.reward import load_reward_manager, resolve_reward_manager_cls

from iapo.metrics.training import reward_metrics
from iapo.reward import compute_score
from iapo.verl_adapter.reward_manager import IapoRewardManager, eos_token_ids

PROMPT_TOKENS = 3
RIGHT = "<think>a</think>\n<answer>42</answer>"
WRONG = "<think>a</think>\n<answer>41</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and added tokens as in Qwen3: <think> is not special, <|im_end|> is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_config(max_response_length=64, overlong=None, max_resp_len=None, model_path=None):
    config = {
        "data": {"max_response_length": max_response_length},
        "actor_rollout_ref": {"model": {"path": model_path}},
        "reward": {
            "custom_reward_function": {"path": "pkg://iapo.reward", "name": "compute_score"},
            "reward_manager": {
                "source": "importlib",
                "name": "IapoRewardManager",
                "module": {"path": "pkg://iapo.verl_adapter.reward_manager"},
            },
        },
    }
    if overlong is not None:
        config["reward"]["reward_kwargs"] = {"overlong_buffer_cfg": overlong, "max_resp_len": max_resp_len}
    return OmegaConf.create(config)


def make_data(response_ids: list[int], width: int = 80, ground_truth="42") -> DataProto:
    """One item with a left-padded prompt and a response padded on the right to `width` tokens."""
    padding = width - len(response_ids)
    return DataProto.from_dict(
        tensors={
            "prompts": torch.tensor([[0, 7, 7]]),
            "responses": torch.tensor([response_ids + [0] * padding]),
            "attention_mask": torch.tensor([[0, 1, 1] + [1] * len(response_ids) + [0] * padding]),
        },
        non_tensors={
            "data_source": np.array(["any"], dtype=object),
            "reward_model": np.array([{"ground_truth": ground_truth}], dtype=object),
            "extra_info": np.array([{}], dtype=object),
        },
    )


def run(config, tokenizer, *data: DataProto, score_function=compute_score) -> list[dict]:
    """All items through one manager; built inside the loop, as in verl's reward worker."""

    async def run_all():
        manager = IapoRewardManager(config, tokenizer, score_function)
        return [await manager.run_single(item) for item in data]

    return asyncio.run(run_all())


def test_verl_finds_and_builds_it(tokenizer):
    config = make_config()
    assert resolve_reward_manager_cls(config) is IapoRewardManager

    async def run_one():
        kwargs = {"reward_router_address": None, "reward_model_tokenizer": None}
        manager = load_reward_manager(config, tokenizer, **kwargs)
        return await manager.run_single(make_data(tokenizer.encode(RIGHT)))

    assert asyncio.run(run_one())["reward_score"] == 1.5


def test_a_right_answer(tokenizer):
    ids = [*tokenizer.encode(RIGHT), tokenizer.eos_token_id]
    # <think>, a, </think>, newline, the 19 bytes of <answer>42</answer>, <|im_end|>
    assert len(ids) == 24
    [result] = run(make_config(), tokenizer, make_data(ids))
    assert result == {
        "reward_score": 1.5,
        "reward_extra_info": {
            "score": 1.5,
            "acc": 1.0,
            "format": 1.0,
            "pred": "42",
            "verify_failure": 0.0,
            "failure_reason": "",
            "response_length": 24.0,
            "truncated": 0.0,
            "reward_error": "",
        },
    }


@pytest.mark.parametrize(
    ("length", "ends", "truncated"),
    [(8, False, 1.0), (8, True, 0.0), (7, False, 0.0), (1, True, 0.0), (0, False, 0.0)],
)
def test_truncated(tokenizer, length, ends, truncated):
    ids = [5] * length
    if ends:
        ids[-1] = tokenizer.eos_token_id
    [result] = run(make_config(max_response_length=8), tokenizer, make_data(ids, width=10))
    info = result["reward_extra_info"]
    assert (info["response_length"], info["truncated"]) == (float(length), truncated)
    assert (result["reward_score"], info["failure_reason"]) == (-1.5, "no_answer")


def test_the_generation_configs_eos_ends_a_response_too(tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    config = make_config(max_response_length=8, model_path=str(tmp_path))
    assert eos_token_ids(config, tokenizer) == {5, 6, tokenizer.eos_token_id}
    [ended, cut] = run(config, tokenizer, make_data([7] * 7 + [5]), make_data([7] * 8))
    assert (ended["reward_extra_info"]["truncated"], cut["reward_extra_info"]["truncated"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("length", "penalty"), [(40, 0.0), (60, 0.0), (65, -0.25), (70, -0.5), (80, -1.0)]
)  # L_max 80, L_cache 20: linear from 0 at 60 tokens to -1 at 80
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_overlong_penalty(tokenizer, length, penalty, factor):
    overlong = {"enable": True, "len": 20, "penalty_factor": factor, "log": True}
    config = make_config(max_response_length=80, overlong=overlong, max_resp_len=80)
    answer = tokenizer.encode(RIGHT)
    [result] = run(config, tokenizer, make_data(tokenizer.encode(" ") * (length - len(answer)) + answer))
    info = result["reward_extra_info"]
    assert (result["reward_score"], info["score"]) == (1.5 + factor * penalty, 1.5)
    assert (info["overlong_reward"], info["overlong"]) == (factor * penalty, float(penalty < 0))
    assert {type(value) for value in info.values()} == {float, str}


def test_max_resp_len_below_the_responses_limit(tokenizer):
    overlong = {"enable": True, "len": 20, "penalty_factor": 1.0, "log": False}
    config = make_config(max_response_length=80, overlong=overlong, max_resp_len=64)
    with pytest.raises(ValueError, match=r"max_resp_len: 64 is below data.max_response_length=80"):
        run(config, tokenizer)


def raising(data_source, solution_str, ground_truth, extra_info):
    if ground_truth == "bad row":
        raise KeyError("no such\ncolumn")
    return {"score": 1.0, "mine": 2.0, "why": "because"}


async def raising_coroutine(**kwargs):
    return raising(**kwargs)


@pytest.mark.parametrize("score_function", [raising, raising_coroutine])
def test_an_error_of_the_reward_function_is_handed_on(tokenizer, score_function, caplog):
    ids = tokenizer.encode(RIGHT)
    good, bad = make_data(ids), make_data(ids, ground_truth="bad row")
    [first, failed, last] = run(make_config(), tokenizer, good, bad, good, score_function=score_function)
    assert first == last and first["reward_score"] == 1.0 and first["reward_extra_info"]["reward_error"] == ""
    info = failed["reward_extra_info"]
    # Numbers are NaN, which DAPO's filter of equal groups does not drop.
    assert all(math.isnan(x) for x in (failed["reward_score"], info.pop("score"), info.pop("mine")))
    assert info == {
        "why": "",
        "response_length": 23.0,
        "truncated": 0.0,
        "reward_error": "KeyError: 'no such\\ncolumn'",
    }
    assert "Traceback" in caplog.text and "KeyError" in caplog.text


def test_an_error_before_the_first_good_result_has_the_usual_keys(tokenizer):
    overlong = {"enable": True, "len": 20, "penalty_factor": 1.0, "log": True}
    config = make_config(max_response_length=80, overlong=overlong, max_resp_len=80)
    data = make_data(tokenizer.encode(RIGHT), ground_truth="bad row")
    [good] = run(config, tokenizer, data)
    [failed] = run(config, tokenizer, data, score_function=raising)
    assert failed["reward_extra_info"].keys() == good["reward_extra_info"].keys()


@pytest.mark.parametrize(
    ("returned", "error"),
    [(math.nan, "ValueError"), (math.inf, "ValueError"), (None, "TypeError"), ({"acc": 1.0}, "KeyError")],
)
def test_a_result_that_is_no_reward_is_an_error(tokenizer, returned, error):
    [result] = run(make_config(), tokenizer, make_data([5]), score_function=lambda **kwargs: returned)
    assert math.isnan(result["reward_score"])
    assert result["reward_extra_info"]["reward_error"].startswith(f"{error}: ")


@pytest.mark.parametrize("acc", [None, math.nan, math.inf, np.float32("nan"), "1.0", [1.0], np.array([1.0, 0.0])])
def test_an_acc_that_is_no_number_is_an_error(tokenizer, acc):
    """Otherwise accuracy would leave the metrics without a word, or count right answers as wrong."""

    def own(**kwargs):
        return {"score": 1.0, "acc": acc}

    [result] = run(make_config(), tokenizer, make_data([5]), score_function=own)
    error = result["reward_extra_info"]["reward_error"]
    assert error.startswith("ValueError: acc: ") and error.endswith("return 1 if the answer is right, else 0.")
    assert math.isnan(result["reward_score"])


@pytest.mark.parametrize("one", [1, True, np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1)])
def test_numbers_of_a_reward_function_become_floats(tokenizer, one):
    def own(**kwargs):
        return {"score": one, "acc": one, "why": "because"}

    [result] = run(make_config(), tokenizer, make_data([5]), score_function=own)
    info = result["reward_extra_info"]
    assert result["reward_score"] == info["acc"] == info["score"] == 1.0
    assert (type(info["acc"]), info["why"], info["reward_error"]) == (float, "because", "")
    assert reward_metrics([info])["iapo/reward/acc"] == 1.0


def test_reward_metrics_are_means_of_all_kinds_of_numbers():
    infos = [
        {"acc": np.float32(1), "mine": torch.tensor([2.0]), "half": Fraction(1, 2), "text": "1", "pair": np.ones(2)},
        {"acc": False, "mine": Decimal(4), "none": None, "word": np.str_("1"), "complex": 1j},
        {"acc": np.float64(0.5), "mine": 0},
    ]
    assert reward_metrics(infos) == {"iapo/reward/acc": 0.5, "iapo/reward/half": 0.5, "iapo/reward/mine": 2.0}
    assert reward_metrics([]) == {}


@pytest.mark.parametrize("acc", [None, math.nan, np.float32("nan"), "yes", np.array([1, 0])])
def test_reward_metrics_refuse_an_acc_that_is_no_number(acc):
    with pytest.raises(ValueError, match=r"^acc: .* must be a finite number; let the reward function return 1 if"):
        reward_metrics([{"acc": 1.0}, {"acc": acc}])


def test_an_error_is_one_line(tokenizer):
    def two_lines(**kwargs):
        raise RuntimeError("first\nsecond")

    [result] = run(make_config(), tokenizer, make_data([5]), score_function=two_lines)
    assert result["reward_extra_info"]["reward_error"] == "RuntimeError: first second"


def test_cancelling_is_no_error_of_the_reward_function(tokenizer):
    async def cancelled(**kwargs):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(make_config(), tokenizer, make_data([5]), score_function=cancelled)


def test_verls_validation_metrics_read_it(tokenizer):
    """Two completions of one prompt, one right: acc and response_length are averaged, strings left out."""
    data = [make_data(tokenizer.encode(text)) for text in (RIGHT, WRONG + " ")]
    infos = [result["reward_extra_info"] for result in run(make_config(), tokenizer, *data)]
    columns = {key: [info[key] for info in infos] for key in infos[0]}
    metrics = process_validation_metrics(["any", "any"], ["prompt", "prompt"], columns)["any"]
    assert metrics["acc"]["mean@2"] == 0.5
    assert metrics["score"]["mean@2"] == 0.5
    assert metrics["response_length"]["mean@2"] == 23.5
    assert metrics["verify_failure"]["mean@2"] == 0.0
    assert not {"pred", "failure_reason", "reward_error"} & set(metrics)


def test_markers_that_are_special_tokens_stay_in_the_text():
    """As R1's, <think> may be one special token, which verl's decoding drops; the end of a turn is dropped still."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text = "<think>a</think> \\boxed{42}"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "a \\boxed{42}"
    config = make_config()
    OmegaConf.update(config, "iapo.format", "boxed", force_add=True)
    ids = tokenizer.encode(text + "<|im_end|>")
    [result] = run(config, tokenizer, make_data(ids), score_function=partial(compute_score, format="boxed"))
    assert result["reward_score"] == 1.5 and result["reward_extra_info"]["pred"] == "42"
