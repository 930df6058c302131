"""The buffer through which an update's weights go to vLLM, which must hold the largest of them."""

import torch
from omegaconf import DictConfig

KEY = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
SMALLEST = {"cpu": 16, "cuda": 2048}  # where the model needs no more


def largest_weight(model_config) -> tuple[str, int]:
    """Name and MiB, rounded up, of a model's largest weight in float32, as training sends it; nothing is allocated.

    Args:
        model_config: of Hugging Face.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    name, weight = max(model.named_parameters(), key=lambda item: item[1].numel())
    return name, -(-4 * weight.numel() // 2**20)


def size_bucket(config: DictConfig) -> None:
    """Fill in `KEY` where the user left it null. A model that can't be loaded is refused later, with its reason."""
    from transformers import AutoConfig

    engine, model = config.actor_rollout_ref.rollout.checkpoint_engine, config.actor_rollout_ref.model
    if engine.update_weights_bucket_megabytes is not None:
        return
    smallest = SMALLEST.get(config.trainer.device, SMALLEST["cuda"])
    try:
        model_config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        needed = largest_weight(model_config)[1]
    except Exception:  # of transformers, or of the model's own code; `check_files` tries again
        needed = 0
    engine.update_weights_bucket_megabytes = max(smallest, needed)
