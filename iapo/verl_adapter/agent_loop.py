"""Rollouts that can be repeated: verl's single-turn agent loop with a seed per completion, which comes back whole.

vLLM draws from one generator, in the order in which requests happen to arrive. So two runs with the same seed differ,
and a resumed run can't continue the stream. With a seed per request a completion depends on the policy only. It costs
vLLM a generator per request, so platform=cpu turns it on and platform=gpu leaves it off.
"""

import hashlib

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class SeededSingleTurnAgentLoop(SingleTurnAgentLoop):
    async def run(self, sampling_params, **kwargs):
        extra_info = kwargs.get("extra_info") or {}
        seed = request_seed(
            self.rollout_config.seed,
            kwargs["global_steps"],
            kwargs.get("data_source"),
            extra_info.get("split"),
            kwargs["index"],
            kwargs["session_id"],
        )
        return await super().run(sampling_params | {"seed": seed, **self._as_a_whole}, **kwargs)

    @property
    def _as_a_whole(self) -> dict:
        """verl reads the last output only; vLLM's default is one after every token."""
        if self.rollout_config.name != "vllm":
            return {}
        from vllm.sampling_params import RequestOutputKind

        return {"output_kind": RequestOutputKind.FINAL_ONLY}


def request_seed(*identity) -> int:
    """31 bits from what identifies a completion: run seed, step, data source, split, prompt index, rollout number."""
    digest = hashlib.sha256("/".join(str(part) for part in identity).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
