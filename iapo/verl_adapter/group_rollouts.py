"""Rollouts by groups: the completions of a prompt are routed, scored and stored by one call each.

verl's worker makes these calls for every completion. On a CPU with short completions they cost more than sampling. This
worker runs verl's agent loops as they are, and makes for the whole group the calls that verl makes for each completion.
A group waits for its last completion before it is scored, so platform=gpu, where rewards can be slow, leaves it off.

    actor_rollout_ref.rollout.agent.agent_loop_manager_class=iapo.verl_adapter.group_rollouts.GroupRolloutManager
"""

import asyncio
import random

import hydra
import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap, _agent_loop_registry
from verl.protocol import DataProto
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ, logger
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient


class GroupClient(LLMServerClient):
    """Sends the requests of one group to one server, for which it asks the load balancer once.

    It gives the server back when no request is under way, so a later turn may go to another one.
    """

    def __init__(self, client: LLMServerClient):
        super().__init__(client.config)
        self._client = client
        self._under_way = 0
        self._server: asyncio.Future | None = None

    async def _acquire_server(self, request_id: str, **extra) -> tuple:
        if self._server is None:
            self._server = asyncio.ensure_future(self._client._acquire_server(request_id, **extra))
        try:
            server = await self._server
        except Exception:
            self._server = None  # the next request asks again
            raise
        self._under_way += 1
        return server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self._server = None
            self._client._release_server(server_id, request_id)


class GroupRolloutWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    async def _run_prompt(self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False) -> None:
        """Sample, score and store the completions of one prompt; verl's own way for what this doesn't serve."""
        own_count = {"__rollout_n__", "__do_sample__"} & prompt.keys()
        if own_count or self.distillation_enabled or self.processor or not self.reward_loop_worker_handles:
            return await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        uid, partition = prompt["uid"], "val" if trajectory["validate"] else "train"
        agent_name = prompt.pop("agent_name")
        try:
            outputs, errors = await self._sample(agent_name, prompt, sampling_params, trajectory["validate"])
            if outputs:
                await self._score(list(outputs.values()), prompt)
                keys = [f"{uid}_{number}_0" for number in outputs]
                rows = [row(output, prompt | {"session_id": number}) for number, output in outputs.items()]
                await tq.async_kv_batch_put(
                    keys=keys,
                    fields=list_of_dict_to_tensordict(rows),
                    tags=[tag(fields) for fields in rows],
                    partition_id=partition,
                )
        except Exception as error:
            errors = [error]
        for error in errors:  # the trainer counts what is missing, and stops where nothing is there
            logger.error(f"rollout of prompt {uid} failed", exc_info=error)
        await tq.async_kv_put(key=uid, partition_id=partition, tag={"status": "failure" if errors else "finished"})

    async def _sample(
        self, agent_name: str, prompt: dict, sampling_params: dict, validate: bool
    ) -> tuple[dict, list[BaseException]]:
        """The outputs of the group's agent loops by their number, and what the others raised."""
        config = self.config.actor_rollout_ref.rollout
        client = self.llm_client
        if type(client) is LLMServerClient:  # a subclass may route every request on its own
            client = GroupClient(client)
        agent_loop = hydra.utils.instantiate(
            config=_agent_loop_registry[agent_name],
            trainer_config=DictConfigWrap(config=self.config),
            server_manager=client,
            tokenizer=self.tokenizer,
            processor=self.processor,
            hf_model_type=self.hf_model_type,
            dataset_cls=self.dataset_cls,
            data_config=DictConfigWrap(self.config.data),
            tools=ToolListWrap(self.tools),
        )
        count = config.val_kwargs.n if validate else config.n
        loops = [agent_loop.run(sampling_params, session_id=number, **prompt) for number in range(count)]
        results = await asyncio.gather(*loops, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        return {n: result for n, result in enumerate(results) if not isinstance(result, BaseException)}, errors

    async def _score(self, outputs: list, prompt: dict) -> None:
        """Set the reward of every output, by one call of a reward worker."""
        prompts = torch.tensor([output.prompt_ids for output in outputs])
        rows = [torch.tensor(output.response_ids, dtype=torch.long) for output in outputs]
        responses, masks = (pad_sequence(x, batch_first=True) for x in (rows, [torch.ones_like(row) for row in rows]))
        mask = torch.cat([torch.ones_like(prompts), masks], 1)
        batch = {
            "prompts": prompts,
            "responses": responses,
            "attention_mask": mask,
            "input_ids": torch.cat([prompts, responses], 1),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        columns = {name: column([value] * len(outputs)) for name, value in prompt.items()}
        columns["__num_turns__"] = column([output.num_turns for output in outputs])
        columns["tool_extra_fields"] = column([output.extra_fields for output in outputs])
        data = DataProto(batch=TensorDict(batch, batch_size=len(outputs)), non_tensor_batch=columns)
        results = await random.choice(self.reward_loop_worker_handles).compute_score_batch.remote(data)
        for output, result in zip(outputs, results, strict=True):
            output.reward_score = result["reward_score"]
            output.extra_fields["reward_extra_info"] = result["reward_extra_info"]


def row(output, columns: dict) -> dict:
    """What TransferQueue holds of a completion: verl's fields, and the columns of its prompt."""
    fields = output.as_dict() | columns
    fields.pop("multi_modal_data", None)
    input_ids = torch.cat([fields["prompts"], fields["responses"]])
    own = {"loss_mask": fields["response_mask"], "input_ids": input_ids, "position_ids": torch.arange(len(input_ids))}
    return fields | own | {"multi_modal_inputs": {}}


def tag(fields: dict) -> dict:
    """What verl's replay buffer and balancing know of a completion."""
    prompt, response = len(fields["prompts"]), len(fields["responses"])
    versions = {name: fields["extra_fields"].get(name) for name in ("min_global_steps", "max_global_steps")}
    lengths = {"prompt_len": prompt, "response_len": response, "seq_len": prompt + response}
    return {"status": "success", "global_steps": fields["global_steps"]} | lengths | versions


def column(values: list) -> np.ndarray:
    """One object per row, whatever its type."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


class GroupRolloutManager(AgentLoopManagerTQ):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(GroupRolloutWorker)
