"""Probes as a tokenizer would write them after the text before.

A probe is appended as tokens of its own. Many tokenizers write the same text with other tokens, because one of theirs
spans the join: `.` and `</` are one token `.</` for Qwen2.5 and Llama 3. The policy never sees `.`, `</` in its own
text. So the last token of the prefix is taken back and written together with the probe.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from iapo.probe.measure import interpolate
from iapo.probe.packing import Completion


class Part(NamedTuple):
    """Some of a completion's probes.

    Attributes:
        completion: with these alone.
        numbers: of their positions in the whole.
    """

    completion: Completion
    numbers: list[int]


class Joins:
    """How the probe is written after a token.

    Args:
        encode: text -> token ids, without special tokens around them.
        decode: token ids -> text.
        probe: its text.
    """

    def __init__(self, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], probe: str):
        self._encode, self._decode, self._probe = encode, decode, probe
        self._alone = encode(probe)
        self._known: dict[int, torch.Tensor | None] = {}

    def rewritten(self, token: int) -> torch.Tensor | None:
        """The tokens of this token's text and the probe; None where these are the token and the probe's own tokens.

        A token that its own text doesn't give back, such as a part of a character, is left as it is.
        """
        if token not in self._known:
            text = self._decode([token])
            together = self._encode(text + self._probe)
            plain = together == [token, *self._alone] or self._encode(text) != [token]
            self._known[token] = None if plain else torch.tensor(together)
        return self._known[token]

    def parts(self, completion: Completion) -> list[Part]:
        """A completion as several, each with probes of one length. The one with the longest trajectory comes first.

        At position 0 the probe is plain: a completion begins with tokens of its own whatever the prompt ends with.
        """
        groups: dict[int | None, list[int]] = {}
        written: dict[int, torch.Tensor] = {}
        for j, t in enumerate(completion.positions.tolist()):
            tokens = self.rewritten(int(completion.response[t - 1])) if t else None
            if tokens is not None:
                written[j] = tokens
            groups.setdefault(None if tokens is None else len(tokens), []).append(j)
        parts = []
        for length, numbers in groups.items():
            positions = completion.positions[numbers]
            if length is None:
                parts.append(Part(completion._replace(positions=positions), numbers))
            else:
                suffixes = torch.stack([written[j] for j in numbers])
                parts.append(Part(completion._replace(positions=positions - 1, suffixes=suffixes), numbers))
        return sorted(parts, key=lambda part: -int(part.completion.positions[-1]))


def rejoined(whole: Completion, parts: Sequence[Part], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(R + 1,) the values of a completion from those of its parts."""
    probed = torch.zeros(len(whole.positions))
    for part, h in zip(parts, values, strict=True):
        probed[part.numbers] = h[part.completion.positions]
    return interpolate(probed, whole.positions, len(whole.response))


def measured(
    completions: Sequence[Completion],
    joins: Joins | None,
    measure: Callable[[Sequence[Completion]], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """What `measure` gives for completions whose probes are written as `joins` says; None: all are the same tokens."""
    if joins is None:
        return measure(completions)
    parts = [joins.parts(completion) for completion in completions]
    values = iter(measure([part.completion for some in parts for part in some]))
    return [rejoined(whole, some, [next(values) for _ in some]) for whole, some in zip(completions, parts, strict=True)]
