"""The parts of scripts/gpu_check.sh: python -m benchmarks.gpu_check machine | exactness | speed --length T

Each part prints Markdown and, with --json FILE, appends its numbers to that file, one JSON object per row. It needs
torch and transformers alone. `--quick` takes tiny sizes, for a CPU.
"""

import argparse
import json
import platform
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
import transformers

from benchmarks.exit_entropy import (
    COPIES,
    FLOOR,
    ON_KEYS,
    PROBE_FLOOR,
    PROMPT,
    WITH_CACHE,
    make_completions,
    make_model,
    methods,
    pushed_tokens,
)
from benchmarks.kv_copies import exit_entropy_by_copies
from benchmarks.measure import interleaved, peak_mib, table
from iapo.information import check_exactness, exit_entropy, exit_entropy_naive

PROBE = torch.arange(1, 7)
EMBEDDED = Path(__file__).parent.parent / "iapo" / "assets" / "tiny"
PACKAGES = ("torch", "transformers", "triton", "pytest", "hypothesis", "verl", "vllm", "ray", "flash-attn")
# Nats by which the pass and plain forwards may differ at any position in float32.
ALLOWED = 1e-3
# Chunks of positions at which the KV copies are timed. All of a long response would take minutes.
SAMPLED_CHUNKS = 8


def machine(device: str) -> list[dict]:
    """GPU, Python and package versions."""
    rows = [{"what": "device", "value": f"CPU ({platform.machine()})"}]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows[0]["value"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        rows.append({"what": "CUDA of torch", "value": str(torch.version.cuda)})
    rows.append({"what": "python", "value": platform.python_version()})
    for name in PACKAGES:
        try:
            rows.append({"what": name, "value": metadata.version(name)})
        except metadata.PackageNotFoundError:
            rows.append({"what": name, "value": "not installed"})
    return rows


def exactness(device: str, quick: bool) -> list[dict]:
    """The pass against plain forwards, in nats, on random text: a large random model and the embedded one.

    `ours - naive` is the pass against `exit_entropy_naive` in the same dtype. The last two columns compare either with
    plain forwards in float32: the pass must not add to the rounding of bf16. `spread` is the standard deviation of
    the entropies themselves.

    Raises:
        ValueError: as `check_exactness`; or an entropy differs by more than `ALLOWED` in float32; or in bf16 the pass
            is further from float32 than twice what plain forwards are.
    """
    rows = []
    shape = "small" if quick else "qwen2.5-0.5b"
    for name, load in (
        (shape, partial(make_model, shape, device)),
        ("embedded", lambda: transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED).to(device).eval()),
    ):
        model = load().float()
        batch = random_batch(model.config.vocab_size, 12 if quick else 48, device)
        in_float32 = exit_entropy_naive(model, *batch, PROBE)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            mean = check_exactness(model, PROBE, device=device)
            ours, naive = exit_entropy(model, *batch, PROBE), exit_entropy_naive(model, *batch, PROBE)
            errors = {
                "ours - naive, largest": (ours - naive).abs().max().item(),
                "naive - float32, mean": (naive - in_float32).abs().mean().item(),
                "ours - float32, mean": (ours - in_float32).abs().mean().item(),
            }
            label = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            rows.append({**label, "spread": in_float32.std().item(), "check_exactness, mean": mean, **errors})
            where = f"{name}, {label['dtype']}"
            largest, of_naive, of_ours = errors.values()
            if dtype == torch.float32 and not largest <= ALLOWED:
                raise ValueError(f"{where}: pass and plain forwards differ by {largest:.2g} nats, more than {ALLOWED}.")
            if dtype != torch.float32 and not of_ours <= 2 * of_naive + ALLOWED:
                raise ValueError(
                    f"{where}: the pass is {of_ours:.2g} nats from float32, plain forwards {of_naive:.2g}."
                )
    return rows


def random_batch(vocabulary: int, T: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and response mask of two random completions of one prompt, the second half as long."""
    prompt = 16
    ids = torch.randint(vocabulary, (2, prompt + T), generator=torch.Generator().manual_seed(0))
    ids[1, :prompt] = ids[0, :prompt]
    mask = torch.ones_like(ids)
    mask[1, prompt + T // 2 :] = 0
    return ids.to(device), mask.to(device), mask[:, prompt:].to(device)


def speed(device: str, quick: bool, T: int) -> list[dict]:
    """Seconds and peak memory of the pass, its floors and the KV copies; see `benchmarks.exit_entropy` for the columns.

    The copies are timed at `SAMPLED_CHUNKS` chunks of positions, spread evenly; the seconds are scaled up to all
    positions. Their chunk size is the one with the fewest seconds per position.
    """
    shape = "small" if quick else "qwen2.5-0.5b"
    model = make_model(shape, device)
    P = len(PROBE)
    (completion,) = make_completions(model.config.vocab_size, T, 1, "full")
    prompt, response = completion.prompt.to(device), completion.response.to(device)
    every = methods(model, T, 1, P, device, best=1)
    functions = {name: every[name] for name in (FLOOR, PROBE_FLOOR, WITH_CACHE, "ours, full", ON_KEYS)}
    sampled = {size: spread_chunks(T + 1, size) for size in COPIES if size <= T + 1}
    copies = {
        size: partial(exit_entropy_by_copies, model, prompt, response, PROBE.to(device), size, positions.to(device))
        for size, positions in sampled.items()
    }
    tried = interleaved({WITH_CACHE: every[WITH_CACHE], **copies}, 1, device, "chunk size of the copies")

    def of_all(seconds: float, size: int, of_trajectory: float) -> float:
        return of_trajectory + (seconds - of_trajectory) * (T + 1) / len(sampled[size])

    best = min(copies, key=lambda size: of_all(tried[size], size, tried[WITH_CACHE]))
    name = f"per-position KV copies, {best} at a time"
    functions[name] = copies[best]
    seconds = interleaved(functions, 1 if quick else 3, device, f"{shape} T={T}")
    seconds[name] = of_all(seconds[name], best, seconds[WITH_CACHE])
    peaks = {name: peak_mib(function, device) for name, function in functions.items()}
    probe_tokens = pushed_tokens(T, 1, P, "full")[1]
    return [
        {
            "method": name,
            "seconds": value,
            "/ floor": value / seconds[FLOOR],
            "/ probes": value / seconds[PROBE_FLOOR],
            "probe tokens/s": 0 if name.startswith("plain") else round(probe_tokens / value),
            "peak MiB": peaks[name],
            "/ plain with cache": peaks[name] / peaks[WITH_CACHE],
        }
        for name, value in seconds.items()
    ]


def spread_chunks(count: int, size: int) -> torch.Tensor:
    """Positions 0..count - 1 in chunks of `size` consecutive ones, the last one included: at most `SAMPLED_CHUNKS` of
    them, spread evenly."""
    starts = torch.linspace(0, count - size, min(SAMPLED_CHUNKS, count // size)).long()
    return (starts[:, None] + torch.arange(size)).flatten()


def shown(value: object) -> str:
    """A number with three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("machine", "exactness", "speed"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="response tokens of speed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the numbers here")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_check: --device: cuda, but torch sees no GPU; use --device cpu --quick")
    if options.part == "machine":
        rows = machine(options.device)
    elif options.part == "exactness":
        rows = exactness(options.device, options.quick)
    else:
        rows = speed(options.device, options.quick, options.length)
        print(f"Prompt of {PROMPT} tokens, T = {options.length}, one completion, {len(PROBE)} probe tokens.\n")
    print(table(list(rows[0]), [[shown(value) for value in row.values()] for row in rows]))
    if options.json:
        label = {"part": options.part} | ({"T": options.length} if options.part == "speed" else {})
        with options.json.open("a") as file:
            file.writelines(json.dumps(label | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
