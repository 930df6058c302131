"""From a padded batch to completions.

Every error in the input is found here, before the first forward: a rank that raises later leaves the others waiting.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from iapo.probe.packing import Completion, probe_positions
from iapo.probe.supported_models import CausalLM


def completions_of(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    vocabulary: int,
    *,
    stride: int,
    boundaries: torch.Tensor | None,
    max_gap: int,
    answers: Sequence[torch.Tensor] | None,
) -> list[Completion]:
    """The B rows of a padded batch, on the CPU. Arguments as in `iapo.information.exit_entropy`.

    A completion's response is its whole row of T columns, padding included: nothing after its last position is read.

    Raises:
        ValueError: an argument has the wrong shape or a wrong value.
    """
    check_masks(input_ids, attention_mask, response_mask)
    B, S = input_ids.shape
    T = response_mask.shape[1]
    unknown = input_ids[attention_mask.bool() & ((input_ids < 0) | (input_ids >= vocabulary))]
    if len(unknown):
        raise ValueError(f"input_ids: {unknown[0].item()} must be one of the model's 0 to {vocabulary - 1}.")
    check_positive("stride", stride)
    check_positive("max_gap", max_gap)
    if boundaries is not None and boundaries.shape != response_mask.shape:
        raise ValueError(
            f"boundaries: shape {tuple(boundaries.shape)} must be response_mask's {tuple(response_mask.shape)}."
        )
    if answers is not None and len(answers) != B:
        raise ValueError(f"answers: {len(answers)} of them for {B} completions; give one each.")
    completions = []
    attended, ids, lengths = attention_mask.bool().cpu(), input_ids.cpu(), last_valid(response_mask).tolist()
    for b in range(B):
        prompt, response = ids[b, : S - T][attended[b, : S - T]], ids[b, S - T :]
        ends = None if boundaries is None else boundaries[b].cpu()
        answer = None if answers is None else answer_tensor(answers[b], vocabulary)
        completions.append(Completion(prompt, response, probe_positions(lengths[b], stride, ends, max_gap), answer))
    return completions


def check_masks(input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor) -> None:
    """Refuse wrong shapes, values other than 0 and 1, empty prompts and padding on the wrong side.

    Raises:
        ValueError: names the argument, its value and the fix.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: shape {tuple(input_ids.shape)} must be (B, S).")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} must equal input_ids' (B, S) = "
            f"{tuple(input_ids.shape)}."
        )
    B, S = input_ids.shape
    if response_mask.ndim != 2 or response_mask.shape[0] != B or response_mask.shape[1] > S:
        raise ValueError(f"response_mask: shape {tuple(response_mask.shape)} must be (B, T) with B = {B}, T <= {S}.")
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        others = mask[(mask != 0) & (mask != 1)]
        if len(others):
            raise ValueError(f"{name}: holds {others[0].item()}; it must be 0 or 1 everywhere.")
    T = response_mask.shape[1]
    prompt, response = attention_mask.bool().split([S - T, T], dim=1)
    refuse_rows(
        ~prompt.any(1, keepdim=True), "attention_mask: the prompt of row {} has no token; give it at least one."
    )
    refuse_rows(prompt[:, :-1] & ~prompt[:, 1:], "attention_mask: the prompt of row {} must be left-padded.")
    refuse_rows(~response[:, :-1] & response[:, 1:], "attention_mask: the response of row {} must be right-padded.")
    refuse_rows(response_mask.bool() & ~response, "response_mask: row {} is 1 where attention_mask is 0; set it to 0.")


def refuse_rows(wrong: torch.Tensor, message: str) -> None:
    """Raise ValueError with the message and the number of the first row that is wrong somewhere; wrong is (B, ...)."""
    rows = wrong.flatten(1).any(1).nonzero()
    if len(rows):
        raise ValueError(message.format(int(rows[0])))


def check_positive(name: str, value: int) -> None:
    """Refuse what is no integer of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {value!r} must be an integer of at least 1.")


def probe_tensor(probe_ids: Sequence[int] | torch.Tensor, vocabulary: int) -> torch.Tensor:
    """(P,) the probe's tokens, on the CPU.

    Raises:
        ValueError: there are none, or one is not in the vocabulary.
    """
    probe_P = torch.as_tensor(probe_ids).long().cpu()
    if probe_P.ndim != 1 or len(probe_P) == 0 or probe_P.min() < 0 or probe_P.max() >= vocabulary:
        raise ValueError(f"probe_ids: {probe_P.tolist()} must be a non-empty list of ids of 0 to {vocabulary - 1}.")
    return probe_P


def answer_tensor(answer: Sequence[int] | torch.Tensor, vocabulary: int) -> torch.Tensor:
    """(A,) an answer's tokens, on the CPU; it may be empty.

    Raises:
        ValueError: one is not in the vocabulary.
    """
    answer_A = torch.as_tensor(answer).long().cpu()
    if answer_A.ndim != 1 or (len(answer_A) and not 0 <= int(answer_A.min()) <= int(answer_A.max()) < vocabulary):
        raise ValueError(f"answers: {answer_A.tolist()} must be a list of ids of 0 to {vocabulary - 1}.")
    return answer_A


def vocabulary_size(model: CausalLM) -> int:
    """Token ids that the model knows: 0 to this number - 1."""
    return model.config.get_text_config(decoder=True).vocab_size


def last_valid(response_mask: torch.Tensor) -> torch.Tensor:
    """(B,) number of response tokens up to and including a row's last 1; 0 without one."""
    ends = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return F.pad(response_mask.long() * ends, (1, 0)).amax(1)
