"""The format of an answer: its markers, the probe that asks for it, and how a text in it is read. Imports nothing.

    <think> reasoning </think>
    <answer> answer </answer>            (IAPO, arXiv 2602.19049, section on rewards)

The instruction of the prompts, the reward, the exit probe and the embedded task all take the format from here.
"""

THINK, EXIT_MARKER, ANSWER, ANSWER_END = MARKERS = ("<think>", "</think>", "<answer>", "</answer>")

# Ends the reasoning and asks for the answer. It is what `format_ok` wants between reasoning and answer.
PROBE = f"{EXIT_MARKER}\n{ANSWER}"


def written(reasoning: str, answer: str) -> str:
    """A text in the format."""
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
