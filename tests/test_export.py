"""A checkpoint's shards become a Hugging Face model, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from iapo.tools.export import main, merge
from tests.conftest import make_model
from tests.ranks import run_ranks

TINY = Path(__file__).parent.parent / "iapo/assets/tiny"


def shapes_model():
    """Weights whose rows two ranks can't share evenly, and a tied output layer."""
    return make_model("llama", vocab_size=97, tie_word_embeddings=True)


def save_shards(rank: int, actor: str, mesh_shape: tuple[int, ...], store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    names = ("ddp", "fsdp")[-len(mesh_shape) :]
    model = shapes_model()
    fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    torch.save(model.state_dict(), f"{actor}/model_world_size_2_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_folder(folder: Path, step: int = 4) -> Path:
    """A run's folder whose checkpoint lacks weights only; its configuration names an attention of training."""
    actor = folder / f"checkpoints/global_step_{step}/actor"
    (actor / "huggingface").mkdir(parents=True)
    model = shapes_model()
    model.config.save_pretrained(actor / "huggingface")
    settings = json.loads((actor / "huggingface/config.json").read_text()) | {"attn_implementation": "iapo_packed"}
    (actor / "huggingface/config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(TINY).save_pretrained(actor / "huggingface")
    torch.save({}, actor.parent / "data.pt")
    return actor


def one_rank(folder: Path, step: int = 4, **more) -> Path:
    actor = run_folder(folder, step)
    torch.save(shapes_model().state_dict() | more, actor / "model_world_size_1_rank_0.pt")
    return actor


def assert_is_the_model(folder: Path, dtype=torch.float32):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = shapes_model().to(dtype).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "attn_implementation" not in json.loads((folder / "config.json").read_text())


@pytest.mark.e2e
@pytest.mark.parametrize("mesh_shape", [(2,), (2, 1)], ids=["FSDP", "HSDP"])
def test_the_shards_of_two_ranks_are_merged_bit_for_bit(tmp_path, mesh_shape, capsys):
    actor = run_folder(tmp_path)
    run_ranks(save_shards, str(actor), mesh_shape, str(tmp_path / "store"))
    assert main([str(tmp_path), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == f"iapo export: step 4 in float32: {tmp_path}/model\n"
    assert_is_the_model(tmp_path / "model")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_one_rank_in_the_precision_that_is_asked_for(tmp_path, dtype):
    one_rank(tmp_path)
    assert main([str(tmp_path), *(["--dtype", dtype] if dtype else [])]) == 0
    assert_is_the_model(tmp_path / "export/step_4", getattr(torch, dtype or "float32"))
    assert oct((tmp_path / "export/step_4/model.safetensors").stat().st_mode)[-3:] == "644"


def test_the_last_step_with_weights_is_taken_unless_another_is_named(tmp_path, capsys):
    for step in (2, 10):
        one_rank(tmp_path, step)
    (tmp_path / "checkpoints/global_step_12").mkdir()
    assert main([str(tmp_path), "--out", str(tmp_path / "a")]) == 0
    assert main([str(tmp_path), "--out", str(tmp_path / "b"), "--step", "2"]) == 0
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        " step 10 in float32",
        " step 2 in float32",
    ]


def test_the_step_that_the_tracker_names_is_the_last(tmp_path, capsys):
    for step in (2, 10):
        one_rank(tmp_path, step)
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    assert main([str(tmp_path)]) == 0 and "step 2" in capsys.readouterr().out


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path, capsys):
    actor = one_rank(tmp_path)
    state = shapes_model().state_dict()
    state["model.norm.weight"][0] = 1e6
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    assert main([str(tmp_path), "--dtype", "float16"]) == 2
    assert "--dtype: model.norm.weight has numbers that torch.float16 can't hold" in capsys.readouterr().err
    state["model.norm.weight"] = torch.ones(3)
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    assert main([str(tmp_path)]) == 2
    assert "its weights are not those of LlamaForCausalLM: Error" in capsys.readouterr().err


def test_what_is_not_sharded_must_be_the_same_on_every_rank():
    same = torch.tensor([1.0, 2.0])
    assert torch.equal(merge([{"a": same}, {"a": same.clone()}])["a"], same)
    with pytest.raises(ValueError, match=r"^a: differs between ranks and isn't sharded"):
        merge([{"a": same}, {"a": same + 1}])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["none"], "none: holds no checkpoints/global_step_<N>/actor; give the folder of a run that saved."),
        (["run", "--step", "3"], "--step: 3 must be one of 4."),
        (["run", "--out", "run"], "--out: run exists; choose another, or remove it."),
        (
            ["cut"],
            "cut/checkpoints/global_step_4/actor/model_world_size_1_rank_0.pt is cut short; export another step.",
        ),
        (
            ["rank"],
            "rank/checkpoints/global_step_4/actor/model_world_size_2_rank_0.pt is missing; export another step.",
        ),
        (["two"], "two/checkpoints/global_step_4/actor: holds weights of 2 numbers of ranks, not of one; export"),
        (["lora"], "lora/checkpoints/global_step_4/actor: holds the weights of LoRA; merge it with"),
        (["other"], "other/checkpoints/global_step_4/actor: its weights are not those of LlamaForCausalLM: extra"),
    ],
)
def test_what_cannot_be_exported_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    one_rank(Path("run"))
    shards = {name: one_rank(Path(name)) / "model_world_size_1_rank_0.pt" for name in ("cut", "rank", "two")}
    shards["cut"].write_bytes(shards["cut"].read_bytes()[:-100])
    shards["rank"].rename(shards["rank"].with_name("model_world_size_2_rank_1.pt"))
    shards["two"].with_name("model_world_size_2_rank_0.pt").write_bytes(shards["two"].read_bytes())
    one_rank(Path("lora"), **{"model.layers.0.lora_A.weight": torch.ones(1)})
    one_rank(Path("other"), extra=torch.ones(1))
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"iapo.export: {message}")
    assert [path for path in sorted(Path().rglob("*")) if path not in before and path.name != "export"] == []
