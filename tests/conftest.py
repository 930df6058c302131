"""Tiny random models of the supported families and ragged batches for them."""

import signal

import pytest
import torch
import transformers
from hypothesis import settings

# A shell lets its background jobs ignore Ctrl-C, and what they start inherits that; tests send it to their own runs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machine may be busy; how long an example takes says nothing about whether it is right.
settings.register_profile("iapo", deadline=None)
settings.load_profile("iapo")

VOCAB = 97
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
GROUPED = dict(SHAPE, num_key_value_heads=2, max_position_embeddings=512)

CONFIGS = {
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=None),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=256),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}


def make_model(family: str, **changes):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Larger weights than the initialisation's, so that entropies differ from ln(V) and from each other.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_batch(prompt_lengths, response_lengths, seed=0, extra_prompt=0, extra_response=0):
    """Left-padded prompts and right-padded responses of the given lengths, random tokens on padding too."""
    generator = torch.Generator().manual_seed(seed)
    width, T = max(prompt_lengths) + extra_prompt, max(max(response_lengths), 1) + extra_response
    B = len(prompt_lengths)
    input_ids = torch.zeros(B, width + T, dtype=torch.long)
    attention_mask = torch.zeros(B, width + T, dtype=torch.long)
    response_mask = torch.zeros(B, T, dtype=torch.long)
    for b, (p, r) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        input_ids[b] = torch.randint(0, VOCAB, (width + T,), generator=generator)
        attention_mask[b, width - p : width + r] = 1
        response_mask[b, :r] = 1
    return input_ids, attention_mask, response_mask


@pytest.fixture(scope="session")
def models():
    return {family: make_model(family) for family in CONFIGS}


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from iapo.data import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("verbose_arithmetic", folder)
    return folder


@pytest.fixture
def train(tmp_path, data_dir):
    from tests.runs import runs

    with runs(tmp_path, data_dir) as start:
        yield start
