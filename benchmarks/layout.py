"""Forms of the paper's score that read through layout, for `python -m benchmarks.real_traces --layout`.

On natural text the first token after the probe is often layout, such as a blank or an opening bracket. With p(v) the
distribution of the next token after the probe, L the tokens that are layout, and p(v | l) that of the token after
probe and l, the forms are entropies, in nats, of

    first token              p(v)                                         the paper's
    no layout                p(v) for v outside L, divided by its sum
    a digit                  p(v) for v that begin with a digit, divided by its sum
    after likeliest layout   p(v | l), l the likeliest of L at the position
    after the layout at t=0  p(v | l_1 l_2 ..), the most likely tokens at the trace's start as long as they are layout
    first no layout          p(v) + sum_l p(l) p(v | l) for v outside L, divided by its sum; l over the likeliest of L
    first digit              the same for v that begin with a digit
    probe ...                p(v) after a probe that goes on with a text of ours; `a digit` of it, as above

Shape suffixes: J positions, V vocabulary, K layout tokens.
"""

from collections.abc import Callable, Sequence

import torch

from iapo.answer_format import PROBE
from iapo.probe.attention import cascade_attention
from iapo.probe.packing import Completion, forwards_of_pack, packs
from iapo.probe.text import decode

# Layout tokens that are read through at a position, and the most that are read one after the other.
LIKELIEST, LONGEST = 4, 3
OPENINGS = ("\n", "The answer is ")
MAX_TOKENS = 2048


def is_layout(text: str) -> bool:
    """Whether a token's text has no letter and no digit. What opens a tag, such as `</answer>`, is no layout."""
    return bool(text) and not any(character.isalnum() or character == "<" for character in text)


def begins_with_digit(text: str) -> bool:
    return text.strip()[:1].isdigit()


def kinds(tokenizer, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(V,) twice: which tokens are layout, and which begin with a digit. Special tokens are neither."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = len(tokenizer)  # which takes milliseconds
    texts = [decode(tokenizer, [i]) if i < known and i not in special else "" for i in range(vocabulary)]
    return torch.tensor([*map(is_layout, texts)]), torch.tensor([*map(begins_with_digit, texts)])


def entropy_within(p_JV: torch.Tensor, kept_V: torch.Tensor) -> torch.Tensor:
    """(J,) nats: entropy of p given that the token is one of `kept`."""
    q_JV = p_JV * kept_V
    return torch.special.entr(q_JV / q_JV.sum(-1, keepdim=True)).sum(-1)


def through(p_JV: torch.Tensor, layout_JK: torch.Tensor, after_JKV: torch.Tensor) -> torch.Tensor:
    """(J, V) p(v) + sum_k p(l_k) p(v | l_k): where v is no layout, it comes first or right after one of these K."""
    return p_JV + (p_JV.gather(1, layout_JK)[..., None] * after_JKV).sum(1)


def next_tokens(model, completions: Sequence[Completion]) -> list[torch.Tensor]:
    """(J_i, V) each, float64: the distribution of the next token after every suffix, by the packed pass."""
    found = []
    unused = torch.zeros(1, dtype=torch.long)  # all completions have suffixes
    with torch.no_grad(), cascade_attention(model) as attention:
        for groups in packs(completions, MAX_TOKENS):
            for forward in forwards_of_pack(completions, groups, unused, MAX_TOKENS):
                output = attention.forward(*forward[:3], forward.scored, forward.stored)
                if forward.scored is not None:
                    found.append(output.logits[0].double().softmax(-1))
    return list(torch.cat(found).split([len(completion.positions) for completion in completions]))


def forms(
    model, encode: Callable[[str], list[int]], completion: Completion, layout_V: torch.Tensor, digit_V: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(J,) of every form, and of the probabilities that they rest on.

    Args:
        encode: text -> token ids.
        completion: with the positions to probe, without answer.
        layout_V, digit_V: which tokens are layout, and which begin with a digit.
    """
    J = len(completion.positions)

    def after(ids: torch.Tensor) -> Completion:
        return completion._replace(suffixes=ids.expand(J, -1))

    probe = torch.tensor(encode(PROBE))
    (p_JV,) = next_tokens(model, [after(probe)])
    p_layout_JK, layout_JK = (p_JV * layout_V).topk(LIKELIEST)
    pinned, start = probe, completion._replace(positions=completion.positions[:1])
    p_V = p_JV[0]
    for _ in range(LONGEST):
        if not layout_V[best := int(p_V.argmax())]:
            break
        pinned = torch.cat([pinned, torch.tensor([best])])
        p_V = next_tokens(model, [start._replace(suffixes=pinned[None])])[0][0]
    found = next_tokens(
        model,
        [after(torch.cat([probe.expand(J, -1), l_J[:, None]], 1)) for l_J in layout_JK.T]
        + [after(pinned), *(after(torch.tensor(encode(PROBE + opening))) for opening in OPENINGS)],
    )
    after_JKV, at_start_JV, opened = torch.stack(found[:LIKELIEST], 1), found[LIKELIEST], found[LIKELIEST + 1 :]
    mixed_JV = through(p_JV, layout_JK, after_JKV)
    every_V = torch.ones_like(layout_V)
    values = {
        "first token (paper)": entropy_within(p_JV, every_V),
        "no layout": entropy_within(p_JV, ~layout_V),
        "a digit": entropy_within(p_JV, digit_V),
        "after likeliest layout": entropy_within(after_JKV[:, 0], every_V),
        "after the layout at t=0": entropy_within(at_start_JV, every_V),
        "first no layout": entropy_within(mixed_JV, ~layout_V),
        "first digit": entropy_within(mixed_JV, digit_V),
    }
    for opening, q_JV in zip(OPENINGS, opened, strict=True):
        values[f"probe + {opening!r}"] = entropy_within(q_JV, every_V)
        values[f"probe + {opening!r}, a digit"] = entropy_within(q_JV, digit_V)
    masses = {
        "layout": p_JV[:, layout_V].sum(1),
        f"its {LIKELIEST} likeliest": p_layout_JK.sum(1),
        "digit": p_JV[:, digit_V].sum(1),
        "digit, through these": mixed_JV[:, digit_V].sum(1),
    } | {f"digit after {opening!r}": q_JV[:, digit_V].sum(1) for opening, q_JV in zip(OPENINGS, opened, strict=True)}
    return values, masses
