"""verl's DAPO reward manager, with response lengths, and with errors returned instead of raised in a worker.

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://iapo.verl_adapter.reward_manager
    reward.reward_manager.name=IapoRewardManager

The reward is verl's: the score of the reward function plus, with
`reward.reward_kwargs.overlong_buffer_cfg.enable`, DAPO's soft overlong penalty (arXiv 2503.14476, section 3.4).
For a response of L tokens, end-of-sequence token included, it is

    0                                                    where L <= L_max - L_cache
    penalty_factor ((L_max - L_cache) - L) / L_cache     beyond

with L_max = `reward_kwargs.max_resp_len` and L_cache = `overlong_buffer_cfg.len`. DAPO's is -1 beyond L_max;
verl's is not clipped there: no difference while L never exceeds L_max, which the constructor checks.
"""

import logging
import math
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
from verl.utils.fs import copy_to_local
from verl.utils.model import get_generation_config

from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.metrics.training import check_acc, number
from iapo.probe.text import end_tokens
from iapo.reward import score_dict

logger = logging.getLogger(__name__)


class IapoRewardManager(DAPORewardManager):
    """DAPORewardManager whose `reward_extra_info` always has these too:

    - response_length: tokens of the response, end-of-sequence token included.
    - truncated: 1.0 if the response has `data.max_response_length` tokens and does not end with an
      end-of-sequence token, else 0.0.
    - reward_error: "" or, if the reward function raised, "TypeName: message" on one line. The reward and all
      numbers are then NaN. Whoever reads the batch must stop the run. DAPO's filter replaces groups of equal
      numbers for as long as it takes; NaN lets this group through, so that it is read.

    Raises:
        ValueError: the overlong penalty is on and max_resp_len is below data.max_response_length.
    """

    def __init__(self, config: DictConfig, tokenizer, compute_score, **kwargs):
        super().__init__(config, tokenizer, compute_score, **kwargs)
        answer_format = FORMATS[OmegaConf.select(config, "iapo.format") or IapoConfig().format]
        self.tokenizer = keeping(tokenizer, answer_format.markers)
        self.max_response_length = config.data.max_response_length
        self.eos_token_ids = eos_token_ids(config, tokenizer)
        penalty_on = self.overlong_buffer_cfg is not None and self.overlong_buffer_cfg.enable
        if penalty_on and self.max_resp_len < self.max_response_length:
            raise ValueError(
                f"reward.reward_kwargs.max_resp_len: {self.max_resp_len} is below data.max_response_length="
                f"{self.max_response_length}, so the penalty would exceed penalty_factor; set both to the same."
            )
        # verl builds a batch's columns from the keys of its first result, so a failed result needs those of
        # a good one. Until a good one is seen, these are the keys of `iapo.reward.compute_score`.
        self._blank_info = _blank_like(score_dict(False, False, "", ""))
        if penalty_on and self.overlong_buffer_cfg.log:
            self._blank_info |= {"overlong_reward": math.nan, "overlong": math.nan}

    async def run_single(self, data: DataProto) -> dict:
        """Scores the last sequence in `data`: {"reward_score": float, "reward_extra_info": dict}.

        Whatever the reward function raises, or a score or an `acc` that is no finite number, ends up in `reward_error`.
        """
        try:
            result = await super().run_single(data)
            reward = float(result["reward_score"])
            if not math.isfinite(reward):
                raise ValueError(f"the reward function returned {reward}; it must return a finite number")
            info = {key: _plain(value) for key, value in result["reward_extra_info"].items()}
            if "acc" in info:
                check_acc(info["acc"])
            self._blank_info = _blank_like(info)
            reward_error = ""
        except Exception as error:
            logger.exception("the reward function failed")
            reward, info = math.nan, dict(self._blank_info)
            reward_error = " ".join(f"{type(error).__name__}: {error}".split())
        info |= length_info(data[-1], self.max_response_length, self.eos_token_ids)
        info["reward_error"] = reward_error
        return {"reward_score": reward, "reward_extra_info": info}


class _Keeping:
    """Decodes as a tokenizer does, but for some of its special tokens, which stay in the text."""

    def __init__(self, tokenizer, dropped: set[int]):
        self._tokenizer, self._dropped = tokenizer, dropped

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """As the tokenizer's; verl skips special tokens."""
        ids = torch.as_tensor(ids).tolist()
        kept = [token for token in ids if not (skip_special_tokens and token in self._dropped)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def keeping(tokenizer, markers: Sequence[str]):
    """`tokenizer`, or one that keeps those of the format's markers that are special tokens, which verl would drop."""
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    dropped = {number for number, text in special.items() if text not in markers}
    return _Keeping(tokenizer, dropped) if len(dropped) < len(special) else tokenizer


def eos_token_ids(config: DictConfig, tokenizer) -> frozenset[int]:
    """All tokens that end a response, by `iapo.probe.text.end_tokens`; there may be no model and no generation config.

    The rollout stops at the tokenizer's and at the generation config's. Qwen's chat models end with <|im_end|> or
    <|endoftext|>; the tokenizer has one.
    """
    model_path = OmegaConf.select(config, "actor_rollout_ref.model.path")
    generation_config = get_generation_config(copy_to_local(model_path)) if model_path else None
    return frozenset(end_tokens(tokenizer, generation_config))


def length_info(item, max_response_length: int, eos_token_ids: frozenset[int]) -> dict[str, float]:
    """`response_length` in tokens and `truncated` (see IapoRewardManager) of one item of a DataProto."""
    response_T = item.batch["responses"]
    T = response_T.shape[-1]
    length = int(item.batch["attention_mask"][-T:].sum()) if T else 0
    truncated = length >= max_response_length and int(response_T[length - 1]) not in eos_token_ids
    return {"response_length": float(length), "truncated": float(truncated)}


def _plain(value):
    """One type for all numbers: verl's penalty is a tensor on some completions and an int on others, and numpy's
    numbers would be left out of means and of JSON."""
    plain = number(value)
    return value if plain is None else plain


def _blank_like(info: dict) -> dict[str, float | str]:
    return {key: "" if isinstance(value, str) else math.nan for key, value in info.items()}
