"""How often natural tokens of the probe differ, and what they change: the benchmarks' figures by hand."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks import join_share
from benchmarks.real_traces import changes, positions, scores_along
from iapo.information import Joins, exit_entropies
from iapo.probe.naive import exit_entropies_naive
from iapo.probe.packing import Completion, probe_positions
from tests.conftest import make_model

LETTERS = "abcd.<>/ \n"
# `.` and `<` are one token. So are `a`, `b` and `<`, though `ab` is none: that join reaches two tokens back.
MERGES = [(".", "<"), ("b", "<"), ("a", "b<")]


@pytest.fixture
def tokenizer():
    vocabulary = {text: number for number, text in enumerate([*LETTERS, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_the_shares_by_hand(tokenizer):
    # a stays; after ab the natural tokens are a, b< and those of the text ab<; a full stop becomes .< in both.
    found = join_share.prefixes(tokenizer, "</a>", ["ab.", "\nc"])
    place = dict(step_end=False, full_stop=False)
    same = dict(natural=False, whole=False, apart=False)
    assert found == [
        join_share.Prefix(**place, **same),
        join_share.Prefix(**place, natural=True, whole=True, apart=True),
        join_share.Prefix(step_end=True, full_stop=True, natural=True, whole=True, apart=False),
        join_share.Prefix(step_end=True, full_stop=False, **same),
        join_share.Prefix(**place, **same),
    ]
    cells = ["5", "40.0% / 40.0%", "50.0% / 50.0%", "100.0% / 100.0%", "1"]
    assert join_share.shares(found) == cells
    assert join_share.shares([]) == ["0", "-", "-", "-", "0"]


def test_a_prefix_that_ends_within_a_character_stays_as_it_is():
    # One token per byte: the first of two bytes has no text, so the whole text can't be encoded as the prefix was.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    by_byte.pre_tokenizer, by_byte.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = join_share.prefixes(by_byte, "</a>", ["é"])
    assert [(prefix.natural, prefix.whole, prefix.apart) for prefix in found] == [(False, True, True), (False,) * 3]


def test_a_table_of_two_tokenizers_and_both_probes(tokenizer, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(join_share, "PROBES", ["</a>", "\n<"])
    paths = [str(tmp_path / name / "tokenizer.json") for name in ("one", "two")]
    for path in paths:
        Path(path).parent.mkdir()
        tokenizer.save(path)
    data = tmp_path / "test.jsonl"
    rows = [{"question": "q", "answer": f"{text}\n#### 3"} for text in ("a.<<1+2=3>>", "d", "never read")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    join_share.main([*paths, "--data", str(data), "--rows", "2"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    # Of a, a., d the one after the full stop joins `</a>`, and none joins a new line.
    joined = ["3", "33.3% / 33.3%", "100.0% / 100.0%", "100.0% / 100.0%", "0"]
    apart = ["3", *["0.0% / 0.0%"] * 3, "0"]
    assert lines == [[name, *row] for name in ("one", "two") for row in (["`</a>`", *joined], ["`\\n<`", *apart])]


def test_what_natural_tokens_change_by_hand():
    ids = [torch.tensor([4.0, 3.0, 5.0, 1.0]), torch.tensor([2.0, 2.0])]
    natural = [torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([2.0, 1.0])]
    joined = [torch.tensor([False, False, True, False]), torch.tensor([False, True])]
    # 2 of 6 positions, moved by -3 and -1; gains beside them -2, 4, 0 with ids and 1, 1, 1 with natural tokens.
    share, change, size, largest, before, after, correlation = changes(ids, natural, joined)
    assert (share, change, size, largest, before, after) == ("33.3%", "-2.000", "2.000", "3.000", "2.000", "1.000")
    assert correlation == "nan"  # natural gains are all the same
    everywhere = [torch.ones_like(here) for here in joined]
    assert changes(ids, ids, everywhere) == ["100.0%", "+0.000", "0.000", "0.000", "1.750", "1.750", "1.00"]
    assert changes(ids, natural, [~here for here in everywhere]) == ["0.0%", *"------"]


def test_scores_are_measured_apart_only_where_the_tokens_differ(tokenizer):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    model = make_model("qwen2", vocab_size=tokenizer.get_vocab_size())
    joins = {
        how: Joins(encode, lambda tokens: tokenizer.decode(list(tokens)), "</a>", how == "natural")
        for how in ("ids", "natural")
    }
    join, plain_join = joins["natural"].join, joins["natural"].join(None, None)
    response = torch.tensor(encode("c.d"))
    rows = [(Completion(torch.tensor(encode("d")), response, probe_positions(3)), torch.tensor(encode("cd")))]
    joined = [positions(completion, lambda token: join(token, None) != plain_join) for completion, _ in rows]
    assert joined[0].tolist() == [False, False, True, False]

    def measure(completions):
        return exit_entropies(model, completions, encode("</a>"))

    values = scores_along(measure, rows, joins, joined)
    for score, answer in (("entropy", None), ("surprisal", rows[0][1])):
        whole = rows[0][0]._replace(answer=answer)
        (plain,) = exit_entropies_naive(model, [whole], encode("</a>"))
        torch.testing.assert_close(values[score, "ids"][0], plain, atol=2e-5, rtol=0)
        *before, last = encode("c.</a>")  # c .< / a and, as the probe, >
        written = Completion(whole.prompt, torch.tensor(before), torch.tensor([len(before)]), answer)
        (natural,) = exit_entropies_naive(model, [written], [last])
        expected = plain.clone()
        expected[2] = natural[-1]
        torch.testing.assert_close(values[score, "natural"][0], expected, atol=2e-5, rtol=0)
