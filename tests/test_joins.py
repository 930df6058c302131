"""Probes that are written as a tokenizer would write them, against plain forwards of the text's own tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from iapo.information import Joins, exit_entropy, exit_entropy_naive
from iapo.probe.joins import measured
from iapo.probe.measure import exit_entropies
from iapo.probe.naive import exit_entropies_naive, value_at
from iapo.probe.packing import Completion, forward_count, longest, packs, probe_positions, trajectory_forward
from tests.conftest import make_model

LETTERS = "abcd.<>/ \n"
# As in Qwen's and Llama's vocabularies, one token spans the join; here also one that swallows more of the probe.
MERGES = [(".", "<"), ("<", "/"), (".<", "/"), ("a", "b"), ("\n", "<"), (" ", "<")]
PROBE = "</a>"


def make_tokenizer():
    vocabulary = {text: number for number, text in enumerate([*LETTERS, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


TOKENIZER = make_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def decode(ids):
    return TOKENIZER.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2", vocab_size=VOCABULARY)


def joins():
    return Joins(encode, decode, PROBE)


def test_the_join_by_hand():
    (full_stop,), (letter,) = encode("."), encode("c")
    assert joins().rewritten(letter) is None  # c</a> is c and the probe's own tokens
    assert [decode([token]) for token in joins().rewritten(full_stop)] == [".</", "a", ">"] != encode(PROBE)
    completion = Completion(torch.tensor(encode("d")), torch.tensor(encode("c.c.")), torch.tensor([0, 1, 2, 3, 4]))
    plain, natural = joins().parts(completion)
    assert (plain.numbers, natural.numbers) == ([0, 1, 3], [2, 4])
    assert (plain.completion.positions.tolist(), natural.completion.positions.tolist()) == ([0, 1, 3], [1, 3])
    assert natural.completion.suffixes.shape == (2, 3) and plain.completion.suffixes is None
    assert plain.completion.response is natural.completion.response


def expected(model, completion):
    """One plain forward per position, of the tokens of the prefix without its last, and of that with the probe."""
    values = []
    for t in completion.positions.tolist():
        response = completion.response[:t].tolist()
        last = response[-1:]
        together = encode(decode(last) + PROBE)
        stays = not last or encode(decode(last)) != last
        ids = response + encode(PROBE) if stays else response[:-1] + together
        whole = Completion(completion.prompt, torch.tensor(ids), torch.tensor([len(ids)]), completion.answer)
        values.append(value_at(model, whole, len(ids), torch.tensor([], dtype=torch.long), "cpu"))
    return torch.tensor(values)


@given(
    texts=st.lists(st.text(LETTERS, max_size=9), min_size=1, max_size=4),
    stride=st.integers(1, 3),
    max_tokens=st.integers(1, 60),
    answer=st.one_of(st.none(), st.lists(st.integers(0, VOCABULARY - 1), max_size=3)),
)
def test_the_packed_pass_and_its_twin_equal_plain_forwards_of_the_texts_tokens(
    model, texts, stride, max_tokens, answer
):
    answer = None if answer is None else torch.tensor(answer, dtype=torch.long)
    completions = []
    for number, text in enumerate(texts):
        ids = torch.tensor(encode(text), dtype=torch.long)
        completions.append(
            Completion(torch.tensor(encode("da"[number % 2])), ids, probe_positions(len(ids), stride), answer)
        )
    probe = torch.tensor(encode(PROBE))
    fast = measured(completions, joins(), lambda c: exit_entropies(model, c, probe, max_tokens=max_tokens))
    naive = measured(completions, joins(), lambda c: exit_entropies_naive(model, c, probe))
    for completion, f, n in zip(completions, fast, naive, strict=True):
        torch.testing.assert_close(f, n, atol=2e-5, rtol=0)
        if answer is None or len(answer):
            torch.testing.assert_close(f[completion.positions], expected(model, completion), atol=2e-5, rtol=0)
        else:
            assert (f == 0).all()


def test_the_public_function_takes_them(model):
    prompt, response = encode("d"), encode("ab.c.\n")
    ids = torch.tensor([prompt + response])
    mask = torch.ones(1, len(response), dtype=torch.long)
    arguments = (model, ids, torch.ones_like(ids), mask, encode(PROBE))
    h, plain = exit_entropy(*arguments, joins=joins()), exit_entropy(*arguments)
    torch.testing.assert_close(h, exit_entropy_naive(*arguments, joins=joins()), atol=2e-5, rtol=0)
    joined = [t for t in range(1, len(response) + 1) if joins().rewritten(response[t - 1]) is not None]
    assert 0 < len(joined) < len(response)
    differs = [t for t in range(len(response) + 1) if abs(h[0, t] - plain[0, t]) > 1e-6]
    assert set(differs) <= set(joined) and differs


def test_a_response_that_is_measured_several_times_goes_through_the_model_once():
    """The parts of a completion, and one with several answers, share one trajectory and count it once."""
    response = torch.tensor(encode("c.c.c.c."))
    whole = Completion(torch.tensor(encode("d")), response, probe_positions(len(response)))
    parts = [part.completion for part in joins().parts(whole)]
    assert len(parts) == 2
    (groups,) = packs(parts, 100)
    forward, slots = trajectory_forward(parts, groups)
    assert forward.stored == 1 + len(response) - 1  # the last position is a join, which sees one token less
    assert {slot.trajectory.start for slot in slots.values()} == {1}
    answers = [whole._replace(answer=torch.tensor([1])), whole._replace(answer=torch.tensor([2, 3]))]
    assert len(packs(answers, 1 + len(response))) == 1  # both fit where one does
    assert forward_count(answers, 4, 1000) == 1
    for budget in (2, 5, len(response)):  # also where one trajectory is longer than a forward should be
        assert packs(parts, budget) == [[[0, 1]]] and packs(answers * 3, budget) == [[list(range(6))]]
    assert longest(parts, len(encode(PROBE))) == max(1 + 7 + 3, 1 + 7 + len(encode(PROBE)))
