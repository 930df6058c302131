"""Teach a model the answer format before RL: iapo warmup MODEL_DIR [--data NAME] [--out DIR] [key=value ...]

A model that never writes the format gets equal rewards for all its completions, so it can't learn. This fine-tunes it
on solutions of a train split, rewritten as <think>reasoning</think> and <answer>answer</answer>, with the instruction
that iapo data writes. verl's own supervised trainer does the work, on the CPU. DIR is then a Hugging Face folder, whole
or absent: iapo train model=DIR.

--data gsm8k   the reasoning is GSM8K's solution
--data svamp   the reasoning is SVAMP's equation

key=value sets any key of recipes/warmup.yaml or of verl's trainer, e.g. optim.lr=1e-5 trainer.total_epochs=2.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from iapo.answer_format import FORMATS, written
from iapo.arguments import Parser
from iapo.data.originals import ORIGINALS
from iapo.data.read import WHOLE, parse_rows, read_source
from iapo.data.write import to_rows
from iapo.launch.check_files import not_loaded, weight_problems
from iapo.launch.check_template import failure, template_file
from iapo.launch.machine import cpu_environment
from iapo.tools.export import export
from iapo.tools.folder import check_out


def gsm8k(row: dict, answer: str) -> str:
    """A solution without its calculator's notes `<<6*2=12>>` and without the final `#### 12`."""
    return re.sub(r"<<.*?>>", "", row["answer"].rpartition("####")[0]).strip()


def svamp(row: dict, answer: str) -> str:
    """`( 8.0 - ( 2.0 + 1.0 ) )` and 5 as `8 - (2 + 1) = 5`."""
    equation = re.sub(r"\.0(?!\d)", "", row["Equation"]).strip()
    if equation.startswith("(") and equation.endswith(")"):
        equation = equation[1:-1].strip()
    return f"{equation.replace('( ', '(').replace(' )', ')')} = {answer}"


# By data set: the reasoning of a row, given its answer.
REASONING = {"gsm8k": gsm8k, "svamp": svamp}


def conversations(name: str, source: str | None) -> Iterator[list[dict]]:
    """A train split as chats: the prompt that `iapo data` writes, and a solution in the format.

    Raises:
        ValueError: a row that can't be read.
    """
    original = ORIGINALS[name]
    splits = read_source(name, original, source)
    rows = list(splits.get("train", splits.get(WHOLE, ())))
    examples = list(parse_rows(rows, original, f"{source or original.hub_id} (train)"))
    if WHOLE in splits:
        examples, _ = original.divide(examples, 0)
    for example, made in zip(examples, to_rows(examples, name, "train", FORMATS["tags"].instruction), strict=True):
        reasoning = REASONING[name](rows[example.index], example.answer)
        yield [*made["prompt"], {"role": "assistant", "content": written(reasoning, example.answer)}]


def fitting(chats: Iterator[list[dict]], tokenizer, max_tokens: int) -> Iterator[tuple[list[dict], int]]:
    """The chats whose answer has at most `max_tokens` tokens, its end included, each with the tokens of the whole.

    Raises:
        ValueError: the chat template writes another text than the answer after the prompt.
    """
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        if not text.startswith(prompt + chat[-1]["content"]):
            raise ValueError(
                "MODEL_DIR: its chat template writes other text than the answer after the prompt, so the model would "
                "learn another format; use a template that leaves answers as they are."
            )
        before, whole = (len(tokenizer.encode(part, add_special_tokens=False)) for part in (prompt, text))
        if whole - before <= max_tokens:
            yield chat, whole


def configuration(overrides: list[str]):
    """The recipe of a warm start.

    Raises:
        ValueError: a key or value that Hydra refuses.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from iapo.launch.compose import explain, recipes_dir

    try:
        with initialize_config_dir(str(recipes_dir()), version_base=None):
            return compose("warmup", overrides=overrides)
    except HydraException as error:
        where = "see recipes/warmup.yaml and verl's sft_trainer_engine.yaml."
        raise ValueError(explain(str(error), "warmup", where)) from None


def train(config) -> None:
    """verl's supervised trainer in this process.

    verl's `run_sft` names the CPU's backend twice, which torch refuses, so the process group is made here.
    """
    import torch.distributed as dist
    from verl.trainer.sft_trainer import SFTTrainer

    from iapo.verl_adapter.cpu import use_all_cores

    use_all_cores(ranks=1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            SFTTrainer(config).fit()
        finally:
            dist.destroy_process_group()


def warm_up(
    model: Path, out: Path, data: str, source: str | None, examples: int, max_tokens: int, overrides: list[str]
) -> tuple[int, float]:
    """Fine-tune the model of a folder, and write it to `out`.

    Args:
        data: a key of `REASONING`.
        source: as `iapo data` takes it.
        examples: at most so many.
        max_tokens: of an answer, its end included.
        overrides: keys of the recipe.

    Returns:
        Steps, and their seconds.

    Raises:
        ValueError: in one line, what can't be read or doesn't fit.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of transformers or of its libraries
        raise ValueError(not_loaded("MODEL_DIR", str(model), "tokenizer", error)) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"MODEL_DIR: {model} has a tokenizer without eos_token; add it to its configuration.")
    if not tokenizer.chat_template:
        raise ValueError(f"MODEL_DIR: {model} has a tokenizer without a chat template; add chat_template.jinja.")
    if reason := failure(partial(tokenizer.apply_chat_template, tokenize=False)):
        raise ValueError(
            f"MODEL_DIR: the chat template of {model} fails on any prompt ({reason}); correct {template_file(model)}."
        )
    chosen = list(islice(fitting(conversations(data, source), tokenizer, max_tokens), examples))
    for problem in weight_problems("MODEL_DIR", model):
        raise ValueError(problem)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        work = Path(name)
        longest = max((tokens for _, tokens in chosen), default=0)
        settings = {"model.path": str(model.absolute()), "data.train_files": f"{work}/train.parquet"}
        settings |= {"data.max_length": longest, "trainer.default_local_dir": name}
        own = [*settings, "trainer.save_freq", "trainer.resume_mode"]
        if taken := [override for override in overrides if override.lstrip("+").partition("=")[0] in own]:
            raise ValueError(f"{taken[0]}: is set by iapo warmup itself; leave it out.")
        config = configuration([*(f"{key}={value!r}" for key, value in settings.items()), *overrides])
        if len(chosen) < config.data.train_batch_size:
            raise ValueError(
                f"--examples: {len(chosen)} of at most {max_tokens} tokens are fewer than data.train_batch_size="
                f"{config.data.train_batch_size}; raise --max-tokens or --examples, or lower data.train_batch_size."
            )
        pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat, _ in chosen]), work / "train.parquet")
        start = time.monotonic()
        train(config)
        seconds = time.monotonic() - start
        (step,) = work.glob("global_step_*")
        export(list(step.glob("model_world_size_1_rank_0.pt")), out)
        return int(step.name.removeprefix("global_step_")), seconds


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing written, with the reason in one line."""
    parser = Parser(prog="iapo warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a Hugging Face folder, as iapo model writes it")
    parser.add_argument("--data", default="svamp", help=f"{', '.join(REASONING)} (default svamp)")
    parser.add_argument("--source", help="of the data, as iapo data takes it (default: the original on the hub)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: MODEL_DIR-warm")
    parser.add_argument("--examples", type=int, default=256, help="the first ones that fit (default 256)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer, its end included (default 96)")
    # Without a default argparse names it as required where MODEL_DIR is missing.
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[])
    options = parser.parse_intermixed_args(arguments)
    out = options.out or options.model.with_name(f"{options.model.name}-warm")
    try:
        if not options.model.is_dir():
            raise ValueError(f"MODEL_DIR: {options.model} is no folder; make it with iapo model, or give another.")
        if options.data not in REASONING:
            raise ValueError(f"--data: {options.data!r} must be one of {', '.join(REASONING)}.")
        check_out(out)
        # Before verl is imported, which reads them. The process group needs no port, but verl reads one.
        os.environ.update(cpu_environment(os.environ))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        chosen = (options.data, options.source, options.examples, options.max_tokens)
        steps, seconds = warm_up(options.model, out, *chosen, options.overrides)
    except (ValueError, OSError) as error:
        print(f"iapo.warmup: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"iapo warmup: {steps} steps in {seconds:.0f} s: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
