"""Rollouts by groups store what verl's own worker stores, with fewer calls."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import agent_loop as verls
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import LLMServerClient

from iapo.verl_adapter.group_rollouts import GroupClient, GroupRolloutManager, GroupRolloutWorker

PROMPT = [3, 4, 5]


class Loop:
    """An agent loop that writes one token more for every completion of a group."""

    def __init__(self, **_):
        pass

    async def run(self, sampling_params, *, session_id, **kwargs):
        assert sampling_params == {"temperature": 1.0}
        if session_id in kwargs["extra_info"].get("fails", ()):
            raise OSError(f"no server for {session_id}")
        ids = list(range(10, 11 + session_id))
        extra = {"min_global_steps": 6, "max_global_steps": 7, "turn_scores": []}
        return AgentLoopOutput(
            prompt_ids=PROMPT,
            response_ids=ids,
            response_mask=[1] * len(ids),
            num_turns=2,
            metrics={},
            extra_fields=extra,
        )


class Queue:
    """TransferQueue's two calls, remembered."""

    def __init__(self):
        self.rows, self.statuses, self.calls = {}, [], 0

    async def async_kv_batch_put(self, keys, fields, tags, partition_id):
        self.calls += 1
        for i, key in enumerate(keys):
            self.rows[partition_id, key] = ({name: fields[name][i] for name in fields.keys()}, tags[i])  # noqa: SIM118, a TensorDict

    async def async_kv_put(self, key, partition_id, tag):
        self.statuses.append((key, partition_id, tag["status"]))


class RewardWorker:
    """A Ray handle: the reward is the sum of the response's tokens."""

    def __init__(self):
        self.calls = 0
        self.compute_score = self.compute_score_batch = SimpleNamespace(remote=self._score)

    async def _score(self, data):
        self.calls += 1
        results = []
        for i in range(len(data)):
            item = data[i]
            length = int(item.batch["attention_mask"].sum()) - len(PROMPT)
            assert item.batch["prompts"].tolist() == PROMPT and item.non_tensor_batch["reward_model"] == {
                "ground_truth": "2"
            }
            reward = float(item.batch["responses"][:length].sum())
            results.append({"reward_score": reward, "reward_extra_info": {"acc": 1.0}})
        # verl's own worker scores one completion per call.
        return results if isinstance(self.owner, GroupRolloutWorker) else results[0]


def run(kind, monkeypatch, validate=False, **extra_info):
    """The queue after one prompt of `kind`'s worker."""
    worker = object.__new__(kind)
    rollout = {"n": 3, "val_kwargs": {"n": 2}}
    worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "data": {}})
    worker.distillation_enabled, worker.processor, worker.tools = False, None, []
    worker.llm_client = worker.tokenizer = worker.hf_model_type = worker.dataset_cls = None
    worker.mm_processor_kwargs = {}
    reward = RewardWorker()
    reward.owner = worker
    worker.reward_loop_worker_handles = [reward]
    monkeypatch.setitem(verls._agent_loop_registry, "mine", {"_target_": f"{__name__}.Loop"})
    queue = Queue()
    for name in ("async_kv_batch_put", "async_kv_put"):
        monkeypatch.setattr(f"transfer_queue.{name}", getattr(queue, name))
    prompt = {
        "uid": "u",
        "agent_name": "mine",
        "raw_prompt": [{"role": "user", "content": "1+1="}],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": 5, **extra_info},
        "index": 5,
        "global_steps": 7,
        "data_source": "sums",
    }
    trajectory = {"step": 7, "sample_index": 5, "rollout_n": 0, "validate": validate}
    asyncio.run(worker._run_prompt(prompt, {"temperature": 1.0}, trajectory))
    return queue, reward


VERLS = AgentLoopWorkerTQ.__ray_metadata__.modified_class


@pytest.mark.parametrize("validate", [False, True])
def test_the_rows_are_verls(monkeypatch, validate):
    expected, theirs = run(VERLS, monkeypatch, validate)
    queue, reward = run(GroupRolloutWorker, monkeypatch, validate)
    completions = 2 if validate else 3
    assert queue.rows.keys() == expected.rows.keys() and len(queue.rows) == completions
    for key, (fields, tag) in queue.rows.items():
        their_fields, their_tag = expected.rows[key]
        assert tag == their_tag and fields.keys() == their_fields.keys()
        for name, value in fields.items():
            theirs_value = their_fields[name]
            if isinstance(value, torch.Tensor):
                assert value.dtype == theirs_value.dtype and torch.equal(value, theirs_value), name
            elif name != "metrics":  # seconds
                assert getattr(value, "data", value) == getattr(theirs_value, "data", theirs_value), name
    assert queue.statuses[-1] == expected.statuses[-1] == ("u", "val" if validate else "train", "finished")
    assert (queue.calls, reward.calls) == (1, 1) and (expected.calls, theirs.calls) == (completions, completions)


def test_a_failed_completion_is_missing_and_the_others_are_kept(monkeypatch):
    expected, _ = run(VERLS, monkeypatch, fails=[1])
    queue, _ = run(GroupRolloutWorker, monkeypatch, fails=[1])
    assert queue.rows.keys() == expected.rows.keys() == {("train", "u_0_0"), ("train", "u_2_0")}
    assert queue.statuses[-1] == expected.statuses[-1] == ("u", "train", "failure")


def test_a_group_of_failures_is_one(monkeypatch):
    queue, reward = run(GroupRolloutWorker, monkeypatch, fails=[0, 1, 2])
    assert (queue.rows, reward.calls, queue.statuses) == ({}, 0, [("u", "train", "failure")])


def test_a_reward_that_cannot_be_reached_fails_the_group(monkeypatch):
    def unreachable(self, data):
        raise ConnectionError("the reward worker is gone")

    monkeypatch.setattr(RewardWorker, "_score", unreachable)
    queue, _ = run(GroupRolloutWorker, monkeypatch)
    assert (queue.rows, queue.statuses) == ({}, [("u", "train", "failure")])


def test_what_it_does_not_serve_goes_verls_way(monkeypatch):
    monkeypatch.setattr(GroupRolloutWorker, "_sample", lambda *_: pytest.fail("this is not served"))
    worker = object.__new__(GroupRolloutWorker)
    worker.distillation_enabled = True
    calls = []

    async def own_way(self, *arguments):
        calls.append(arguments)

    monkeypatch.setattr(VERLS, "_run_prompt", own_way)
    asyncio.run(worker._run_prompt({"uid": "u"}, {}, {"validate": False}))
    assert len(calls) == 1


def test_the_manager_starts_these_workers():
    manager = GroupRolloutManager(OmegaConf.create({"actor_rollout_ref": {"rollout": {}, "model": {}}}), None)
    assert issubclass(manager.agent_loop_workers_class.__ray_metadata__.modified_class, GroupRolloutWorker)


class Servers:
    """A client of verl's whose load balancer is this object, which counts."""

    def __init__(self, fails=0):
        self.acquired, self.released, self.fails = 0, [], fails

    async def acquire(self, request_id, **_):
        if self.fails:
            self.fails -= 1
            raise RuntimeError("No available servers in load balancer")
        self.acquired += 1
        return f"server {self.acquired}", None


def group_client(servers):
    client = LLMServerClient(config=None)
    client._acquire_server = servers.acquire
    client._release_server = lambda server_id, request_id=None: servers.released.append(server_id)
    return GroupClient(client)


def test_a_group_asks_for_its_server_once_and_gives_it_back_once():
    async def one(client, number):
        server, _ = await client._acquire_server(str(number))
        await asyncio.sleep(0.001 * number)
        client._release_server(server, str(number))
        return server

    async def turns(client):
        first = await asyncio.gather(*(one(client, number) for number in range(8)))
        return first, await one(client, 0)

    servers = Servers()
    assert asyncio.run(turns(group_client(servers))) == (["server 1"] * 8, "server 2")
    assert servers.acquired == 2 and servers.released == ["server 1", "server 2"]


def test_a_group_asks_again_after_a_load_balancer_without_servers():
    async def twice(client):
        with pytest.raises(RuntimeError, match="No available servers"):
            await client._acquire_server("a")
        return await client._acquire_server("a")

    servers = Servers(fails=1)
    assert asyncio.run(twice(group_client(servers))) == ("server 1", None)
