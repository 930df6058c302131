"""A checkpoint as a Hugging Face model: iapo export RUN_DIR [--step N] [--dtype float32] [--out DIR]

Merges the shards of a run's last checkpoint, of any number of ranks, FSDP1 or FSDP2, and writes weights, configuration,
tokenizer and generation settings to DIR, by default RUN_DIR/export/step_<N>. The weights keep the precision in which
they were trained, bit for bit, unless --dtype asks for another. transformers, vLLM and model=DIR load the folder.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from iapo.arguments import Parser
from iapo.checkpoints import TRACKER, problem, step_folder, steps
from iapo.tools.folder import check_out, whole_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(shards: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole tensors, from each rank's part of a state dict, in the order of the ranks.

    A sharded tensor is the concatenation of its parts. With HSDP the first replica's ranks are read. What isn't sharded
    is the same on every rank. Nothing is cast.

    Raises:
        ValueError: a placement that FSDP doesn't make, or ranks that differ where they must not.
    """
    return {name: _merged(name, [shard[name] for shard in shards]) for name in shards[0]}


def _merged(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = parts[0]
    if not isinstance(first, DTensor):
        if not all(torch.equal(first, part) for part in parts[1:]):
            raise ValueError(f"{name}: differs between ranks and isn't sharded; the checkpoint is broken.")
        return first
    *replicated, placement = first.placements
    if not all(p.is_replicate() for p in replicated) or placement.is_partial():
        raise ValueError(f"{name}: has the placement {first.placements}; only FSDP's checkpoints can be exported.")
    if placement.is_replicate():
        return first._local_tensor
    one_replica = parts[: first.device_mesh.size(-1)]
    return torch.cat([part._local_tensor for part in one_replica], placement.dim)


def export(files: Sequence[Path], out: Path, dtype: torch.dtype | None = None) -> torch.dtype:
    """Write a checkpoint's model to `out`, which is whole or absent.

    Args:
        files: the weights of every rank, in order; `huggingface` next to them has configuration and tokenizer.
        dtype: None: that of the shards.

    Returns:
        The dtype of the weights.

    Raises:
        ValueError: as `merge`, or weights of LoRA, or a model that lacks some of its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    actor = files[0].parent
    state = merge([torch.load(path, map_location="cpu", weights_only=False) for path in files])
    if any("lora_" in name for name in state):
        raise ValueError(f"{actor}: holds the weights of LoRA; merge it with python -m verl.model_merger.")
    if dtype is None:  # each weight keeps its own
        dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    else:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        if beyond := next((name for name, tensor in state.items() if not tensor.isfinite().all()), None):
            raise ValueError(f"--dtype: {beyond} has numbers that {dtype} can't hold; choose float32 or bfloat16.")
    with whole_folder(out) as partial:
        shutil.copytree(actor / "huggingface", partial, dirs_exist_ok=True)
        settings = json.loads((partial / "config.json").read_text())
        settings.pop("attn_implementation", None)  # that of training, which another machine may not have
        (partial / "config.json").write_text(json.dumps(settings))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(partial), dtype=dtype)
        try:
            missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:  # of other sizes
            raise ValueError(f"{actor}: its weights are not those of {type(model).__name__}: {error}") from None
        model.tie_weights()
        if unexpected or any(parameter.is_meta for parameter in model.parameters()):
            names = ", ".join([*unexpected, *missing][:3])
            raise ValueError(f"{actor}: its weights are not those of {type(model).__name__}: {names} ...")
        model.save_pretrained(partial)
    return dtype


def shard_files(actor: Path) -> list[Path]:
    """The weights of every rank, in order.

    Raises:
        ValueError: there are none, some are missing, or there are those of several numbers of ranks.
    """
    files = list(actor.glob("model_world_size_*_rank_*.pt"))
    sizes = {int(path.stem.split("_")[3]) for path in files}
    if len(sizes) != 1:
        raise ValueError(f"{actor}: holds weights of {len(sizes)} numbers of ranks, not of one; export another step.")
    ranks = sizes.pop()
    if reason := problem(actor.parent, ["model"], ranks):
        raise ValueError(f"{reason}; export another step.")
    return [actor / f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]


def chosen_step(run_dir: Path, step: int | None) -> Path:
    """The folder `actor` of a step; where none is named, of the one that verl's tracker names, else of the last.

    Raises:
        ValueError: there is none.
    """
    checkpoints = run_dir / "checkpoints"
    found = [number for number in steps(checkpoints) if any(_actor(checkpoints, number).glob("model_world_size_*.pt"))]
    if not found:
        raise ValueError(f"{run_dir}: holds no checkpoints/global_step_<N>/actor; give the folder of a run that saved.")
    if step is not None and step not in found:
        raise ValueError(f"--step: {step} must be one of {', '.join(map(str, found))}.")
    tracker = checkpoints / TRACKER
    last = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    newest = int(last) if last.isdecimal() and int(last) in found else found[-1]
    return _actor(checkpoints, newest if step is None else step)


def _actor(checkpoints: Path, step: int) -> Path:
    return step_folder(checkpoints, step) / "actor"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing written, with the reason in one line."""
    parser = Parser(prog="iapo export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--step", type=int, help="default: the last checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of training")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/export/step_<N>")
    options = parser.parse_args(arguments)
    # It warns that tensors of a process group are read without one, which is the purpose.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    try:
        actor = chosen_step(options.run_dir, options.step)
        step = actor.parent.name.removeprefix("global_step_")
        out = options.out or options.run_dir / "export" / f"step_{step}"
        check_out(out)
        dtype = export(shard_files(actor), out, DTYPES.get(options.dtype))
    except (ValueError, OSError) as error:
        print(f"iapo.export: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"iapo export: step {step} in {str(dtype).removeprefix('torch.')}: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
