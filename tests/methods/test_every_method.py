"""What holds for every method that a recipe names. The numbers of a method are in its own test."""

import json
from dataclasses import MISSING, fields
from functools import cache

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import agg_loss

from iapo.launch.compose import recipes_dir, settings_of
from iapo.methods import HOOKS, OPTIONAL, acts_by, make_methods
from tests.methods.batches import make_batch, make_rows, row_lists, step


def sections():
    """The methods section of each recipe that has one. Values that refer to others are replaced by a length."""
    for path in sorted((recipes_dir() / "variant").glob("*.yaml")):
        for name, section in (yaml.safe_load(path.read_text()).get("methods") or {}).items():
            refers = {key for key, value in section.items() if str(value).startswith("${")}
            yield name, section | dict.fromkeys(refers, 8), refers


SECTIONS = {name: (section, refers) for name, section, refers in sections()}
every_method = pytest.mark.parametrize("name", SECTIONS)
LOSS_AGG_MODE = "actor_rollout_ref.actor.loss_agg_mode"


def make(name):
    return make_methods({name: SECTIONS[name][0]})[name]


@cache
def loss_agg_mode(name):
    """As the recipe sets it, else as all recipes share it. Composing a whole configuration would take a second."""
    shared = yaml.safe_load((recipes_dir() / "defaults.yaml").read_text())
    return settings_of(name).get(LOSS_AGG_MODE, shared["actor_rollout_ref"]["actor"]["loss_agg_mode"])


@every_method
def test_the_recipe_lists_every_knob_with_its_default(name):
    section, refers = SECTIONS[name]
    knobs = {field.name: field for field in fields(make(name)) if field.init}
    assert set(section) - {"_target_"} == set(knobs)
    assert not set(knobs) & set(HOOKS)  # it would hide the hook
    for key in set(knobs) - refers:
        assert knobs[key].default is not MISSING and section[key] == knobs[key].default, key


@every_method
def test_it_acts_and_says_what_it_reads(name):
    method = make(name)
    assert acts_by(method)
    assert set(method.ignores) <= {*HOOKS, "overlong", "filter_groups"}
    batch = make_batch(make_rows([4, 4]))
    unread = set(OPTIONAL) - set(method.needs)
    for field in unread:
        object.__setattr__(batch, field, None)
    step(method, batch)


@every_method
@settings(max_examples=50)
@given(rows=row_lists, extra=st.integers(0, 3))
def test_padding_changes_nothing(name, rows, extra):
    advantages, mask = step(make(name), make_batch(rows))
    padded, padded_mask = step(make(name), make_batch(rows, extra=extra))
    T = advantages.shape[1]
    torch.testing.assert_close(padded[:, :T], advantages)
    assert torch.equal(padded_mask[:, :T], mask)
    assert not padded[:, T:].any() and not padded_mask[:, T:].any()
    assert torch.isfinite(advantages).all()
    outside = make_batch(rows).response_mask == 0
    assert not advantages[outside].any() and not mask[outside].any()


@every_method
@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(9)))
def test_the_order_of_completions_changes_nothing(name, seed, order):
    rows = make_rows([4, 5], seed, distinct=True)
    if name == "grpo_lambda":  # it takes the first of equally accurate groups
        assume(sum(row.correct for row in rows[:4]) / 4 != sum(row.correct for row in rows[4:]) / 5)
    advantages, mask = step(make(name), make_batch(rows))
    permuted, permuted_mask = step(make(name), make_batch([rows[i] for i in order]))
    torch.testing.assert_close(permuted, advantages[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(permuted_mask, mask[order])


@every_method
@settings(max_examples=50)
@given(rows=row_lists, cut=st.integers(1, 23))
def test_micro_batches_add_up_to_the_loss_of_the_batch(name, rows, cut):
    """A method sees the whole batch. What could go wrong is the way in which its recipe averages the loss."""
    advantages, mask = step(make(name), make_batch(rows))
    ratios = torch.ones_like(advantages).requires_grad_()

    def gradient(parts):
        for part in parts:  # as in verl's ppo_loss: a micro-batch's sum is divided by counts of the whole batch
            counts = {"batch_num_tokens": mask.sum(), "global_batch_size": len(mask)}
            agg_loss(-advantages[part] * ratios[part], mask[part], loss_agg_mode(name), **counts).backward()
        result, ratios.grad = ratios.grad, None
        return result

    torch.testing.assert_close(
        gradient([slice(0, cut), slice(cut, None)]), gradient([slice(None)]), atol=1e-6, rtol=1e-5
    )


@every_method
@pytest.mark.parametrize("groups", [[[True] * 4], [[False] * 4], [1], [1, 1, 1], [[True]], [[False] * 3, [True] * 3]])
@pytest.mark.parametrize("longest", [1, 6])
def test_degenerate_groups_give_finite_advantages(name, groups, longest):
    """All right, all wrong, alone, of one token. The tests against plain Python check their values."""
    advantages, mask = step(make(name), make_batch(make_rows(groups, longest=longest)))
    assert torch.isfinite(advantages).all() and mask.any()


@every_method
def test_a_resumed_method_gives_what_it_would_have_given_without_the_stop(name):
    one, first = make(name), make(name)
    batches = [make_batch(make_rows([4, 4, 4], seed), step=seed + 1) for seed in range(6)]
    for batch in batches[:3]:
        step(one, batch)
        step(first, batch)
    second = make(name)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[3:]:
        for mine, resumed in zip(step(one, batch), step(second, batch), strict=True):
            assert torch.equal(mine, resumed)
    assert one.state_dict() == second.state_dict()
