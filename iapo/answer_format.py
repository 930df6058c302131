r"""The formats of an answer: their markers, the probe that asks for it, and how a text is read. Imports nothing heavy.

    tags     <think> reasoning </think>             (IAPO, arXiv 2602.19049, section on rewards)
             <answer> answer </answer>
    boxed    <think> reasoning </think>             (DeepSeek-R1, Qwen3: reasoning models as they are)
             any text \boxed{answer} any text
    boxed_no_think   the same without markers       (Qwen2.5-Math: the reasoning ends where the box begins)

The instruction of the prompts, the reward, the exit probe and the embedded task all take the format from here.
"""

import re
from abc import ABC, abstractmethod

THINK, EXIT_MARKER, ANSWER, ANSWER_END = MARKERS = ("<think>", "</think>", "<answer>", "</answer>")
BOX = "\\boxed{"

# Ends the reasoning and asks for the answer. It is what `format_ok` wants between reasoning and answer.
PROBE = f"{EXIT_MARKER}\n{ANSWER}"


class AnswerFormat(ABC):
    """How a completion is laid out.

    Attributes:
        name: its recipe, recipes/format/<name>.yaml.
        markers: texts that may be special tokens of a vocabulary and must survive decoding.
        opening: begins the reasoning, written by the model or, in `boxed`, by the chat template; "" if nothing does.
        exit_marker: ends the reasoning.
        probe: ends the reasoning and asks for the answer.
        answer_begin: begins the answer; an instruction that asks for the format names it.
        answer_end: ends the answer.
        instruction: what `iapo data` adds to a question.
    """

    name: str
    markers: tuple[str, ...]
    opening = THINK
    exit_marker = EXIT_MARKER
    probe: str
    answer_begin: str
    answer_end: str
    instruction: str

    @abstractmethod
    def well_formed(self, text: str) -> bool:
        """Whether a completion is laid out as asked."""

    @abstractmethod
    def answers(self, text: str) -> list[str]:
        """What a completion gives as its answers; more than one is as wrong as none."""

    @abstractmethod
    def final_answer(self, text: str, probe: str, end: str) -> str:
        """What a completion wrote where `probe` asks for it, up to `end`; "" if it wrote nothing there."""


class Tags(AnswerFormat):
    name = "tags"
    markers = MARKERS
    probe = PROBE
    answer_begin = ANSWER
    answer_end = ANSWER_END
    instruction = (
        f"Reason within {THINK} {EXIT_MARKER}, then give only the final answer within {ANSWER} {ANSWER_END}. "
        f"Your whole reply must have exactly this form:\n{THINK} ... {PROBE} ... {ANSWER_END}"
    )

    def well_formed(self, text: str) -> bool:
        return format_ok(text)

    def answers(self, text: str) -> list[str]:
        return answer_blocks(text)

    def final_answer(self, text: str, probe: str, end: str) -> str:
        return final_answer(text, probe, end)


class Boxed(AnswerFormat):
    r"""The answer is in the last `\boxed{}`, after the reasoning.

    `<think>` is opened by the chat template or by the model. What counts, for a completion with one `</think>` unless
    said otherwise:

    - a box with braces inside, `\boxed{\frac{1}{2}}`: the whole content; `\{` and `\}` are no braces of it.
    - several boxes after `</think>`: the last is the answer. Well formed only if all say the same.
    - a box that is never closed: no answer, whatever boxes come before it; not well formed.
    - boxes in the reasoning only, or no `</think>`: no answer.
    - several `</think>`: the answer is after the last one; not well formed.
    """

    name = "boxed"
    markers: tuple[str, ...] = (THINK, EXIT_MARKER)
    probe = f"\n{EXIT_MARKER}\n\n{BOX}"
    answer_begin = BOX
    answer_end = "}"
    instruction = f"Please reason step by step, and put your final answer within {BOX}}}."

    def well_formed(self, text: str) -> bool:
        reasoning, exited, after = text.strip().partition(EXIT_MARKER)
        stray = EXIT_MARKER in after or THINK in after or THINK in reasoning.removeprefix(THINK)
        return bool(exited) and not stray and _say_the_same(boxes(after))

    def answers(self, text: str) -> list[str]:
        _, exited, after = text.rpartition(EXIT_MARKER)
        return _last(boxes(after)) if exited else []

    def final_answer(self, text: str, probe: str, end: str) -> str:
        """The answer itself: prose may stand between `</think>` and the box, where the probe has none."""
        return "".join(self.answers(text))


class BoxedNoThink(Boxed):
    r"""The same for models without `<think>`: the whole completion is read, and its first box ends the reasoning."""

    name = "boxed_no_think"
    markers = ()
    opening = ""
    exit_marker = BOX
    probe = f"\n\n{BOX}"

    def well_formed(self, text: str) -> bool:
        return THINK not in text and EXIT_MARKER not in text and _say_the_same(boxes(text))

    def answers(self, text: str) -> list[str]:
        return _last(boxes(text))


FORMATS: dict[str, AnswerFormat] = {format.name: format for format in (Tags(), Boxed(), BoxedNoThink())}


def _say_the_same(contents: list[str | None]) -> bool:
    return None not in contents and len({content.strip() for content in contents if content is not None}) == 1


def _last(contents: list[str | None]) -> list[str]:
    return [content for content in contents[-1:] if content is not None]


def boxes(text: str) -> list[str | None]:
    r"""The contents of all `\boxed{...}`, in order, those inside another left out; None for one that never closes."""
    found: list[str | None] = []
    start = 0
    while (begin := text.find(BOX, start)) >= 0:
        begin += len(BOX)
        end = _closing_brace(text, begin)
        if end is None:
            return [*found, None]
        found.append(text[begin:end])
        start = end + 1
    return found


def _closing_brace(text: str, begin: int) -> int | None:
    """Where the brace closes that was opened before `begin`; a backslash takes its next character with it."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def written(reasoning: str, answer: str) -> str:
    """A text in the format `tags`."""
    return f"{THINK}{reasoning}{PROBE}{answer}{ANSWER_END}"


def format_ok(text: str) -> bool:
    """Whether `text` is `<think> ... </think>\\n<answer> ... </answer>` and nothing else.

    Source: IAPO, arXiv 2602.19049, section on rewards. Exactly: each of the four markers occurs once in the
    whole text; there is only white space before `<think>` and after `</answer>`; there is one newline, and
    nothing else, between `</think>` and `<answer>`.

    Degenerate cases: the two blocks may be empty (an empty answer is wrong, not ill-formed); a completion
    whose opening `<think>` is in the prompt is not well formed.
    """
    text = text.strip()
    return (
        all(text.count(marker) == 1 for marker in MARKERS)
        and text.startswith(THINK)
        and PROBE in text
        and text.endswith(ANSWER_END)
    )


def answer_blocks(text: str) -> list[str]:
    """The contents of all `<answer> ... </answer>` blocks, in order; a stray marker alone makes no block."""
    before_each_end = text.split(ANSWER_END)[:-1]
    return [part.rsplit(ANSWER, 1)[1] for part in before_each_end if ANSWER in part]


def extract_answer(text: str) -> str | None:
    """The content of the answer block, stripped; None where there is no block or more than one.

    Several blocks are not "the last one wins": that would pay a model for guessing more than once.
    """
    blocks = answer_blocks(text)
    return blocks[0].strip() if len(blocks) == 1 else None


def final_answer(text: str, probe: str = PROBE, end: str = ANSWER_END) -> str:
    """What the completion wrote between its last `probe` and the next `end`; "" if it lacks either."""
    _, found, rest = text.rpartition(probe)
    answer, closed, _ = rest.partition(end)
    return answer if found and closed else ""
