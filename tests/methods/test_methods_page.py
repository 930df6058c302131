"""docs/methods.md is what its generator makes of the recipes and docstrings."""

import re

import pytest

from iapo.tools import methods_page
from iapo.tools.methods_page import attributes, markdown, page, shown

BASE = """\
# @package _global_
# Calm (arXiv 1234.56789, section 2): a loss for
# patient people.
#
#     A_i = 0
#
# Source: section 2.
actor_rollout_ref:
  actor:
    use_kl_loss: false
"""
SHORT = """\
# @package _global_
# Short (Smith et al., arXiv 2345.67890): short answers.
defaults:
  - calm
methods:
  short:
    _target_: tests.methods.test_methods_page.Short
    share: ${iapo.part:${data.max_response_length},2/3}
"""


class Short(methods_page.Method):
    """Says it shortly.

        r' = a
             + |b|

    Differences: none.

    Attributes:
        share: of the tokens | words
            that count.
    """

    def loss_mask(self, batch, advantages, mask):
        return batch.response_mask


def test_the_page_is_up_to_date():
    methods_page.main(["--check"])  # else it exits with the command that writes the page


def test_a_stale_page_is_refused_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(methods_page, "PAGE", tmp_path / "methods.md")
    stale = r"^iapo.tools.methods_page: docs/methods.md: stale; run python -m iapo.tools.methods_page$"
    with pytest.raises(SystemExit, match=stale):
        methods_page.main(["--check"])
    methods_page.main([])
    methods_page.main(["--check"])
    (tmp_path / "methods.md").write_text("another")
    with pytest.raises(SystemExit, match=stale):
        methods_page.main(["--check"])


def test_the_sections_by_hand():
    calm, short = page({"short": SHORT, "calm": BASE}).split("\n## ")[1:]
    assert calm.strip().splitlines() == [
        "`calm`",
        "",
        "**Calm**: a loss for patient people.",
        "",
        "- paper: arXiv [1234.56789](https://arxiv.org/abs/1234.56789)",
        "- acts on: loss",
        "",
        "```text",
        "A_i = 0",
        "```",
        "",
        "**Source:** section 2.",
        "",
        "Settings of verl:",
        "",
        "- `actor_rollout_ref.actor.use_kl_loss`: `false`",
    ]
    assert short.strip().splitlines()[4:] == [
        "- paper: arXiv [2345.67890](https://arxiv.org/abs/2345.67890)",
        "- acts on: loss mask, loss",
        "- builds on: [`calm`](#calm)",
        "- code: [tests/methods/test_methods_page.py](../tests/methods/test_methods_page.py)",
        "",
        "Says it shortly.",
        "",
        "```text",
        "r' = a",
        "     + |b|",
        "```",
        "",
        "**Differences:** none.",
        "",
        "| knob | recipe's value | meaning |",
        "| --- | --- | --- |",
        r"| `methods.short.share` | `2/3 of data.max_response_length` | of the tokens \| words that count |",
    ]


def test_equations_on_both_sides_of_an_empty_line_share_a_fence():
    assert markdown("    a = 1\n\n    b = 2\n\ntext") == "```text\na = 1\n\nb = 2\n```\n\ntext"


@pytest.mark.parametrize(
    "value,expected", [(None, "null"), (True, "true"), (0.5, "0.5"), ("${seed}", "seed"), ([8, 4], "[8, 4]")]
)
def test_values_read_as_on_the_command_line(value, expected):
    assert shown(value) == expected


def test_a_class_inherits_what_its_base_says_of_a_knob():
    from iapo.methods.grpo_s import GrpoS
    from iapo.methods.gtpo import Gtpo

    assert attributes(GrpoS)["alpha"] == attributes(Gtpo)["alpha"] != ""


@pytest.mark.parametrize(
    "recipe,message",
    [
        ("# @package _global_\nseed: 1\n", r"^x.yaml: '' must be 'NAME \(arXiv NUMBER\): what it does.', as its first"),
        (
            "# X (arXiv 1234.56789): does.\nseed: 1\n",
            r"^x.yaml: seed: acts on something unknown; add it to .*ACTS_ON.$",
        ),
        (SHORT.replace("share:", "part:").replace("  - calm\n", "  []\n"), r"^Short.part: is not in the docstring; "),
    ],
)
def test_a_recipe_that_the_page_can_t_show_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        page({"x": recipe})


def test_every_method_says_where_it_is_from_and_how_it_differs():
    sections = methods_page.PAGE.read_text().split("\n## ")[1:]
    of_classes = [section for section in sections if "- code:" in section]
    assert len(of_classes) >= 10
    for section in of_classes:
        for part in ("```text\n", "**Source:** ", "**Differences:** "):
            assert part in section, (section.splitlines()[0], part)


def test_no_line_of_the_page_becomes_a_list_by_chance():
    """A sentence that wraps before "- " or "1. " would."""
    prose = re.sub(r"```.*?```", "", methods_page.PAGE.read_text(), flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if re.match(r"[+*>] |\d+[.)] |- (?!paper|acts|builds|code|`)", line)]
    assert lines == []
