"""Probes that are written as a tokenizer would write them, against plain forwards of the text's own tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from iapo.information import Joins, exit_entropy, exit_entropy_naive
from iapo.probe.joins import common_start, measured
from iapo.probe.measure import exit_entropies
from iapo.probe.naive import exit_entropies_naive, value_at
from iapo.probe.packing import Completion, forward_count, longest, packs, probe_positions, trajectory_forward
from tests.conftest import make_model

LETTERS = "abcd.<>/ \n"
# As in Qwen's and Llama's vocabularies, one token spans the join; here also one that swallows more of the probe.
MERGES = [(".", "<"), ("<", "/"), (".<", "/"), ("a", "b"), ("\n", "<"), (" ", "<"), (">", "d"), ("a", ">d")]
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


def joins(natural=True):
    return Joins(encode, decode, PROBE, natural)


def test_the_join_by_hand():
    (full_stop,), (letter,) = encode("."), encode("c")
    plain = (tuple(encode(PROBE)), None, False)
    assert joins().join(letter, None) == joins().join(None, None) == plain  # c</a> is c and the probe's own tokens
    assert joins(natural=False).join(full_stop, None) == plain
    join = joins().join(full_stop, None)
    assert ([decode([token]) for token in join.probe], join.takes_last) == ([".</", "a", ">"], True)
    completion = Completion(torch.tensor(encode("d")), torch.tensor(encode("c.c.")), torch.tensor([0, 1, 2, 3, 4]))
    plain, natural = joins().parts(completion)
    assert (plain.numbers, natural.numbers) == ([0, 1, 3], [2, 4])
    assert (plain.completion.positions.tolist(), natural.completion.positions.tolist()) == ([0, 1, 3], [1, 3])
    assert natural.completion.suffixes.shape == (2, 3) and plain.completion.suffixes is None
    assert plain.completion.response is natural.completion.response


def texts_of(ids):
    return None if ids is None else [decode([token]) for token in ids]


@pytest.mark.parametrize(
    ("last", "answer", "probe", "rest", "takes_last"),
    [
        ("c", "cc", ["</", "a", ">"], ["c", "c"], False),
        ("c", "dc", ["</"], ["a>d", "c"], False),  # a token spans the probe's end and the answer: it is scored whole
        (".", "cc", [".</", "a", ">"], ["c", "c"], True),
        (".", "dc", [".</"], ["a>d", "c"], True),
        (None, "dc", ["</"], ["a>d", "c"], False),
        ("c", "", ["</", "a", ">"], [], False),
    ],
)
def test_the_join_of_probe_and_answer_by_hand(last, answer, probe, rest, takes_last):
    token = None if last is None else encode(last)[0]
    join = joins().join(token, tuple(encode(answer)))
    assert (texts_of(join.probe), texts_of(join.answer), join.takes_last) == (probe, rest, takes_last)
    apart = joins(natural=False).join(token, tuple(encode(answer)))
    assert texts_of(apart.probe) + texts_of(apart.answer) == texts_of(encode(PROBE + answer))
    assert not apart.takes_last


def test_an_answer_that_leaves_nothing_of_a_probe_is_written_apart_where_no_token_is_before_it():
    join = Joins(encode, decode, ">").join(encode("c")[0], tuple(encode("d")))
    assert (texts_of(join.probe), texts_of(join.answer), join.takes_last) == (["c"], [">d"], True)
    single = Joins(encode, decode, ">", natural=False).join(None, tuple(encode("dc")))
    assert (texts_of(single.probe), texts_of(single.answer)) == ([">"], ["d", "c"])


def expected(model, completion, natural=True):
    """One plain forward per position of the tokens of the text: of the last token, the probe and the answer."""
    values = []
    answer = "" if completion.answer is None else decode(completion.answer)
    for t in completion.positions.tolist():
        response = completion.response[:t].tolist()
        last = response[-1:] if natural else []
        last = last if encode(decode(last)) == last else []
        response = response[: len(response) - len(last)]
        probe, together = encode(decode(last) + PROBE), encode(decode(last) + PROBE + answer)
        shared = common_start(probe, together)
        ids, answer_ids = response + together[:shared], None if completion.answer is None else together[shared:]
        tensors = [None if x is None else torch.tensor(x, dtype=torch.long) for x in (ids, answer_ids)]
        whole = Completion(completion.prompt, tensors[0], torch.tensor([len(ids)]), tensors[1])
        values.append(value_at(model, whole, len(ids), torch.tensor([], dtype=torch.long), "cpu"))
    return torch.tensor(values)


@given(
    texts=st.lists(st.text(LETTERS, max_size=9), min_size=1, max_size=4),
    stride=st.integers(1, 3),
    max_tokens=st.integers(1, 60),
    answer=st.one_of(st.none(), st.text(LETTERS, max_size=4)),
    natural=st.booleans(),
)
def test_the_packed_pass_and_its_twin_equal_plain_forwards_of_the_texts_tokens(
    model, texts, stride, max_tokens, answer, natural
):
    answer = None if answer is None else torch.tensor(encode(answer), dtype=torch.long)
    completions = []
    for number, text in enumerate(texts):
        ids = torch.tensor(encode(text), dtype=torch.long)
        completions.append(
            Completion(torch.tensor(encode("da"[number % 2])), ids, probe_positions(len(ids), stride), answer)
        )
    probe = torch.tensor(encode(PROBE))
    fast = measured(completions, joins(natural), lambda c: exit_entropies(model, c, probe, max_tokens=max_tokens))
    naive = measured(completions, joins(natural), lambda c: exit_entropies_naive(model, c, probe))
    for completion, f, n in zip(completions, fast, naive, strict=True):
        torch.testing.assert_close(f, n, atol=2e-5, rtol=0)
        if answer is None or len(answer):
            torch.testing.assert_close(f[completion.positions], expected(model, completion, natural), atol=2e-5, rtol=0)
        else:
            assert (f == 0).all()


def test_the_public_function_takes_them(model):
    prompt, response = encode("d"), encode("ab.c.\n")
    ids = torch.tensor([prompt + response])
    mask = torch.ones(1, len(response), dtype=torch.long)
    arguments = (model, ids, torch.ones_like(ids), mask, encode(PROBE))
    h, plain = exit_entropy(*arguments, joins=joins()), exit_entropy(*arguments)
    torch.testing.assert_close(h, exit_entropy_naive(*arguments, joins=joins()), atol=2e-5, rtol=0)
    joined = [t for t in range(1, len(response) + 1) if joins().join(response[t - 1], None).takes_last]
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
