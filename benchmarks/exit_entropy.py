"""The exit-entropy pass against its floor and its competitors: python -m benchmarks.exit_entropy

The floor is a plain forward of as many tokens as the pass must push through the model, S + P (T + 1) per completion.
Its causal sequences are as long as the trajectory, so that a token attends to about as many others on average.
`/ floor` is the ratio of the seconds to the floor's. `/ probes` is their ratio to those of a plain forward of the
P (T + 1) probe tokens only: this is what the pass adds where the trajectories' keys and values exist already, as in
training. Times are medians of interleaved repeats. `peak MiB` is what tensors take besides the loaded model. The last
column is its ratio to that of a plain forward of one trajectory that keeps its keys and values.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers

from benchmarks.flex_attention import by_flex_attention
from benchmarks.kv_copies import exit_entropy_by_copies
from benchmarks.measure import interleaved, machine, peak_mib, table
from iapo.probe.attention import KeysAndValues
from iapo.probe.measure import MAX_TOKENS, default_max_tokens, exit_entropies, exit_entropies_after, forward_to_share
from iapo.probe.naive import exit_entropies_naive
from iapo.probe.packing import Completion, KVSlot, probe_forwards, probe_positions, slots_of_sequences

SHAPES = {
    "small": dict(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
PROMPT = 64
NAIVE_UP_TO = 64
COPIES = (1, 4, 16, 64)
STEP = 16  # mean tokens of a reasoning step, for the boundaries
DENSITIES = ("full", "stride 8", "boundaries")
FLOOR, PROBE_FLOOR = "plain forward of the same tokens", "plain forward of the probe tokens"
ON_KEYS = "ours, full, keys there already"
WITH_CACHE = "plain forward of a trajectory with KV cache"


def make_model(shape: str, device: str, **changes):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPES[shape] | changes, max_position_embeddings=32768)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_attn_implementation("sdpa")
    return model


def make_completions(vocabulary: int, T: int, B: int, density: str) -> list[Completion]:
    """B completions of one prompt, random tokens; probed everywhere, every 8th token or at random step ends."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (PROMPT,), generator=generator)
    completions = []
    for _ in range(B):
        response = torch.randint(0, vocabulary, (T,), generator=generator)
        ends = torch.rand(T, generator=generator) < 1 / STEP
        positions = {
            "full": probe_positions(T),
            "stride 8": probe_positions(T, 8),
            "boundaries": probe_positions(T, boundaries=ends),
        }[density]
        completions.append(Completion(prompt, response, positions))
    return completions


def plain(model, tokens: int, length: int, scored: int, device: str, rows: int) -> None:
    """Forwards of `tokens` tokens in sequences of `length`, the last one shorter, `rows` sequences at a time.

    They make logits for `scored` tokens, which are spread evenly over the sequences, rounding aside.
    """
    left = tokens
    with torch.no_grad():
        while left > 0:
            ids = torch.zeros(max(min(rows, left // length), 1), min(length, left), dtype=torch.long, device=device)
            model(input_ids=ids, use_cache=False, logits_to_keep=max(round(scored * ids.shape[1] / tokens), 1))
            left -= ids.numel()


def plain_with_cache(model, length: int, device: str) -> None:
    with torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long, device=device), use_cache=True, logits_to_keep=1)


def ours(model, completions, probe_ids, device: str, max_tokens: int | None = None) -> list[torch.Tensor]:
    return exit_entropies(model, completions, probe_ids, device=device, max_tokens=max_tokens)


def keys_of_a_plain_forward(model, completions, device: str) -> tuple[KeysAndValues, dict[int, KVSlot]]:
    """What training has anyway: the keys and values of one forward of whole sequences, and the completions' slots."""
    sequences = [torch.cat([c.prompt, c.response]) for c in completions]
    starts = torch.tensor([0, *map(len, sequences)]).cumsum(0).tolist()
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])[None].to(device)
    with torch.no_grad(), forward_to_share(model) as keys_and_values:
        ids = torch.cat(sequences)[None].to(device)
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return keys_and_values, slots_of_sequences(completions, starts[:-1])


def ours_on_keys(model, completions, probe_ids, device: str, keys_and_values, slots) -> list[torch.Tensor]:
    probes = probe_forwards(completions, slots, probe_ids, default_max_tokens(model.config, device))
    return exit_entropies_after(model, completions, probes, keys_and_values, device=device)


def ours_by_flex_attention(model, completions, probe_ids, device: str) -> list[torch.Tensor]:
    with by_flex_attention():
        return ours(model, completions, probe_ids, device)


def copies(model, completions, probe_ids, device: str, chunk_size: int) -> list[torch.Tensor]:
    probe_ids = probe_ids.to(device)
    return [
        exit_entropy_by_copies(model, c.prompt.to(device), c.response.to(device), probe_ids, chunk_size).cpu()
        for c in completions
    ]


def naive(model, completions, probe_ids, device: str) -> list[torch.Tensor]:
    return exit_entropies_naive(model, completions, probe_ids, device=device)


def check(probe_ids, device: str, flex: bool) -> None:
    """Compare what is timed with the naive reference, in one forward and in several.

    The model has large random weights, so that the entropies differ, and fewer key heads than heads.
    """
    model = make_model("small", device, num_key_value_heads=2).float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = {density: make_completions(model.config.vocab_size, 24, 2, density) for density in DENSITIES}
    expected = {density: naive(model, rows[density], probe_ids, device) for density in DENSITIES}
    print(f"naive reference: entropies with a standard deviation of {torch.cat(expected['full']).std():.2f} nats")

    def compare(name: str, method: Callable, densities: Sequence[str], allowed: float) -> None:
        error = max(
            (a - b)[c.positions].abs().max().item()
            for density in densities
            for a, b, c in zip(
                method(model, rows[density], probe_ids, device), expected[density], rows[density], strict=True
            )
        )
        print(f"{name}: within {error:.1e} nats of it")
        if error > allowed:
            raise SystemExit(f"benchmarks.exit_entropy: {name}: an error of {error} nats")

    compare("ours", ours, DENSITIES, 1e-4)
    compare("ours in several forwards", partial(ours, max_tokens=150), DENSITIES, 1e-4)
    keys_and_values, slots = keys_of_a_plain_forward(model, rows["full"], device)
    on_keys = partial(ours_on_keys, keys_and_values=keys_and_values, slots=slots)
    compare("ours on the keys of a plain forward", on_keys, ["full"], 1e-4)
    compare("KV copies", partial(copies, chunk_size=4), ["full"], 1e-4)
    if flex:
        compare("ours by FlexAttention", ours_by_flex_attention, ["full"], 1e-4)
    if device != "cpu":  # the timed half precision uses other kernels
        model.bfloat16()
        expected = {density: naive(model, rows[density], probe_ids, device) for density in DENSITIES}
        compare("ours in bf16, naive too", ours, DENSITIES, 0.3)
        compare("ours in bf16, naive too, in several forwards", partial(ours, max_tokens=150), DENSITIES, 0.3)


def best_chunk(model, completions, probe_ids, device: str) -> int:
    """The competitor's best chunk size on a short completion. Longer ones take minutes, and their best is the same."""
    functions = {n: partial(copies, model, completions, probe_ids, device, n) for n in COPIES}
    seconds = interleaved(functions, 1, device, "best chunk of the copies")
    return min(seconds, key=seconds.get)


def pushed_tokens(T: int, B: int, P: int, density: str) -> tuple[int, int]:
    """Tokens that a pass must push through the model, and how many of them are probe tokens."""
    probes = P * sum(len(c.positions) for c in make_completions(2, T, B, density))
    return PROMPT + B * T + probes, probes


def methods(
    model, T: int, B: int, P: int, device: str, best: int | None, flex: bool = False
) -> dict[str, Callable[[], object]]:
    """What is measured, by the name of its row; `best` is the competitor's chunk size, None: leave it out."""
    probe_ids = torch.arange(1, P + 1)
    length = PROMPT + T
    floor, probe_floor = pushed_tokens(T, B, P, "full")
    scored, rows = B * (T + 1), 1 if device == "cpu" else max(MAX_TOKENS["cuda"] // length, 1)
    completions = {d: make_completions(model.config.vocab_size, T, B, d) for d in DENSITIES}
    functions = {
        FLOOR: partial(plain, model, floor, length, scored, device, rows),
        PROBE_FLOOR: partial(plain, model, probe_floor, length, scored, device, rows),
        WITH_CACHE: partial(plain_with_cache, model, length, device),
    }
    for density in DENSITIES:
        functions[f"ours, {density}"] = partial(ours, model, completions[density], probe_ids, device)
    shared = keys_of_a_plain_forward(model, completions["full"], device)
    functions[ON_KEYS] = partial(ours_on_keys, model, completions["full"], probe_ids, device, *shared)
    if flex:
        functions["ours, full, FlexAttention"] = partial(
            ours_by_flex_attention, model, completions["full"], probe_ids, device
        )
    if best is None:
        return functions
    name = f"per-position KV copies, {best} at a time"
    functions[name] = partial(copies, model, completions["full"], probe_ids, device, best)
    if T <= NAIVE_UP_TO:
        functions["naive"] = partial(naive, model, completions["full"], probe_ids, device)
    return functions


def measure(
    model, shape: str, T: int, B: int, P: int, repeats: int, device: str, flex: bool, alone: bool
) -> list[list[str]]:
    short = make_completions(model.config.vocab_size, min(T, 256), 1, "full")
    best = None if alone else best_chunk(model, short, torch.arange(1, P + 1), device)
    functions = methods(model, T, B, P, device, best, flex)
    seconds = interleaved(functions, repeats, device, f"{shape} T={T} B={B}")
    peaks = {}
    for name, function in functions.items():
        print(f"\r{shape} T={T} B={B}: peak memory of {name} ", end="", file=sys.stderr, flush=True)
        peaks[name] = peak_mib(function, device)
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr, flush=True)
    rows = []
    for name, value in seconds.items():
        density = next((d for d in DENSITIES if name == f"ours, {d}"), "full")
        speed = "" if name.startswith("plain") else f"{pushed_tokens(T, B, P, density)[1] / value:,.0f}"
        ratios = [f"{value / seconds[floor]:.2f}" for floor in (FLOOR, PROBE_FLOOR)]
        memory = [f"{peaks[name]:.0f}", f"{peaks[name] / peaks[WITH_CACHE]:.2f}"]
        rows.append([name, f"{value:.3f}", *ratios, speed, *memory])
    return rows


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


HEADER = ["method", "seconds", "/ floor", "/ probes", "probe tokens/s", "peak MiB", "/ plain with cache"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", choices=SHAPES, default="small" if device == "cpu" else "qwen2.5-0.5b")
    parser.add_argument("--lengths", type=positive, nargs="+", default=[256, 512, 1024, 2048], metavar="T")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="completions of one prompt")
    parser.add_argument("--probe", type=positive, default=6, metavar="P", help="probe tokens")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; compiling its kernels takes a while")
    parser.add_argument("--alone", action="store_true", help="without the competitors, which take minutes on a CPU")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; a training worker has one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = make_model(options.shape, device)
    # glibc keeps freed memory only up to the size of the largest block that was ever freed. A training process has
    # freed large blocks. Without one, page faults slow short sequences down.
    torch.zeros(30 * 2**20, dtype=torch.uint8)
    print(machine(device))
    check(torch.arange(1, options.probe + 1), device, options.flex)
    for T in options.lengths:
        rows = measure(
            model, options.shape, T, options.batch, options.probe, options.repeats, device, options.flex, options.alone
        )
        print(f"\n{options.shape}, T = {T}, B = {options.batch}, P = {options.probe}:\n")
        print(table(HEADER, rows), flush=True)


if __name__ == "__main__":
    main()
