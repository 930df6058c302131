"""Which models the exit-entropy pass serves exactly; the others are refused with the reason, never silently wrong."""

import inspect
from typing import Any

from torch.nn import Embedding

# A Hugging Face causal LM, or the root module of an FSDP or PEFT model around one. Their common class is
# `torch.nn.Module`, which declares none of the attributes that are read here.
CausalLM = Any

# How messages about what the pass can't serve end.
TURN_OFF = "set iapo.alpha=0 iapo.rho=0 iapo.progress=0 iapo.validation_information=false"
USE_ANOTHER = f"use another causal LM with full attention, or {TURN_OFF}."


def check_model(model: CausalLM, length: int) -> None:
    """Refuse a model that would be silently wrong at `length` tokens (prompt + response + probe).

    Raises:
        ValueError: recurrent state, sliding or chunked attention shorter than `length`, no position ids (ALiBi),
            rotary frequencies that depend on the length, more tokens than learned positions, positions that don't
            count from 0, attention that isn't causal, an encoder-decoder, prompt or prefix tuning, or training mode.
    """
    if model.training:
        raise ValueError("model: in training mode, where dropout would blur the entropies; call model.eval() first.")
    reason = unsupported(model.config, length)
    # FSDP1 and PEFT wrap the model in a module whose forward accepts any argument.
    unwrapped: CausalLM = getattr(model, "_fsdp_wrapped_module", model)
    if hasattr(unwrapped, "get_base_model"):
        if reason is None and unwrapped.active_peft_config.is_prompt_learning:
            reason = f"PEFT's {unwrapped.active_peft_config.peft_type.value} gives it tokens or keys of its own"
        unwrapped = unwrapped.get_base_model()
    if reason is None and "position_ids" not in inspect.signature(unwrapped.forward).parameters:
        reason = "its forward takes no position_ids (ALiBi?), so probes can't be placed"
    if reason is None and getattr(unwrapped, "_is_stateful", False):
        reason = "it keeps a recurrent state instead of a KV cache"
    if reason is None and any(getattr(module, "is_causal", True) is False for module in unwrapped.modules()):
        reason = "its attention is not causal"
    if reason is None and any(
        isinstance(module, Embedding) and module.padding_idx is not None and name.endswith("position_embeddings")
        for name, module in unwrapped.named_modules()
    ):
        reason = "its positions are counted from its padding index on, as RoBERTa's are"
    if reason is not None:
        raise ValueError(
            f"model: {type(model).__name__} can't serve the exit-entropy pass at {length} tokens: {reason}; "
            f"{USE_ANOTHER}"
        )


def unsupported(config: Any, length: int) -> str | None:
    """Why a model with this Hugging Face config can't be probed at `length` tokens; None if it can."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(text, "alibi", False):
        return "it uses ALiBi positions"
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) is None and window is not None:
        layer_types = {"sliding_attention"}
    exotic = layer_types - {"full_attention", "sliding_attention"}
    if exotic:
        return f"it has layers of type {sorted(exotic)}, which keep no standard KV cache"
    if "sliding_attention" in layer_types and window is not None and window < length:
        return f"its sliding window of {window} tokens is shorter than the sequence"
    rope = getattr(text, "rope_parameters", None) or {}
    maximum = getattr(text, "max_position_embeddings", None)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or maximum
        if original is not None and length > original:
            return f"its {rope['rope_type']} rotary frequencies change with the length beyond {original} tokens"
    if not rope and maximum is not None and length > maximum:
        return f"it has learned positions for {maximum} tokens only"
    return None
