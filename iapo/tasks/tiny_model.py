"""The embedded models: a Qwen2 of 0.6 million parameters each, fine-tuned on an embedded task on a CPU.

    python -m iapo.tasks.tiny_model --out DIR [--task NAME] [--steps N] [--seed S]

writes tokenizer and model, then prints an evaluation by sampling at temperature 1. After the default number of steps
the model reasons in the right form but still makes mistakes: reinforcement learning can gain accuracy and save length.

Shapes: B sequences, L tokens (prompt and completion).
"""

import argparse
import math
import random
import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import Qwen2Tokenizer
from transformers.tokenization_utils_base import AddedToken

from iapo.answer_format import MARKERS
from iapo.tasks.embedded import TASKS, Problem, Task

# Qwen's own names: verl's Qwen chat handling looks up "<|im_end|>", and Qwen2Tokenizer adds "<|endoftext|>",
# its default unknown token, to a vocabulary that lacks it.
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# A system or tool message is left out: the vocabulary has no words for it. The newline after an assistant
# turn is the one that verl's Qwen chat handling inserts between turns.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '" + BOS + "' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + '" + EOS + "\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

DEFAULT = "verbose_arithmetic"
BATCH = 64
PEAK_LR = 2e-3
WARMUP = 100
MAX_NEW_TOKENS = 128
IGNORED = -100  # the label that the cross entropy leaves out


def build_tokenizer(task: Task = TASKS[DEFAULT]) -> Qwen2Tokenizer:
    """A byte-level tokenizer of the task's words and characters; what is outside its vocabulary is dropped."""
    newline_as_byte = {"\n": "Ċ"}  # how byte-level BPE spells the newline
    words = MARKERS + task.WORDS
    symbols = [newline_as_byte.get(c, c) for c in task.CHARACTERS]
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *words, *symbols])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    # Not special: rewards read text decoded with skip_special_tokens=True, and it has to show the markers.
    tokenizer.add_tokens([AddedToken(w, normalized=False, special=False) for w in words])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """An untrained model in fp32; initialisation follows torch's global seed."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem, task: Task = TASKS[DEFAULT]) -> list[int]:
    messages = [{"role": "user", "content": task.prompt(problem)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def lesson_ids(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """The ids of a completion in pieces, EOS included, and their labels: IGNORED where a piece has no loss."""
    ids, labels = [], []
    for text, has_loss in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += piece if has_loss else [IGNORED] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def make_batch(
    tokenizer: PreTrainedTokenizerBase, rng: random.Random, size: int, task: Task = TASKS[DEFAULT], step: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """New problems with traces: `input_ids_BL` and `labels_BL`, right-padded.

    Prompts have no label, nor have the pieces of a trace that training has no loss on.
    """
    rows = []
    for _ in range(size):
        problem, pieces = task.lesson(rng, step)
        rows.append((prompt_ids(tokenizer, problem, task), *lesson_ids(tokenizer, pieces)))
    longest = max(len(p) + len(c) for p, c, _ in rows)
    input_ids_BL = torch.full((size, longest), tokenizer.pad_token_id)
    labels_BL = torch.full((size, longest), IGNORED)
    for i, (p, c, labels) in enumerate(rows):
        input_ids_BL[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels_BL[i, len(p) : len(p) + len(c)] = torch.tensor(labels)
    return input_ids_BL, labels_BL


def learning_rate(step: int, schedule: int) -> float:
    """Linear warm-up over WARMUP steps, times a cosine from PEAK_LR to 0 over `schedule` steps."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / schedule))


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, steps: int, seed: int) -> None:
    """Supervised fine-tuning in place, on problems that are drawn anew for every batch."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.SCHEDULE)
        input_ids_BL, labels_BL = make_batch(tokenizer, rng, BATCH, task, step)
        # Padding is on the right, where a causal model cannot see it, so no attention mask is needed.
        loss = model(input_ids=input_ids_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            left = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {left:.0f} s left", flush=True)


class Completion(NamedTuple):
    """What a model wrote: the text without special tokens, its tokens with EOS, whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], seed: int, task: Task
) -> list[Completion]:
    """One completion per problem, sampled at temperature 1, top_p 1, at most MAX_NEW_TOKENS tokens."""
    model.eval()
    torch.manual_seed(seed)
    completions = []
    for start in range(0, len(problems), 256):
        chunk = problems[start : start + 256]
        padded = tokenizer.pad(
            {"input_ids": [prompt_ids(tokenizer, p, task) for p in chunk]}, padding_side="left", return_tensors="pt"
        )
        output_BL = model.generate(
            **padded, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS
        )
        for ids in output_BL[:, padded["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in ids
            length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
            completions.append(Completion(tokenizer.decode(ids[:length], skip_special_tokens=True), length, ended))
    return completions


def evaluate(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: int = 512,
    seed: int = 1_000_003,
    task: Task = TASKS[DEFAULT],
) -> dict[str, float]:
    """The figures of one completion per held-out prompt.

    Returns rates in [0, 1] and lengths in tokens, EOS included:

    - `accuracy`: the form is exact and the answer is right
    - `format`: the form is exact and the completion ended by itself
    - `truncated`: the completion did not end within the limit
    - `tokens`, `minimum`, `ratio`: mean length, mean length of the shortest traces, their quotient
    """
    rng = random.Random(seed)
    problems = [task.sample_problem(rng) for _ in range(prompts)]
    completions = complete(model, tokenizer, problems, seed, task)
    answers = [task.extract_answer(completion.text) if completion.ended else None for completion in completions]
    right = [answer == task.answer(problem) for answer, problem in zip(answers, problems, strict=True)]
    tokens = fmean(completion.tokens for completion in completions)
    minimum = fmean(map(task.minimal_tokens, problems))
    return {
        "accuracy": fmean(right),
        "format": fmean(answer is not None for answer in answers),
        "truncated": fmean(not completion.ended for completion in completions),
        "tokens": tokens,
        "minimum": minimum,
        "ratio": tokens / minimum,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m iapo.tasks.tiny_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the tokenizer and the model")
    parser.add_argument("--task", choices=TASKS, default=DEFAULT, help=f"default {DEFAULT}")
    defaults = ", ".join(f"{task.STEPS} of {task.SCHEDULE} for {name}" for name, task in TASKS.items())
    parser.add_argument("--steps", type=int, help=f"optimiser steps, at most the schedule's (default {defaults})")
    parser.add_argument("--seed", type=int, default=0, help="initialisation and training data (default 0)")
    parser.add_argument("--eval-prompts", type=int, default=1024, help="held-out prompts (default 1024)")
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    steps = task.STEPS if options.steps is None else options.steps
    if not 1 <= steps <= task.SCHEDULE:
        parser.error(f"--steps: {steps} must be from 1 to {task.SCHEDULE}, the length of the schedule")
    if options.eval_prompts < 1:
        parser.error(f"--eval-prompts: {options.eval_prompts} must be at least 1")

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer(task)
    model = build_model(tokenizer)
    train(model, tokenizer, task, steps, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"wrote {options.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for name, value in evaluate(model, tokenizer, options.eval_prompts, task=task).items():
        print(f"{name:>10}  {value:.3f}")


if __name__ == "__main__":
    main()
