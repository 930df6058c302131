"""Progress to go and the fitted baseline: hand numbers, twins in plain Python, and properties."""

import math
import random
import statistics

import pytest
import torch

from iapo.advantage import (
    exploration,
    fitted_progress,
    iapo_advantage,
    least_squares,
    of_another,
    progress_to_go,
    progress_values,
    relative_progress,
)
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
    v = tensors([0.2, 0.2, 0.8], [0.2, 0.4], width=4)
    response, region = mask(3, 2, width=3), mask(2, 1, width=3)
    term = relative_progress(v, region, response, config(price=0.1))
    # G: 0.8 - 0.2 - 0.2, 0.8 - 0.2 - 0.1, and 0 at the exit; 0.4 - 0.2 - 0.1, and 0 at the exit
    #      0.4 0.5 0.0 | 0.1 0.0, mean 0.2
    # v    0.2 0.2 0.8 | 0.2 0.4, mean 0.36, before each: products of the differences add to -0.16, squares to 0.272
    c = -0.16 / 0.272
    left = [0.2 + 0.16 * c, 0.3 + 0.16 * c, -0.2 - 0.44 * c, -0.1 + 0.16 * c, -0.2 - 0.04 * c]
    std = math.sqrt(sum(x * x for x in left) / 5)
    assert term[0].tolist() == pytest.approx([x / std for x in left[:3]], abs=1e-5)
    assert term[1].tolist() == pytest.approx([*(x / std for x in left[3:]), 0], abs=1e-5)


def plain(v, regions, lengths, gamma, price):
    """The term's equation, one number at a time."""
    G = [
        [sum(gamma**k * (v[i][t + k] - v[i][t + k - 1] - price) for k in range(R - t + 1)) for t in range(1, R + 1)]
        + [0.0] * (lengths[i] > R)
        for i, R in enumerate(regions)
    ]
    before = [v[i][t] for i, row in enumerate(G) for t in range(len(row))]
    c, a = statistics.linear_regression(before, [g for row in G for g in row])
    left = [[g - a - c * v[i][t] for t, g in enumerate(row)] for i, row in enumerate(G)]
    std = statistics.pstdev([x for row in left for x in row])
    return [[x / std if std > 1e-6 else 0.0 for x in row] for row in left]


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
    masks = mask(*regions, width=T), mask(*lengths, width=T)
    term = relative_progress(tensors(*v, width=T + 1), *masks, config(gamma=gamma, price=price))
    for got, row in zip(term.tolist(), wanted, strict=True):
        assert got == pytest.approx([*row, *[0.0] * (T - len(row))], abs=2e-4)


def test_without_discount_and_price_it_telescopes():
    v = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    G = progress_to_go(v, torch.ones(4, 7))
    assert torch.allclose(G, v[:, -1:] - v[:, :-1], atol=1e-6)


def test_what_v_foretells_moves_nothing():
    """The term is uncorrelated with v_{t-1}, and settled tokens all get the same."""
    v = tensors([0.1, 0.5, 1.0, 1.0, 1.0], [0.2, 0.2, 0.9, 0.3], [0.6, 0.7, 1.0], width=6)
    masks = mask(4, 3, 2, width=5), mask(5, 4, 3, width=5)
    term = relative_progress(v, *masks, config())
    assert (term * v[:, :-1]).sum().item() == pytest.approx(0, abs=1e-5) == pytest.approx(term.sum().item(), abs=1e-5)
    settled = [*term[0, 2:5].tolist(), term[2, 2].item()]  # v_{t-1} = 1 and G = 0
    assert settled == pytest.approx([settled[0]] * 4, abs=1e-6)


def test_a_price_costs_the_tokens_that_are_to_come():
    v = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    free, priced = (progress_to_go(v, torch.ones(2, 4), price=price) for price in (0.0, 0.25))
    assert torch.allclose(free - priced, 0.25 * torch.tensor([4.0, 3, 2, 1]).expand(2, 4), atol=1e-6)


def test_nothing_to_compare_is_nothing():
    """Equal values, one token without an exit, no reasoning, padding alone: 0, never NaN. Two points are on a line."""
    line = relative_progress(tensors([0.2, 0.9, 0.9]), mask(1, width=2), mask(2, width=2), config())
    assert line.tolist() == [[0, 0]]
    for regions, lengths in (([2, 2], [2, 2]), ([1], [1]), ([0, 0], [2, 2]), ([0], [0])):
        term = relative_progress(
            torch.ones(len(regions), 3), mask(*regions, width=2), mask(*lengths, width=2), config()
        )
        assert term.tolist() == [[0, 0]] * len(regions)


def test_an_answer_that_is_impossible_has_a_value_of_0():
    h = torch.tensor([[800.0, 800, 0.0, 0.0], [800, 800, 800, 800]])  # the second never comes to it
    v = progress_values(h, mask(2, 2, width=3), ["a", "a"])
    term = relative_progress(v, mask(2, 2, width=3), mask(3, 3, width=3), config())
    assert term.isfinite().all() and term[0, 0] == term[0, 1] > 0 > term[1, 0] == term[1, 1] == term[1, 2]


def test_padding_order_and_further_columns_change_nothing():
    v = tensors([0.2, 0.3, 0.9], [0.5, 0.1, 0.1, 0.4])
    region, response = mask(2, 3, width=3), mask(3, 3, width=3)
    wide = torch.cat([v, v[:, -1:], v[:, -1:]], 1), *(torch.nn.functional.pad(m, (0, 2)) for m in (region, response))

    def to_go(*inputs):
        return relative_progress(*inputs, config(price=0.01))

    def fitted(*inputs):
        right = inputs[0][:, -1] > 0.5
        return fitted_progress(inputs[0], right, *inputs[1:], ["a", "b"], 0.01)

    for form in (to_go, fitted):
        term = form(v, region, response)
        assert torch.allclose(form(*wide), torch.nn.functional.pad(term, (0, 2)), atol=1e-6)
        flipped = form(v.flip(0), region.flip(0), response.flip(0))
        assert torch.allclose(flipped.flip(0), term, atol=1e-6)


def test_the_falsifiers():
    v = tensors([0.1, 0.5, 0.9], [0.2, 0.2, 0.3, 0.4, 0.8], [0.6, 0.7])
    region = mask(2, 4, 1, width=4)
    other = of_another(v, region, ["a", "a", "b"])
    assert other[0].tolist() == pytest.approx([0.2, 0.3, 0.8, 0.8, 0.8])  # 0, 2 and 4 of the second
    # 0 to 4 of 4 are 0, 0.5, 1, 1.5 and 2 of 2; halves go to the even neighbour
    assert other[1].tolist() == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])
    assert torch.equal(other[2], v[2])  # alone
    index = ["a", "a", "b"]
    measured, shuffled, none = (
        progress_values(-v.log(), region, index, form) for form in ("measured", "shuffled", "none")
    )
    assert torch.allclose(measured, v) and torch.allclose(shuffled, other) and not none.any()


def test_it_is_a_weighted_term_of_the_advantage():
    h, region, response = torch.rand(3, 5), mask(2, 4, 3, width=4), mask(3, 4, 4, width=4)
    outcome = torch.rand(3, 4) * response
    advantages, terms = iapo_advantage(
        outcome, response, config(progress=2.0), index=["a"] * 3, exit_entropy=h, region_mask=region
    )
    assert list(terms) == ["outcome", "progress"]
    assert torch.equal(terms["progress"], 2 * relative_progress(torch.exp(-h), region, response, config()))
    assert torch.allclose(advantages, outcome + terms["progress"])
    with pytest.raises(ValueError, match=r"^region_mask: None, but iapo.progress=2.0 needs it; pass"):
        iapo_advantage(outcome, response, config(progress=2.0), index=["a"] * 3, exit_entropy=h)


def test_a_value_reaches_both_forms_as_its_falsifier_says():
    h, masks = torch.rand(3, 5), (mask(2, 4, 3, width=4), mask(3, 4, 4, width=4))
    index, correct, outcome = ["a", "a", "b"], torch.tensor([1, 0, 1]), torch.zeros(3, 4)
    for value in ("measured", "shuffled", "none"):
        v = progress_values(h, masks[0], index, value)
        wanted = {
            "to_go": relative_progress(v, *masks, config(price=0.1)),
            "fitted": fitted_progress(v, correct, *masks, index, 0.1),
        }
        for form, term in wanted.items():
            given = config(progress_form=form, progress_value=value, price=0.1)
            got, _ = iapo_advantage(
                outcome, masks[1], given, index=index, exit_entropy=h, region_mask=masks[0], correct=correct
            )
            assert torch.equal(got, term), (form, value)


# --- the fitted baseline ---


def test_least_squares_by_hand():
    # y = 1 + 2 x but for +1 and -1 at the two ends of a symmetric middle
    x, y = torch.tensor([0.0, 1, 2, 3]), torch.tensor([1.0, 4, 4, 7])
    assert least_squares(x, y) == pytest.approx((1.3, 1.8))
    assert least_squares(torch.ones(3), torch.tensor([0.0, 1, 1])) == pytest.approx((2 / 3, 0))
    assert least_squares(torch.ones(0), torch.ones(0)) == (0, 1)


def test_hand_numbers_of_the_fitted_baseline():
    """Group b: v 0.2 with a wrong answer and 0.7 with a right one, so a = -0.4 and c = 2 are exact for group a."""
    v = tensors([0.5, 0.6, 0.9], [0.5, 0.3], [0.2], [0.7], width=4)
    region, response = mask(2, 1, 0, 0, width=3), mask(3, 2, 2, 2, width=3)
    correct = torch.tensor([1, 0, 0, 1])
    F = fitted_progress(v, correct, region, response, ["a", "a", "b", "b"], price=0.1)
    # costs to go of a: 0.2, 0.1, 0 at the exit; 0.1, 0. Those of the other: 0.1, 0 and nobody there; 0.2, 0.1
    wanted = [1 - 0.2 - (0.6 - 0.1), 1 - 0.1 - (0.8 - 0), 1 - 0 - (1.4 - 0)]
    assert F[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert F[1].tolist() == pytest.approx([0 - 0.1 - (0.6 - 0.2), 0 - 0 - (0.2 - 0.1), 0], abs=1e-6)


def plain_fitted(v, right, regions, lengths, groups, price):
    """The form's equation, one number at a time; least squares by numpy."""
    import numpy

    ends = [R + (length > R) for R, length in zip(regions, lengths, strict=True)]
    result = []
    for i, R in enumerate(regions):
        points = [
            (v[j][t - 1], right[j]) for j in range(len(v)) if groups[j] != groups[i] for t in range(1, ends[j] + 1)
        ]
        c, a = numpy.polyfit(*zip(*points, strict=True), 1) if points else (1, 0)
        row = []
        for t in range(1, ends[i] + 1):
            there = [j for j in range(len(v)) if j != i and groups[j] == groups[i] and t <= ends[j]]
            cost = sum(price * max(regions[j] - t + 1, 0) for j in there) / max(len(there), 1)
            row.append(right[i] - price * max(R - t + 1, 0) - (a + c * v[i][t - 1] - cost))
        result.append(row)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_the_fitted_baseline_is_its_equation(seed):
    rng = random.Random(seed)
    B, T = rng.randint(1, 7), rng.randint(3, 9)
    groups = [rng.randint(0, 2) for _ in range(B)]
    lengths = [rng.randint(2, T) for _ in range(B)]
    regions = [rng.randint(1, n) for n in lengths]
    regions[0] = lengths[0]  # cut: no exit marker
    right = [rng.randint(0, 1) for _ in range(B)]
    v = [[rng.random() for _ in range(R + 1)] for R in regions]
    wanted = plain_fitted(v, right, regions, lengths, groups, 0.05)
    masks = mask(*regions, width=T), mask(*lengths, width=T)
    F = fitted_progress(tensors(*v, width=T + 1), torch.tensor(right), *masks, groups, 0.05)
    for got, row in zip(F.tolist(), wanted, strict=True):
        assert got == pytest.approx([*row, *[0.0] * (T - len(row))], abs=1e-4)


def test_the_baseline_does_not_depend_on_the_completion_that_it_is_for():
    """Its own outcome moves its own advantage alone in its group: the baseline has no part of it, so no bias."""
    v = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    masks, index = (mask(*[3] * 6, width=4), mask(*[4] * 6, width=4)), [0, 0, 1, 1, 2, 2]
    wrong, right = (fitted_progress(v, torch.tensor([r, 0, 1, 0, 1, 1]), *masks, index, 0.1) for r in (0, 1))
    assert torch.allclose(right[0] - wrong[0], torch.ones(4)) and torch.equal(right[1], wrong[1])
    later = v.clone()
    later[0, 2:] = 0.5  # what it came to later
    changed = fitted_progress(later, torch.tensor([0, 0, 1, 0, 1, 1]), *masks, index, 0.1)
    assert torch.equal(changed[:2, :2], wrong[:2, :2])


def test_where_everything_is_right_or_wrong_only_the_price_is_left():
    v = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    masks, index = (mask(4, 2, 3, 3, width=4), mask(4, 3, 4, 4, width=4)), ["a", "a", "b", "b"]
    for right in (0, 1):
        correct = torch.full((4,), right)
        assert torch.allclose(fitted_progress(v, correct, *masks, index), torch.zeros(4, 4), atol=1e-6)
        F = fitted_progress(v, correct, *masks, index, price=0.1)
        # 0.4 against 0.2, 0.3 against 0.1, 0.2 against 0 at the exit, 0.1 alone; then the mirror image
        assert F[0].tolist() == pytest.approx([-0.2, -0.2, -0.2, -0.1], abs=1e-6)
        assert F[1].tolist() == pytest.approx([0.2, 0.2, 0.2, 0], abs=1e-6)
        assert torch.allclose(F[2:], torch.zeros(2, 4), atol=1e-6)  # equally long


def test_a_prompt_alone_has_v_itself_as_its_baseline():
    F = fitted_progress(torch.tensor([[0.3, 0.8]]), torch.tensor([1]), torch.ones(1, 1), torch.ones(1, 1), ["a"])
    assert F.tolist() == [[pytest.approx(0.7)]]


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
        (dict(outcome=-1), "iapo.outcome: -1 must be a number >= 0."),
        (
            dict(outcome=0, progress=0),
            "iapo.outcome: 0 leaves no term to train with; set it to 1 or give another term a weight.",
        ),
        (dict(progress_form="ridge"), "iapo.progress_form: 'ridge' must be one of to_go, fitted."),
        (
            dict(progress_form="fitted", gamma=0.9),
            "iapo.gamma: 0.9 has no effect with iapo.progress_form=fitted; leave it 1.0.",
        ),
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
    assert config(progress_form="fitted").needs_correctness
    assert not IapoConfig(outcome=0.5).is_grpo
