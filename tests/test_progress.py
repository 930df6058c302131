"""Progress to go: hand numbers, a twin in plain Python, and its properties."""

import math
import random
import statistics

import pytest
import torch

from iapo.advantage import exploration, iapo_advantage, of_another, progress_to_go, relative_progress
from iapo.config import IapoConfig

PROGRESS = dict(score="reference_answer", progress=1.0)


def config(**given):
    return IapoConfig(**PROGRESS | given)


def tensors(*rows, width=None):
    width = width or max(map(len, rows))
    return torch.tensor([[*row, *[row[-1] if row else 0.0] * (width - len(row))] for row in rows])


def mask(*lengths, width):
    return torch.tensor([[1.0] * n + [0.0] * (width - n) for n in lengths])


def test_hand_numbers():
    v = tensors([0.1, 0.1, 0.6, 0.9])
    # gamma 1: v_R - v_{t-1} - price * tokens to go
    assert progress_to_go(v, mask(3, width=3), price=0.1)[0].tolist() == pytest.approx([0.5, 0.6, 0.2])
    # gamma 0.5, no price: deltas 0, 0.5, 0.3
    assert progress_to_go(v, mask(3, width=3), gamma=0.5)[0].tolist() == pytest.approx([0.325, 0.65, 0.3])
    assert progress_to_go(v, mask(0, width=3), price=0.1)[0].tolist() == [0, 0, 0]


def test_hand_numbers_of_the_term():
    """Two completions of three and two tokens, the last of which is the answer; their reasoning has two and one."""
    h = -tensors([0.2, 0.2, 0.8], [0.2, 0.4], width=4).log()
    response, region = mask(3, 2, width=3), mask(2, 1, width=3)
    term = relative_progress(h, region, response, ["a", "b"], config(price=0.1))
    # G: 0.8 - 0.2 - 0.2, 0.8 - 0.2 - 0.1, and 0 at the exit; 0.4 - 0.2 - 0.1, and 0 at the exit
    G = [0.4, 0.5, 0.0, 0.1, 0.0]
    mean, std = statistics.mean(G), statistics.pstdev(G)
    wanted = [(g - mean) / std for g in G]
    assert term[0].tolist() == pytest.approx(wanted[:3], abs=1e-5)
    assert term[1].tolist() == pytest.approx([*wanted[3:], 0], abs=1e-5)


def plain(v, regions, lengths, gamma, price):
    """The term's equation, one number at a time."""
    G = [
        [sum(gamma**k * (v[i][t + k] - v[i][t + k - 1] - price) for k in range(R - t + 1)) for t in range(1, R + 1)]
        + [0.0] * (lengths[i] > R)
        for i, R in enumerate(regions)
    ]
    every = [g for row in G for g in row]
    mean, std = statistics.mean(every), statistics.pstdev(every)
    return [[(g - mean) / std for g in row] for row in G]


@pytest.mark.parametrize("seed", range(20))
def test_the_term_is_its_equation(seed):
    rng = random.Random(seed)
    B, T = rng.randint(1, 5), rng.randint(2, 9)
    lengths = [rng.randint(2, T) for _ in range(B)]
    regions = [rng.randint(0, n) for n in lengths]
    regions[0] = lengths[0]  # cut: no exit marker
    v = [[rng.random() for _ in range(R + 1)] for R in regions]
    gamma, price = rng.choice([1.0, 0.9, 0.3]), rng.choice([0.0, 0.003, 0.2])
    wanted = plain(v, regions, lengths, gamma, price)
    h = -tensors(*v, width=T + 1).log()
    term = relative_progress(
        h, mask(*regions, width=T), mask(*lengths, width=T), range(B), config(gamma=gamma, price=price)
    )
    for got, row in zip(term.tolist(), wanted, strict=True):
        assert got == pytest.approx([*row, *[0.0] * (T - len(row))], abs=2e-4)


def test_without_discount_and_price_it_telescopes():
    v = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    G = progress_to_go(v, torch.ones(4, 7))
    assert torch.allclose(G, v[:, -1:] - v[:, :-1], atol=1e-6)


def test_a_price_costs_the_tokens_that_are_to_come():
    v = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    free, priced = (progress_to_go(v, torch.ones(2, 4), price=price) for price in (0.0, 0.25))
    assert torch.allclose(free - priced, 0.25 * torch.tensor([4.0, 3, 2, 1]).expand(2, 4), atol=1e-6)


def test_nothing_to_compare_is_nothing():
    """Equal values, one token without an exit, no reasoning, padding alone: 0, never NaN."""
    for regions, lengths in (([2, 2], [2, 2]), ([1], [1]), ([0, 0], [2, 2]), ([0], [0])):
        h = torch.zeros(len(regions), 3)
        term = relative_progress(h, mask(*regions, width=2), mask(*lengths, width=2), regions, config())
        assert term.tolist() == [[0, 0]] * len(regions)


def test_an_answer_that_is_impossible_has_a_value_of_0():
    h = torch.tensor([[800.0, 800, 0.0, 0.0]])
    term = relative_progress(h, mask(2, width=3), mask(3, width=3), ["a"], config())
    assert term.isfinite().all() and term[0, 0] == term[0, 1] > term[0, 2]


def test_padding_order_and_further_columns_change_nothing():
    v = tensors([0.2, 0.3, 0.9], [0.5, 0.1, 0.1, 0.4])
    h, region, response = -v.log(), mask(2, 3, width=3), mask(3, 3, width=3)
    term = relative_progress(h, region, response, ["a", "a"], config(price=0.01))
    wide = torch.cat([h, h[:, -1:], h[:, -1:]], 1), *(torch.nn.functional.pad(m, (0, 2)) for m in (region, response))
    widened = relative_progress(*wide, ["a", "a"], config(price=0.01))
    assert torch.allclose(widened, torch.nn.functional.pad(term, (0, 2)), atol=1e-6)
    flipped = relative_progress(h.flip(0), region.flip(0), response.flip(0), ["a", "a"], config(price=0.01))
    assert torch.allclose(flipped.flip(0), term, atol=1e-6)


def test_the_falsifiers():
    v = tensors([0.1, 0.5, 0.9], [0.2, 0.2, 0.3, 0.4, 0.8], [0.6, 0.7])
    region = mask(2, 4, 1, width=4)
    other = of_another(v, region, ["a", "a", "b"])
    assert other[0].tolist() == pytest.approx([0.2, 0.3, 0.8, 0.8, 0.8])  # 0, 2 and 4 of the second
    # 0 to 4 of 4 are 0, 0.5, 1, 1.5 and 2 of 2; halves go to the even neighbour
    assert other[1].tolist() == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])
    assert torch.equal(other[2], v[2])  # alone
    h, response = -v.log(), mask(3, 4, 2, width=4)
    index = ["a", "a", "b"]
    shuffled = relative_progress(h, region, response, index, config(progress_value="shuffled", price=0.003))
    given = relative_progress(-other.log(), region, response, index, config(price=0.003))
    assert torch.allclose(shuffled, given, atol=1e-6)
    none = relative_progress(h, region, response, index, config(progress_value="none", price=0.003))
    assert torch.equal(none, relative_progress(h * 0, region, response, index, config(price=0.003)))


def test_it_is_a_weighted_term_of_the_advantage():
    h, region, response = torch.rand(3, 5), mask(2, 4, 3, width=4), mask(3, 4, 4, width=4)
    outcome = torch.rand(3, 4) * response
    advantages, terms = iapo_advantage(
        outcome, response, config(progress=2.0), index=["a"] * 3, exit_entropy=h, region_mask=region
    )
    assert list(terms) == ["outcome", "progress"]
    assert torch.equal(terms["progress"], 2 * relative_progress(h, region, response, ["a"] * 3, config()))
    assert torch.allclose(advantages, outcome + terms["progress"])
    with pytest.raises(ValueError, match=r"^region_mask: None, but iapo.progress=2.0 needs it; pass"):
        iapo_advantage(outcome, response, config(progress=2.0), index=["a"] * 3, exit_entropy=h)


def test_no_token_of_a_wrong_answer_is_praised():
    log_probs = torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9]]).log()
    correct, response = torch.tensor([True, False]), torch.ones(2, 3)
    paper, unpraised = (exploration(log_probs, correct, response, form) for form in ("paper", "unpraised"))
    z = math.sqrt(1.5)
    assert paper[1].tolist() == pytest.approx([z, 0, -z], abs=1e-5)
    assert unpraised[1].tolist() == pytest.approx([0, 0, -z], abs=1e-5)
    assert torch.equal(unpraised[0], paper[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(progress=-1.0), "iapo.progress: -1.0 must be a number >= 0."),
        (dict(price=-0.1), "iapo.price: -0.1 must be a number >= 0."),
        (dict(gamma=0), "iapo.gamma: 0 must be a number above 0 and at most 1."),
        (dict(gamma=1.5), "iapo.gamma: 1.5 must be a number above 0 and at most 1."),
        (dict(progress_value="old"), "iapo.progress_value: 'old' must be one of measured, shuffled, none."),
        (dict(progress=0, price=0.1), "iapo.price: 0.1 has no effect with iapo.progress=0; leave it 0.0."),
        (
            dict(exploration="unpraised"),
            "iapo.exploration: 'unpraised' has no effect with iapo.beta=0; leave it 'paper'.",
        ),
        (
            dict(score="answer_logprob"),
            "iapo.score: 'answer_logprob' is no surprisal of the right answer, which "
            "iapo.progress=1.0 needs; set iapo.score=reference_answer or iapo.progress=0.",
        ),
        (
            dict(probe_at="ends"),
            "iapo.probe_at: 'ends' measures no token's gain, which iapo.progress=1.0 needs; choose "
            "stride or boundaries.",
        ),
    ],
)
def test_bad_values_get_one_line(given, message):
    with pytest.raises(ValueError) as error:
        config(**given)
    assert str(error.value) == message


def test_training_probes_every_position():
    assert config().in_training.probe_at == "stride"
    assert not config().is_grpo and config().needs_exit_entropy and not config().needs_correctness
