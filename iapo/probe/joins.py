"""Probes and answers as a tokenizer would write them after the text before.

A probe is appended as tokens of its own. Many tokenizers write the same text with other tokens, because one of theirs
spans the join: `.` and `</` are one token `.</` for Qwen2.5 and Llama 3. The policy never sees `.`, `</` in its own
text. So the last token of the prefix is taken back and written together with the probe.

The join of the probe and an answer is the same thing: `{` and `\\frac` are `{\\`, `frac` for SmolLM2. So the tokens
that both writings of the probe begin with are the probe, and what follows is scored.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from iapo.probe.measure import interpolate
from iapo.probe.packing import Completion

# Enough for the tokens of some batches; with an answer each is one more.
KNOWN_JOINS = 2**16


class Part(NamedTuple):
    """Some of a completion's probes.

    Attributes:
        completion: with these alone.
        numbers: of their positions in the whole.
    """

    completion: Completion
    numbers: list[int]


class Join(NamedTuple):
    """How a probe and an answer are written after a prefix.

    Attributes:
        probe: its tokens; with `takes_last` those that replace the prefix's last token too.
        answer: the tokens to score. None: there is no answer.
    """

    probe: tuple[int, ...]
    answer: tuple[int, ...] | None
    takes_last: bool


class Joins:
    """How the probe is written after a token, and an answer after it.

    Args:
        encode: text -> token ids, without special tokens around them.
        decode: token ids -> text.
        probe: its text.
        natural: False: the probe is written apart from the prefix, and joined with the answer alone.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        probe: str,
        natural: bool = True,
    ):
        self._encode, self._decode, self._probe, self._natural = encode, decode, probe, natural
        self._alone = tuple(encode(probe))
        self.join = lru_cache(KNOWN_JOINS)(self._join)

    def _join(self, last: int | None, answer: tuple[int, ...] | None) -> Join:
        """The probe and the answer's text after the prefix's last token; None: after an empty prefix.

        A token that its own text doesn't give back, such as a part of a character, is left as it is. An answer that
        changes even the first of the tokens before it is written apart.
        """
        before = "" if last is None or not self._natural else self._decode([last])
        if before and self._encode(before) != [last]:
            before = ""
        probe, rest = tuple(self._encode(before + self._probe)), answer
        if answer:
            text = self._decode(answer)
            together = tuple(self._encode(before + self._probe + text))
            shared = common_start(probe, together)
            probe, rest = (together[:shared], together[shared:]) if shared else (probe, tuple(self._encode(text)))
        if before and probe[0] == last and len(probe) > 1:
            return Join(probe[1:], rest, takes_last=False)
        return Join(probe, rest, takes_last=bool(before))

    def parts(self, completion: Completion) -> list[Part]:
        """A completion as several, whose probes have one length and one answer. The longest trajectory comes first.

        At position 0 the probe is plain: a completion begins with tokens of its own whatever the prompt ends with.
        """
        answer = None if completion.answer is None else tuple(completion.answer.tolist())
        if not self._natural:  # the same join everywhere
            count = len(completion.positions)
            return [self._part(completion, list(range(count)), [self.join(None, answer)] * count)]
        groups: dict[tuple, tuple[list[int], list[Join]]] = {}
        for j, t in enumerate(completion.positions.tolist()):
            join = self.join(int(completion.response[t - 1]) if t else None, answer)
            key = join.probe == self._alone, len(join.probe), join.answer, join.takes_last
            numbers, joins = groups.setdefault(key, ([], []))
            numbers.append(j)
            joins.append(join)
        parts = [self._part(completion, *members) for members in groups.values()]
        return sorted(parts, key=lambda part: -int(part.completion.positions[-1]))

    def _part(self, completion: Completion, numbers: list[int], joins: Sequence[Join]) -> Part:
        """The positions `numbers`, whose joins differ in nothing but the probe's tokens."""
        probe, answer, takes_last = joins[0]
        plain = probe == self._alone and not takes_last
        part = completion._replace(
            positions=completion.positions[numbers] - int(takes_last),
            answer=None if answer is None else torch.tensor(answer, dtype=torch.long),
            suffixes=None if plain else torch.tensor([join.probe for join in joins]),
        )
        return Part(part, numbers)


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two sequences begin with in common."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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
