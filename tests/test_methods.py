"""The protocol of methods: who may act with whom, and what several make of a batch."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from iapo.methods import (
    Method,
    acts_by,
    check_number,
    conflicts,
    load_states,
    make_methods,
    mask_tokens,
    save_states,
    select,
    weigh,
)
from iapo.methods.gtpo_trajectory import GtpoTrajectory
from tests.methods.batches import make_batch, make_rows


class Doubled(Method):
    def shape_reward(self, batch):
        return batch.rewards * 2


class Plus(Method):
    def shape_reward(self, batch):
        return batch.rewards + 1


class Right(Method):
    needs = ("correct",)

    def keep_completions(self, batch):
        return batch.correct


class Own(Method):
    ignores: ClassVar = {"shape_reward": "it judges by correctness alone", "overlong": "it judges by correctness alone"}

    def outcome_advantage(self, batch):
        return batch.response_mask.float()


class First(Method):
    """Weighs the first token threefold."""

    def token_weight(self, batch, advantages):
        weight = torch.ones_like(advantages)
        weight[:, 0] = 3
        return weight


class Even(Method):
    """The loss of every second token."""

    def loss_mask(self, batch, advantages, mask):
        return torch.arange(advantages.shape[1]) % 2 == 0


class Nothing(Method):
    def loss_mask(self, batch, advantages, mask):
        return torch.zeros_like(advantages)


def test_a_method_acts_by_the_hooks_that_it_overrides():
    assert acts_by(Doubled()) == ["shape_reward"]
    assert acts_by(Even()) == ["loss_mask"]
    assert acts_by(Method()) == []


@pytest.mark.parametrize(
    "methods,message",
    [
        (
            [Doubled, Plus],
            "methods: Doubled and Plus have their own shape_reward, but only one method of a run may; choose one.",
        ),
        ([Own, Doubled], "the shape_reward of Doubled has no effect with Own: it judges by correctness alone; drop"),
        ([Doubled, Own], "the shape_reward of Doubled has no effect with Own: it judges by correctness alone; drop"),
        ([Doubled, Right, First, Even], None),
        ([Own, Right], None),
    ],
)
def test_who_may_act_with_whom(methods, message):
    found = list(conflicts({method.__name__: method() for method in methods}))
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_rewards_selection_weights_and_masks_act_one_after_the_other():
    batch = make_batch(make_rows([[True, False, True]], longest=4, distinct=True))
    final, kept = select([Doubled(), Right()], batch)
    assert kept.tolist() == [True, False, True]
    assert torch.equal(final.rewards, 2 * batch.rewards) and torch.equal(final.group, batch.group)
    weighed = weigh([First(), Even()], final, 0.5 * final.response_mask)
    expected = 0.5 * final.response_mask
    expected[:, 0] *= 3
    assert torch.equal(weighed, expected)
    masked, mask = mask_tokens([First(), Even()], final, weighed)
    even = (torch.arange(weighed.shape[1]) % 2 == 0) & final.response_mask.bool()
    assert torch.equal(masked, expected * even) and torch.equal(mask.bool(), even)


def test_a_mask_that_leaves_nothing_leaves_advantages_of_zero():
    batch = make_batch(make_rows([3]))
    masked, mask = mask_tokens([Nothing()], batch, torch.ones(batch.response_mask.shape))
    assert not masked.any() and torch.equal(mask, batch.response_mask)


class Curious(Method):
    needs = ("truth",)


def test_states_travel_with_a_checkpoint_and_a_missing_one_is_named(tmp_path):
    methods = {"g": GtpoTrajectory()}
    methods["g"].load_state_dict({"initial_entropy": 0.5})
    save_states(methods, tmp_path)
    fresh = {"g": GtpoTrajectory()}
    load_states(fresh, tmp_path)
    assert fresh["g"].state_dict() == {"initial_entropy": 0.5}
    for folder, name in ((tmp_path, "h"), (tmp_path / "older", "g")):
        with pytest.raises(ValueError, match=rf"^methods.{name}: {folder}/methods.json has no state of it; choose"):
            load_states({name: GtpoTrajectory()}, folder)


@pytest.mark.parametrize(
    "section,message",
    [
        ({"_target_": "iapo.methods.gfpo.Gfpo", "k": 0}, "^methods.x.k: 0 must be a whole number of at least 2.$"),
        ({"_target_": "iapo.methods.gfpo.Nothing"}, "^methods.x: iapo.methods.gfpo.Nothing can't be made of {}"),
        ({"_target_": "iapo.methods.gfpo.Gfpo", "kk": 3}, "^methods.x: .*unexpected keyword argument 'kk'"),
        (
            {"_target_": "tests.test_methods.Curious"},
            "^methods.x: its class needs truth, which no batch has; choose from correct, tokens, entropy.$",
        ),
        ({"k": 3}, "^methods.x: {'k': 3} lacks _target_, the class; choose it by variant=x.$"),
        (None, "^methods.x: None lacks _target_"),
        (3, "^methods.x: 3 lacks _target_"),
        ({"_target_": "tests.methods.batches.Row"}, "^methods.x: tests.methods.batches.Row can't be made of {}"),
        (
            {"_target_": "collections.Counter"},
            "^methods.x: .* \\(it is no iapo.methods.Method\\); correct the class or its knobs.$",
        ),
        ({"_target_": "os.getcwd"}, "^methods.x: os.getcwd can't be made of {}"),
    ],
)
def test_a_section_that_makes_no_method_gets_one_line(section, message):
    with pytest.raises(ValueError, match=message) as error:
        make_methods({"x": section})
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "value,limits,message",
    [
        (3, {}, None),
        (-1.5, {"low": -float("inf")}, None),
        (-1, {}, "^x: -1 must be a number of at least 0.$"),
        (1.5, {"high": 1}, "^x: 1.5 must be a number from 0 to 1.$"),
        (1.5, {"whole": True}, "^x: 1.5 must be a whole number of at least 0.$"),
        (True, {}, "^x: True must be a number"),
        ("high", {"low": -float("inf")}, "^x: 'high' must be a number.$"),
        (float("nan"), {"low": -float("inf")}, "^x: nan must be a number.$"),
        (-float("inf"), {"low": -float("inf")}, "^x: -inf must be a number.$"),
    ],
)
def test_the_limits_of_a_number(value, limits, message):
    if message is None:
        return check_number("x", value, **limits)
    with pytest.raises(ValueError, match=message):
        check_number("x", value, **limits)


def test_a_field_that_no_method_asked_for_is_named():
    batch = make_batch(make_rows([2]))
    assert batch.needed("tokens") is batch.tokens
    with pytest.raises(ValueError, match=r"^entropy: None; the method that reads it must list it in `needs`.$"):
        replace(batch, entropy=None).needed("entropy")


def test_a_methods_section_that_is_no_mapping_gets_one_line():
    with pytest.raises(ValueError, match=r"^methods: 'gfpo' must be a mapping"):
        make_methods("gfpo")
