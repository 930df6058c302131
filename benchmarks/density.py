"""What sparser probes, another score and bf16 do to the advantage: python -m benchmarks.density

Completions of the embedded model are measured at every position, then at fewer positions, by another score, or in bf16.
The informativeness term (the gains' z-scores within a completion) and the information rate are compared with those of
full density by their rank correlation.
"""

import argparse
import random
import time
from pathlib import Path

import pandas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import iapo
from benchmarks.measure import machine, table
from iapo.advantage import masked_zscore
from iapo.answer_format import ANSWER_END, EXIT_MARKER, PROBE, final_answer
from iapo.information import exit_entropies, information_gain
from iapo.probe.packing import Completion, probe_positions
from iapo.probe.text import reasoning_length, step_ends
from iapo.tasks import verbose_arithmetic
from iapo.tasks.tiny_model import prompt_ids

TINY = Path(iapo.__file__).parent / "assets" / "tiny"


def sample(model, tokenizer, prompts: int, group: int) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """(prompt, reasoning, whole text) of `group` completions per prompt at temperature 1."""
    rng = random.Random(0)
    torch.manual_seed(0)
    rows = []
    for _ in range(prompts):
        prompt = torch.tensor(prompt_ids(tokenizer, verbose_arithmetic.sample_problem(rng)))
        output = model.generate(
            prompt[None].expand(group, -1), attention_mask=torch.ones(group, len(prompt)), do_sample=True,
            temperature=1.0, top_k=0, max_new_tokens=128,
        )  # fmt: skip
        for response in output[:, len(prompt) :]:
            response = response[response != tokenizer.pad_token_id]
            length = reasoning_length(response.tolist(), lambda ids: tokenizer.decode(ids), EXIT_MARKER)
            rows.append((prompt, response[:length], tokenizer.decode(response)))
    return [row for row in rows if len(row[1]) > 1]


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return pandas.DataFrame({"a": a.numpy(), "b": b.numpy()}).corr("spearman").iloc[0, 1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY).eval()
    rows = sample(model, tokenizer, options.prompts, options.group)
    probe_ids = tokenizer.encode(PROBE, add_special_tokens=False)
    ends = step_ends(lambda ids: tokenizer.decode(ids), model.config.vocab_size)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for _, r, _ in rows], batch_first=True)

    def measure(positions, answers=False, precise=model):
        completions = [
            Completion(
                prompt, response, positions(response),
                torch.tensor(tokenizer.encode(final_answer(text, PROBE, ANSWER_END))) if answers else None,
            )
            for prompt, response, text in rows
        ]  # fmt: skip
        start = time.perf_counter()
        values = exit_entropies(precise, completions, probe_ids)
        seconds = time.perf_counter() - start
        h = torch.stack([torch.cat([v, v[-1:].expand(mask.shape[1] + 1 - len(v))]) for v in values])
        return h, seconds, sum(len(c.positions) for c in completions)

    def everywhere(response):
        return probe_positions(len(response))

    measure(everywhere)  # warms up
    full, full_seconds, full_probes = measure(everywhere)
    gains = information_gain(full, mask)
    inside = mask.bool()

    def compare(name, h, seconds, probes):
        other = information_gain(h, mask)
        terms = [masked_zscore(g, mask)[inside] for g in (gains, other)]
        rates = [(x[:, 0] - x[:, -1]) / mask.sum(1) for x in (full, h)]
        return [
            name, f"{probes / full_probes:.2f}", f"{seconds / full_seconds:.2f}",
            f"{rank_correlation(*terms):.3f}", f"{rank_correlation(*rates):.3f}",
        ]  # fmt: skip

    table_rows = [compare("every position", full, full_seconds, full_probes)]
    for stride in (2, 4, 8, 16):
        table_rows.append(compare(f"stride {stride}", *measure(lambda r, k=stride: probe_positions(len(r), k))))
    for gap in (64, 8):
        result = measure(lambda r, gap=gap: probe_positions(len(r), boundaries=ends[r], max_gap=gap))
        table_rows.append(compare(f"boundaries, gap {gap}", *result))
    table_rows.append(compare("answer_logprob, every position", *measure(everywhere, answers=True)))
    print(f"{len(rows)} completions, {int(mask.sum())} tokens, {full_probes} probes; {machine('cpu')}")
    print(table(["probed", "probes", "seconds", "rank corr. of the term", "of the rate"], table_rows))

    half = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    rounded = information_gain(measure(everywhere, precise=half)[0], mask)
    error, exact = (rounded - gains)[inside], gains[inside]
    levels = torch.tensor([0.5, 0.9, 0.99, 1.0])
    correlation = torch.corrcoef(torch.stack([exact, rounded[inside]]))[0, 1]
    print(
        f"\nbf16 against fp32: gains' standard deviation {exact.std():.4f} nats, error's root mean square "
        f"{error.square().mean().sqrt():.4f}, correlation {correlation:.4f}"
    )
    rows_ = [
        [name, *(f"{x:.5f}" for x in values.abs().quantile(levels).tolist())]
        for name, values in (("absolute gains", exact), ("absolute errors", error))
    ]
    print(table(["nats", "median", "90%", "99%", "largest"], rows_))


if __name__ == "__main__":
    main()
