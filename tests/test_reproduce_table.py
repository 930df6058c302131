"""The table's plan, choice of knobs, resume, stops and pages, with a stand-in for the training."""

import importlib.util
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table import jobs, pareto, picture
from benchmarks.table import reproduce_table as rt
from benchmarks.table.kept import KEEPING, RATIO, counts, kept_figures, oracle_front
from benchmarks.table.pages import regret_of
from benchmarks.table.paired import differences
from benchmarks.table.plan import TABLES, UNTRAINED, Method, load_methods, read_table, resolved_config
from benchmarks.table.table import COMPLETION_S, START_S, Outcome, Table, as_json, nearest, preference
from iapo.launch.folder_lock import FolderInUse, lock
from iapo.tasks import checked_registers, worked_sums
from iapo.tasks.embedded import TASKS
from iapo.tools.evaluate import Sample, read_prompts

ROOT = Path(__file__).parent.parent
FAKE_TRAIN = [sys.executable, "-u", str(ROOT / "tests/fake_train.py")]
METHODS = load_methods(TABLES / "table.yaml")
TASK_NAMES = ", ".join(TASKS)
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl isn't installed")

SMALL = {
    "task": "verbose_arithmetic",
    "model": "tiny",
    "full": {"steps": 4, "samples": 2, "seeds": [0, 1], "step_s": 7.0},
    "quick": {"steps": 2, "samples": 1, "seeds": [0], "step_s": 1.0, "overrides": ["data.train_batch_size=8"]},
    "methods": {
        "grpo": {"knob": "actor.kl", "values": [0.1, 0.2], "why": "w"},
        "dapo": {"why": "w"},
        "gfpo": {"knob": "methods.gfpo.k", "values": [4, 2, 6], "why": "w"},
    },
}


def config_of(job):
    """What fake_train writes as config.yaml."""
    return json.dumps(dict(argument.split("=", 1) for argument in job.arguments))


def write_table(tmp_path, name="table", **changed):
    """SMALL with other sections, as a table of the command."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(SMALL | changed, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def small_table(tmp_path, monkeypatch):
    write_table(tmp_path)
    monkeypatch.setattr(rt.make_plan, "__defaults__", (tmp_path,))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("IAPO_DATA_DIR", "set back at the end")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_plan(tmp_path, *arguments):
    return rt.make_plan(rt.parse(["--out", str(tmp_path / "out"), *arguments]))


def reproduce(tmp_path, monkeypatch, *arguments, **script):
    """Run the command; returns its exit status and the runs that it started: (name, val_only, RAY_ADDRESS)."""
    monkeypatch.setenv("FAKE", json.dumps(script))
    calls = tmp_path / "out/runs/calls"
    calls.unlink(missing_ok=True)
    status = rt.main(["--out", str(tmp_path / "out"), *arguments], FAKE_TRAIN, config_of, interval_s=0.05)
    return status, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


# --- the plan ---


def real_plan(tmp_path, name="table", *arguments):
    return rt.make_plan(rt.parse(["--out", str(tmp_path), "--table", name, *arguments]), TABLES)


ROWS = [(path.stem, name) for path in sorted(TABLES.glob("*.yaml")) for name in load_methods(path)]


@needs_verl
@pytest.mark.parametrize("table,name", ROWS, ids=map("-".join, ROWS))
def test_the_runs_of_the_real_tables_are_accepted_and_start_from_the_recipes_default(tmp_path, table, name):
    """The first and the last value of a knob; test_fingerprint.py has all of the first table."""
    from omegaconf import OmegaConf

    from iapo.launch.compose import resolve

    plan = real_plan(tmp_path, table)
    method = plan.methods[name]
    for value in dict.fromkeys((method.values[0], method.values[-1])):
        config = OmegaConf.create(resolved_config(plan.job(name, value, 0)))
        assert [OmegaConf.select(config, key) for key in method.knob] == [value] * len(method.knob)
        for key, _, fixed in (override.partition("=") for override in method.fixed):
            assert str(OmegaConf.select(config, key)).lower() == fixed
    default = resolve(["platform=cpu", f"variant={method.variant}"])
    updates = config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert updates == (1 if table == "table" else 16 / default.actor_rollout_ref.actor.ppo_mini_batch_size)
    of_recipe = [OmegaConf.select(default, key) for key in method.knob]
    own = [override for override in method.fixed if not override.startswith("actor_rollout_ref.actor.optim.lr=")]
    assert (of_recipe == [method.values[0]] * len(method.knob) and not own) == method.quick


@needs_verl
def test_the_untrained_model_is_only_validated(tmp_path):
    from omegaconf import OmegaConf

    plan = replace(real_plan(tmp_path), overrides=("trainer.val_only=false",))
    config = OmegaConf.create(resolved_config(plan.job(UNTRAINED, None, 0)))
    assert config.trainer.val_only and config.trainer.val_before_train


def test_a_row_may_name_several_variants(tmp_path):
    plan = real_plan(tmp_path)
    assert METHODS["iapo_rate+dapo"].variant == "[dapo,iapo_rate]" and METHODS["dapo"].variant == "dapo"
    assert "variant=[dapo,iapo_rate]" in plan.job("iapo_rate+dapo", 2.0, 0).arguments
    assert "variant=grpo" in plan.job(UNTRAINED, None, 0).arguments


def known(plan):
    """The runs of a plan whose values are all trained with all seeds."""
    return Table.known(SimpleNamespace(plan=plan, tried=lambda method: method.values))


def test_full_and_quick_plans(tmp_path):
    full = make_plan(tmp_path)
    assert (full.steps, full.samples, full.seeds, full.splits) == (4, 2, (0, 1), ("validation", "test"))
    # 2 of the untrained model, 2 + 1 + 3 of the grid, 3 of the second seed
    assert full.jobs == 11
    quick = make_plan(tmp_path, "--quick", "--methods", "gfpo", "--steps", "7", "a.b=c")
    assert (quick.steps, quick.samples, quick.seeds, quick.splits) == (7, 1, (0,), ("test",))
    assert list(quick.methods) == ["gfpo"] and quick.methods["gfpo"].values == (4,) and quick.jobs == 2
    assert quick.overrides == ("data.train_batch_size=8", "a.b=c")
    assert "a.b=c" in quick.job("gfpo", 4, 0).arguments and "methods.gfpo.k=4" in quick.job("gfpo", 4, 0).arguments
    assert list(make_plan(tmp_path, "--methods", "gfpo").methods) == ["grpo", "gfpo"]  # the rule needs GRPO
    folders = [full.job(*run).folder for run in known(full)]
    assert len(set(folders)) == len(folders)


def test_quick_leaves_out_other_forms_unless_they_are_asked_for(tmp_path):
    for table in dict(ROWS):
        full, quick = (real_plan(tmp_path, table, *arguments).methods for arguments in ((), ("--quick",)))
        assert set(quick) == {name for name, method in full.items() if method.quick} < set(full)
    assert list(real_plan(tmp_path, "table", "--quick", "--methods", "gtpo_side").methods) == ["gtpo_side"]


# --- several tables ---


def test_a_table_has_its_task_model_and_folder_and_what_all_of_its_rows_share(tmp_path):
    write_table(tmp_path, "sums", task="worked_sums", model="mine", shared=["a.b=${c.d}"])
    out = [rt.make_plan(rt.parse(["--table", "sums", *more])).out for more in ([], ["--quick"])]
    assert [path.relative_to(Path.cwd()) for path in out] == [Path("runs/sums"), Path("runs/sums-quick")]
    plan = make_plan(tmp_path, "--table", "sums", "a.b=2")
    for arguments in (plan.job("gfpo", 4, 0).arguments, plan.job(UNTRAINED, None, 0).arguments):
        assert {"model=mine", "data=worked_sums", "a.b=${c.d}"} <= set(arguments)
        assert arguments.index("a.b=${c.d}") < arguments.index("a.b=2")  # the command line has the last word
    assert plan.data_file("test") == tmp_path / "out/data/worked_sums/test.parquet"
    assert make_plan(tmp_path).shared == () and make_plan(tmp_path).model == "tiny"


@pytest.mark.e2e
def test_a_folder_of_another_table_is_refused(tmp_path, monkeypatch, capsys):
    write_table(tmp_path, "sums", task="worked_sums")
    assert reproduce(tmp_path, monkeypatch, "--quick")[0] == 0
    capsys.readouterr()
    assert reproduce(tmp_path, monkeypatch, "--quick", "--table", "sums") == (2, [])
    assert "holds a table with table=table, but now it is sums; set it back" in capsys.readouterr().err
    file = tmp_path / "out/settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("table") == "table"
    file.write_text(json.dumps(settings))  # as in the committed records
    assert reproduce(tmp_path, monkeypatch, "--quick") == (0, [])


@pytest.mark.parametrize(
    "changed,message",
    [
        (
            {"models": "tiny"},
            "models is unknown; a table has task, model, like, shared, full, quick and methods.",
        ),
        ({"task": "gsm8k"}, f"task: 'gsm8k' must be one of {TASK_NAMES}."),
        ({"task": ["gsm8k"]}, f"task: ['gsm8k'] must be one of {TASK_NAMES}."),
        ({"model": None}, "model: None must name one, as in model=tiny."),
        ({"quick": []}, "quick is missing, or is no mapping."),
        ({"shared": "lr"}, "shared: 'lr' must be key=value."),
        ({"shared": ["a=1", 2]}, "shared: 2 must be key=value."),
        ({"shared": ["+seed=3"]}, "shared: +seed=3 sets what the table sets elsewhere; drop it."),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, changed, message):
    with pytest.raises(ValueError) as refused:
        read_table(write_table(tmp_path, **changed))
    assert str(refused.value) == f"table.yaml: {message}"


def test_a_table_may_be_like_another_one(tmp_path):
    path = tmp_path / "registers.yaml"
    path.write_text("task: checked_registers\nlike: table\nmethods: {gfpo: {values: [6, 8]}, laser: {why: new}}")
    content = read_table(path)
    assert (content["task"], content["model"], content["full"]) == ("checked_registers", "tiny", SMALL["full"])
    assert content["methods"] == SMALL["methods"] | {
        "gfpo": {"knob": "methods.gfpo.k", "values": [6, 8], "why": "w"},
        "laser": {"why": "new"},
    }
    for other in ("registers", "nothing"):
        path.write_text(f"task: checked_registers\nlike: {other}")
        with pytest.raises(ValueError, match=f"^registers.yaml: like: '{other}' must be a table of this folder that"):
            read_table(path)
    write_table(tmp_path, "third", like="table")
    (tmp_path / "broken.yaml").write_text("methods: {")
    path.write_text("task: checked_registers\nlike: broken")
    with pytest.raises(ValueError, match=r"^broken\.yaml: no YAML: "):
        read_table(path)
    path.write_text("task: checked_registers\nlike: third")
    with pytest.raises(ValueError, match="like: 'third' must be"):
        read_table(path)


def test_a_row_may_fix_more_than_its_knob(tmp_path):
    row = {"variant": "gfpo", "set": ["a.b=all", "+c=1"], "knob": "k", "values": [4, 2], "why": "w"}
    write_table(tmp_path, methods=SMALL["methods"] | {"control": row})
    plan = make_plan(tmp_path)
    for value in (4, 2):
        assert plan.job("control", value, 0).arguments[-5:-2] == ("a.b=all", "+c=1", f"k={value}")
    assert "a.b=all" not in plan.job("gfpo", 4, 0).arguments
    with pytest.raises(ValueError, match=r"^a.b=none: the table sets a.b; use --table, "):
        make_plan(tmp_path, "a.b=none")


def test_a_row_may_have_fewer_seeds(tmp_path):
    write_table(tmp_path, methods=SMALL["methods"] | {"gfpo": SMALL["methods"]["gfpo"] | {"seeds": 2}})
    plan = make_plan(tmp_path, "--seeds", "7,8,9")
    assert plan.seeds_of("gfpo") == (7, 8) and plan.seeds_of("dapo") == plan.seeds_of(UNTRAINED) == (7, 8, 9)
    # 3 of the untrained model, 2 + 1 + 3 of the grid, 2 + 2 + 1 further seeds
    assert plan.jobs == 14
    assert {seed for name, _, seed in known(plan) if name == "gfpo"} == {7, 8}
    assert make_plan(tmp_path, "--seeds", "7").seeds_of("gfpo") == (7,)


def test_the_rows_that_a_choice_looks_at_are_added(tmp_path):
    control = {"knob": "k", "values": [1, 2], "match": "dapo", "why": "w"}
    write_table(tmp_path, methods=SMALL["methods"] | {"control": control})
    assert list(make_plan(tmp_path, "--methods", "control").methods) == ["grpo", "dapo", "control"]
    assert list(make_plan(tmp_path, "--quick", "--methods", "control").methods) == ["control"]


def test_nearest_by_hand():
    grid = {1: figures(0.9, 50), 2: figures(0.8, 44), 3: figures(0.1, 40)}
    assert [nearest(grid, tokens) for tokens in (60, 47.1, 47, 43, 42, 0)] == [1, 1, 1, 2, 2, 3]


def test_each_prompt_is_sampled_as_often_as_asked(tmp_path):
    rt.open_folder(plan := make_plan(tmp_path, "--samples", "3"))
    rows = pq.read_table(plan.data_file("evaluation")).to_pylist()
    prompts = [row["prompt"][0]["content"] for row in rows]
    expected = [*read_prompts(plan.data_file("validation")), *read_prompts(plan.data_file("test"))]
    assert sorted(prompts) == sorted(3 * expected)
    # What seeds a completion (iapo.verl_adapter.agent_loop).
    assert len({(row["extra_info"]["split"], row["extra_info"]["index"]) for row in rows}) == len(rows) == 3 * 512
    original = {row["prompt"][0]["content"]: row for row in pq.read_table(plan.data_file("test")).to_pylist()}
    for row in rows:
        if row["extra_info"]["split"] == "test":
            assert row["reward_model"] == original[row["prompt"][0]["content"]]["reward_model"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--methods", "grpo,nothing"], "--methods: 'nothing' must be one of grpo, dapo, gfpo."),
        (["--steps", "0"], "--steps: 0 must be at least 1."),
        (["--jobs", "0"], "--jobs: 0 must be at least 1."),
        (["--seeds", "0,x"], "--seeds: '0,x' must be whole numbers such as 0,1,2."),
        (["lr"], "lr: an argument for the runs is key=value."),
        (["--table", "sums"], "--table: 'sums' must be one of table."),
        (
            ["seed=7"],
            "seed=7: the table sets seed; use --table, --seeds, --steps, --samples, --out, or change table.yaml.",
        ),
        (
            ["--quick", "--methods", "gfpo", "+methods.gfpo.k=3"],
            "+methods.gfpo.k=3: the table sets methods.gfpo.k; use --table, --seeds, --steps, --samples, --out, or "
            "change table.yaml.",
        ),
    ],
)
def test_refusals_are_one_line(tmp_path, capsys, arguments, message):
    assert rt.main(["--out", str(tmp_path / "out"), *arguments], FAKE_TRAIN, config_of) == 2
    assert capsys.readouterr().err == f"table: {message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entry", [{"knob": "a.b"}, {"values": [1]}, {"knob": "a", "values": [1, 2, 3, 4, 5]}])
def test_a_method_has_a_knob_and_a_few_values_or_neither(tmp_path, entry):
    path = write_table(tmp_path, methods={"m": entry | {"why": "w"}})
    with pytest.raises(ValueError, match=r"methods\.m needs both knob and 1 to 4 values, or neither"):
        load_methods(path)


@pytest.mark.parametrize(
    "text,message",
    [
        ("methods: {m: {knob: a, values: [1]}}", "methods.m.why is missing; say in a line why these values."),
        ("methods: {m: }", "methods.m.why is missing; say in a line why these values."),
        (
            "methods: {m: {why: w, knobs: a}}",
            "methods.m.knobs is unknown; an entry has why, variant, set, knob, values, match, seeds, quick, "
            "run_again and family.",
        ),
        ("methods: {m: {why: w, set: lr}}", "methods.m.set: 'lr' must be key=value."),
        (
            "methods: {m: {why: w, set: a=1, knob: a, values: 2}}",
            "methods.m.set: a=1 sets what the table sets elsewhere; drop it.",
        ),
        (
            "methods: {m: {why: w, seeds: 0}}",
            "methods.m.seeds: 0 must be how many of the table's seeds it takes, at least 1.",
        ),
        (
            "methods: {m: {why: w, seeds: [0, 1]}}",
            "methods.m.seeds: [0, 1] must be how many of the table's seeds it takes, at least 1.",
        ),
        (
            "methods: {m: {why: w, family: short}}",
            "methods.m.family: 'short' must be one of information, length, control, neither.",
        ),
        (
            "methods: {grpo: {why: w, seeds: 1}}",
            "methods.grpo.seeds: all rows are compared with it; leave it out.",
        ),
        (
            "methods: {m: {why: w, match: n}, n: {why: w}}",
            "methods.m.match: 'n' must name a row, and there must be a knob to choose.",
        ),
        *(
            (f"methods: {text}", f"methods.{name}.match: '{match}' must be another row without one, and grpo has none.")
            for text, name, match in (
                ("{m: {why: w, knob: a, values: 1, match: n}}", "m", "n"),
                ("{m: {why: w, knob: a, values: 1, match: m}}", "m", "m"),
                ("{grpo: {why: w, knob: a, values: 1, match: m}, m: {why: w}}", "grpo", "m"),
            )
        ),
        ("methods: {m: {why: w, quick: 1}}", "methods.m.quick: 1 must be true or false."),
        ("methods: {m: {why: w, knob: 5, values: [1]}}", "methods.m: its name, variant and knob must be texts."),
        ("methods: {m: {why: w, variant: [a, 2]}}", "methods.m: its name, variant and knob must be texts."),
        (
            "methods: {m: {why: w, knob: a, values: [[1]]}}",
            "methods.m.values: [[1]] must be numbers or texts, each once.",
        ),
        (
            "methods: {m: {why: w, knob: a, values: [1, 1]}}",
            "methods.m.values: [1, 1] must be numbers or texts, each once.",
        ),
        (
            "methods: {m: {why: w, knob: a, values: [null]}}",
            "methods.m.values: [None] must be numbers or texts, each once.",
        ),
        ("methods: [", "no YAML: while parsing"),
        ("methods: []", "methods is missing, or is no mapping."),
        ("", "methods is missing, or is no mapping."),
    ],
)
def test_an_entry_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    head = "task: verbose_arithmetic\nmodel: tiny\nfull: {}\nquick: {}\n"
    (tmp_path / "table.yaml").write_text(head + text)
    with pytest.raises(ValueError) as refused:
        load_methods(tmp_path / "table.yaml")
    assert str(refused.value).startswith(f"table.yaml: {message}") and "\n" not in str(refused.value)


def test_an_entry_may_hold_single_values(tmp_path):
    path = write_table(tmp_path, methods={"mine": {"variant": "dapo", "knob": "a.b", "values": 3, "why": "w"}})
    assert load_methods(path) == {"mine": Method("mine", "w", "dapo", ("a.b",), (3,))}


def test_a_run_that_would_be_refused_stops_the_command_at_once(tmp_path, capsys):
    def refuse(job):
        if "methods.gfpo.k=6" in job.arguments:
            raise ValueError("methods.gfpo.k: 6 is too many.")
        return ""

    assert rt.main(["--out", str(tmp_path / "out")], FAKE_TRAIN, refuse) == 2
    assert capsys.readouterr().err == "table: gfpo-6-seed0: methods.gfpo.k: 6 is too many.\n"
    assert not (tmp_path / "out").exists()


# --- the choice of a knob's value ---


def figures(accuracy, tokens):
    return {"pass@1": accuracy, "tokens": tokens}


def test_choice_by_hand():
    grid = {1: figures(0.86, 50), 2: figures(0.84, 40), 3: figures(0.80, 30)}
    assert preference(grid, None) == [1]  # GRPO itself: the most accurate
    assert preference(grid, 0.85) == [2, 1]  # exactly 1 point below still counts
    assert preference(grid, 0.8501) == [1]
    assert preference(grid, 0.90) == [1]  # none is accurate enough: the most accurate
    assert preference(grid, 0.70) == [3, 2, 1]
    assert preference({5: figures(0.8, 40), 6: figures(0.8, 40)}, 0.8) == [5, 6]  # the default stands first


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100)), min_size=1, max_size=3), st.integers(0, 100))
def test_choice_gives_no_accuracy_away_and_no_tokens(entries, reference):
    grid = {i: figures(accuracy / 100, tokens) for i, (accuracy, tokens) in enumerate(entries)}
    best = preference(grid, reference / 100)[0]
    within = [entry for entry in entries if entry[0] >= reference - 1]
    if within:
        assert entries[best][0] >= reference - 1 and entries[best][1] == min(tokens for _, tokens in within)
    else:
        assert entries[best][0] == max(accuracy for accuracy, _ in entries)


# --- from runs to the table ---

# On the validation split GRPO's best has 0.80, and gfpo k=2 is the shortest within a point; k=6 is best on the test
# split, which must not count.
SCRIPT = {
    "grpo-0.1-seed0": {"validation": [0.75, 50], "test": [0.75, 50]},
    "grpo-0.2-seed0": {"validation": [0.80, 52], "test": [0.75, 52]},
    "grpo-0.2-seed1": {"validation": [0.10, 52], "test": [0.50, 54]},
    "gfpo-4-seed0": {"validation": [0.85, 48], "test": [0.25, 48]},
    "gfpo-2-seed0": {"validation": [0.7930, 40], "test": [0.75, 40]},
    "gfpo-6-seed0": {"validation": [0.70, 30], "test": [1.0, 30]},
    "gfpo-2-seed1": {"validation": [0.1, 42], "test": [0.75, 44]},
}
GRID = {"grpo-0.1-seed0", "grpo-0.2-seed0", "dapo-seed0", "gfpo-4-seed0", "gfpo-2-seed0", "gfpo-6-seed0"}
ALL = GRID | {"untrained-seed0", "untrained-seed1", "grpo-0.2-seed1", "dapo-seed1", "gfpo-2-seed1"}


@pytest.mark.e2e
def test_a_table_from_nothing_and_again(tmp_path, monkeypatch, capsys):
    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT)
    assert status == 0, capsys.readouterr()
    assert {name for name, _, _ in calls} == ALL and len(calls) == len(ALL)
    assert {name for name, val_only, _ in calls if val_only == "true"} == {"untrained-seed0", "untrained-seed1"}
    assert {address for _, _, address in calls} == {None}  # a Ray of its own each

    found = json.loads((tmp_path / "out/results.json").read_text())
    assert list(found["rows"]) == ["untrained", "grpo", "dapo", "gfpo"]
    row = found["rows"]["gfpo"]
    assert row["label"] == "k=2" and [entry["value"] for entry in row["grid"]] == [4, 2, 6]
    assert row["test"]["pass@1"] == [0.75, 0]
    assert row["test"]["tokens"] == [42, pytest.approx(statistics.stdev([40, 44]))]
    assert row["test"]["seconds_per_step"] == [
        2.5,
        0,
    ]  # of 9, 2, 3, 4 without the first, less the 0.5 of the checkpoint
    assert found["rows"]["grpo"]["test"]["pass@1"] == [0.625, pytest.approx(0.25 / 2**0.5)]
    assert row["seeds"]["0"]["diagnostics"] == {"iapo/information_rate": pytest.approx(0.025)}
    assert found["rows"]["dapo"]["test"]["discarded_prompts"] == [(3 * 4 + 2) / 4, 0]
    assert not {"seconds_per_step", "discarded_prompts"} & set(found["rows"]["untrained"]["test"])
    assert found["runs"] == {"done": 11, "planned": 11, "failed": {}}
    assert found["front"] == ["gfpo"] and found["shortest"] == "gfpo"
    low, high = row["seeds"]["0"]["intervals"]["pass@1"]
    assert low < 0.75 < high

    text = (tmp_path / "out/table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| **gfpo** |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[:3] == ["k=2", "0.750 ± 0.000", "42.0 ± 2.8"]
    assert cells[-3:] == ["2.5 ± 0.0", "0.0 ± 0.0", "2"]
    assert "at most 1 point below GRPO's Pass@1: gfpo." in text
    assert "seeds 0, 1" in text and "Commit of the runs: abc" in text and "GiB of memory" in text and "torch" in text
    assert "Not complete" not in text
    assert (tmp_path / "out/pareto.png").read_bytes().startswith(b"\x89PNG")

    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT)
    assert (status, calls) == (0, [])
    again = json.loads((tmp_path / "out/results.json").read_text())
    assert again["rows"] == found["rows"]

    table = Table(make_plan(tmp_path), config_of)
    assert table.done() == table.planned() == 11
    table.outcomes["gfpo-6-seed1"] = table.outcomes["gfpo-6-seed0"]  # of a value that is not chosen
    assert table.done() == 11


@pytest.mark.e2e
def test_quick_runs_only_defaults(tmp_path, monkeypatch):
    status, calls = reproduce(tmp_path, monkeypatch, "--quick")
    assert status == 0
    assert {name for name, _, _ in calls} == {"untrained-seed0", "grpo-0.1-seed0", "dapo-seed0", "gfpo-4-seed0"}
    text = (tmp_path / "out/table.md").read_text()
    assert "not tuned" in text and "±" not in text.splitlines()[2]


@pytest.mark.e2e
def test_a_failed_run_is_reported_and_tried_again_and_loses_no_other(tmp_path, monkeypatch, capsys):
    failing = SCRIPT | {"gfpo-2-seed0": "fail", "dapo-seed1": "short"}
    status, calls = reproduce(tmp_path, monkeypatch, **failing)
    assert status == 1
    assert {name for name, _, _ in calls} == ALL - {"gfpo-2-seed1"} | {"gfpo-4-seed1"}  # the best of what is left
    output = capsys.readouterr().out
    assert "gfpo-2-seed0 FAILED: the run failed: RuntimeError: no luck (exit status 1); its log: " in output
    assert "dapo-seed1 FAILED: it ended without all completions of its last validation" in output
    text = (tmp_path / "out/table.md").read_text()
    assert "Failed: gfpo-2-seed0: the run failed: RuntimeError: no luck" in text and "9 of 11 runs" in text

    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT)
    assert status == 0
    assert {name for name, _, _ in calls} == {"gfpo-2-seed0", "gfpo-2-seed1", "dapo-seed1"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "of_2,of_4,tried",  # validation Pass@1 with the second seed; GRPO's mean is 0.45
    [
        (0.0, 0.8, [2, 4]),  # means of 0.397 and 0.825
        (0.0, 0.0, [2, 4]),  # 0.397 and 0.425: neither holds, the higher mean is kept
        (0.06, 0.0, [4, 2]),  # 0.427 and 0.425
    ],
)
def test_a_choice_that_does_not_hold_over_all_seeds_is_given_up(tmp_path, monkeypatch, of_2, of_4, tried):
    others = {
        "gfpo-2-seed1": {"validation": [of_2, 42], "test": [0.75, 44]},
        "gfpo-4-seed1": {"validation": [of_4, 48], "test": [0.25, 48]},
    }
    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT | others)
    assert status == 0 and {name for name, _, _ in calls} == ALL | {"gfpo-4-seed1"}
    found = json.loads((tmp_path / "out/results.json").read_text())
    row, (given_up, value) = found["rows"]["gfpo"], tried
    assert (row["label"], set(row["seeds"])) == (f"k={value}", {"0", "1"})
    tokens = {2: 42, 4: 48}
    assert [(v["label"], v["test"]["tokens"][0]) for v in row["given_up"]] == [(f"k={given_up}", tokens[given_up])]
    assert found["runs"] == {"done": 12, "planned": 12, "failed": {}}
    lines = {2: "0.750 ± 0.000, 42.0 ± 2.8", 4: "0.250 ± 0.000, 48.0 ± 0.0"}
    text = (tmp_path / "out/table.md").read_text()
    assert f"Given up: gfpo k={given_up}; on the test split {lines[given_up]} tokens." in text


@pytest.mark.e2e
def test_a_row_with_fewer_seeds_is_held_against_grpo_with_the_same(tmp_path, monkeypatch):
    """With the first seed gfpo's k=2 is within a point of GRPO's 0.80; GRPO's 0.10 of the second doesn't count."""
    write_table(tmp_path, methods=SMALL["methods"] | {"gfpo": SMALL["methods"]["gfpo"] | {"seeds": 1}})
    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT)
    assert status == 0 and {name for name, _, _ in calls} == ALL - {"gfpo-2-seed1"}
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (found["rows"]["gfpo"]["label"], list(found["rows"]["gfpo"]["seeds"])) == ("k=2", ["0"])
    assert found["runs"] == {"done": 10, "planned": 10, "failed": {}}
    line = next(line for line in (tmp_path / "out/table.md").read_text().splitlines() if line.startswith("| **gfpo**"))
    assert line.endswith(" | 1 |") and "±" not in line


@pytest.mark.e2e
def test_a_control_takes_the_value_whose_tokens_are_nearest(tmp_path, monkeypatch):
    """On the validation split gfpo's choice has 40 tokens with the first seed; the rule would take 10, the shortest."""
    control = {"variant": "dapo", "knob": "k", "values": [10, 20, 30], "match": "gfpo", "why": "w"}
    write_table(tmp_path, methods=SMALL["methods"] | {"control": control})
    tokens = {10: 30, 20: 43, 30: 36}
    script = {f"control-{k}-seed0": {"validation": [0.9, t], "test": [0.9, 60]} for k, t in tokens.items()}
    status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT | script)
    assert status == 0
    assert {name for name, _, _ in calls} == ALL | script.keys() | {"control-20-seed1"}
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (found["rows"]["control"]["label"], found["rows"]["control"]["given_up"]) == ("k=20", [])
    text = (tmp_path / "out/table.md").read_text()
    assert "\nNot so control: of its values the one whose tokens are nearest to those of gfpo, first seed.\n" in text


# --- what is kept, and differences from GRPO ---

# 387+456 and 843+219 carry twice; 120+235 never, 355+105 once.
NEEDED, EASY = "387+456+219=", "120+235+105="


def written_as(prompt, text, right=1, tokens=40.0):
    return Sample(prompt, bool(right), tokens, False, f"<think>{text}</think>\n<answer>1</answer>")


COMPLETIONS = [
    written_as(NEEDED, "387+456:3c4c8=843;843+219=1062; hmm so;"),
    written_as(NEEDED, "387+456:3c4c8=843;843+219:2c60c1=1062;", tokens=50.0),
    written_as(EASY, "120+235:553=355;355+105=460;", right=0),
    written_as(EASY, "120+235=355; hmm;355+105=460;"),
]


def test_what_is_kept_by_hand():
    found = kept_figures("worked_sums", COMPLETIONS)
    assert (found["filler"], found["worked/needed"], found["worked/unneeded"]) == (3 / 4, 3 / 4, 1 / 2)
    assert found[RATIO] == 1.5
    assert RATIO not in kept_figures("worked_sums", COMPLETIONS[:2] + COMPLETIONS[3:])  # nothing unneeded is worked
    assert kept_figures("verbose_arithmetic", COMPLETIONS) == {}
    with pytest.raises(ValueError, match=r"^a completion of '120\+235\+105=' has no text 'output'; validate the run"):
        kept_figures("worked_sums", [COMPLETIONS[2]._replace(text=None)])


def test_counts_by_hand():
    """In the order of the prompts: the easy one comes first."""
    expected = {"samples": [2, 2], "right": [1, 2], "tokens": [80, 90]}
    assert counts("verbose_arithmetic", COMPLETIONS) == expected
    kept = {"filler": [1, 2], "sums/needed": [0, 4], "worked/needed": [0, 3]}
    kept |= {"sums/unneeded": [2, 0], "worked/unneeded": [1, 0]}
    assert counts("worked_sums", COMPLETIONS) == counts("worked_sums", COMPLETIONS[::-1]) == expected | kept
    with pytest.raises(ValueError, match="samples: 0"):
        counts("worked_sums", [])


# c, of an unknown pair, and d are needed; h is not.
REGISTERS = "a=17;b=42;c=42*a;d=c+b;h=30*b;d?"


def test_counts_of_registers_by_hand():
    assert checked_registers.unknown(17, 42) and checked_registers.unknown(42, 30)
    texts = (
        "c=42*a17=c11?49+29:16=c25;d=c25+b42:12=d14;",
        "h=30*b42=h41?34+07:34=h41;c=42*a17=c25;c=42*a17=c25;",
    )
    samples = [written_as(REGISTERS, text) for text in texts]
    expected = {"steps/due": 4, "steps/needed": 3, "steps/unneeded": 2, "products/unknown": 2, "checks/unknown": 1}
    expected |= {"products/known": 0, "checks/known": 0, "products/unneeded": 2, "checks/unneeded": 1}
    found = counts("checked_registers", samples)
    assert found == {name: [n] for name, n in expected.items()} | {"samples": [2], "right": [2], "tokens": [80]}
    figures = kept_figures("checked_registers", samples)
    assert RATIO not in figures  # no known pair
    shares = {
        name: found[a][0] / found[b][0] for name, (a, b) in KEEPING["checked_registers"].figures.items() if found[b][0]
    }
    assert shares == {name: figures[name] for name in shares} and set(shares) == {
        "needed",
        "unneeded",
        "checked/unknown",
        "checked/unneeded",
    }


@pytest.mark.parametrize("task", KEEPING)
def test_what_a_table_shows_of_a_task_is_what_its_task_measures(task):
    """Figures from counts, from which intervals are, equal the task's own metrics."""
    module, rng = TASKS[task], random.Random(0)
    problems = [module.sample_problem(rng) for _ in range(200)]
    samples = [written_as(module.prompt(problem), module.trace(problem, rng), tokens=30.0) for problem in problems]
    found = {name: sum(values) for name, values in counts(task, samples).items()}
    metrics = kept_figures(task, samples)
    for name, (a, b) in KEEPING[task].figures.items():
        assert metrics[name] == pytest.approx(found[a] / found[b]), name
    needed, unneeded = KEEPING[task].ratio
    assert metrics[RATIO] == metrics[needed] / metrics[unneeded]
    assert {figure for _, figure, _ in KEEPING[task].columns} <= metrics.keys()


def test_the_front_of_completions_without_a_mistake():
    """No work is of use where all is right without."""
    rng = random.Random(0)
    problems = [worked_sums.sample_problem(rng) for _ in range(300)]
    samples = [written_as(worked_sums.prompt(p), worked_sums.trace(p, rng)) for p in problems]
    (point,) = oracle_front("worked_sums", samples)
    assert point == pytest.approx((statistics.mean(map(worked_sums.minimal_tokens, problems)), 1.0))
    direct = [written_as(worked_sums.prompt(p), worked_sums.minimal_trace(p)) for p in problems]
    assert oracle_front("worked_sums", direct) is None  # nobody knows what working is worth
    assert oracle_front("verbose_arithmetic", samples) is None


def test_regret_by_hand():
    """Halfway along a front from 40 tokens at 0.6 to 50 at 0.8 is 0.7."""
    row = Outcome({"test": {"tokens": 45.0, "pass@1": 0.65}}, {}, None, None, None)
    runs = {(UNTRAINED, None, 0): row._replace(front=[[40.0, 0.6], [50.0, 0.8]]), (UNTRAINED, None, 1): row}
    table = SimpleNamespace(outcome=lambda *run: runs.get(run))
    assert regret_of(table, 0, row) == {"regret": pytest.approx(0.05)}
    fewer = row._replace(figures={"test": {"tokens": 39.0, "pass@1": 0.65}})
    assert regret_of(table, 0, fewer) == regret_of(table, 1, row) == regret_of(table, 2, row) == {}


def counted(right, tokens, **others):
    return {"samples": [2] * len(right), "right": right, "tokens": tokens} | others


def test_differences_by_hand():
    rows = [counted([2, 1, 0], [80, 90, 100]), counted([2, 2, 0], [80, 80, 80])]
    reference = [counted([1, 1, 0], [82, 92, 102]), counted([2, 1, 1], [82, 82, 82])]
    found = differences(rows, reference)
    # of the first seed 3/6 - 2/6, of the second 4/6 - 4/6
    assert found["pass@1"][0] == pytest.approx(1 / 12) and found["pass@1"][1] < 1 / 12 < found["pass@1"][2]
    # Every problem has one token fewer with each seed, so that no draw says anything else.
    assert found["tokens"] == pytest.approx((-1, -1, -1))
    assert differences(rows, rows) == {"pass@1": (0, 0, 0), "tokens": (0, 0, 0)}
    with pytest.raises(ValueError, match=r"^reference: \(1, 3, 3\) seeds, problems and counts, not \(2, 3, 3\)"):
        differences(rows, reference[:1])


def test_a_difference_that_a_draw_leaves_undefined_is_left_out():
    """Of needed sums, where one of two problems has some: a quarter of the draws have none."""
    kept = {"filler": [0, 0], "sums/unneeded": [1, 1], "worked/unneeded": [1, 1]}
    side = [counted([1, 1], [8, 8], **kept, **{"sums/needed": [0, 2], "worked/needed": [0, 1]})]
    assert set(differences(side, side)) == {"pass@1", "tokens", "filler", "worked/unneeded"}


def slow_differences(rows, reference, draws):
    """`differences` of Pass@1 for given draws of problems and seeds, by loops."""
    result = []
    for problems, seeds in draws:
        total = 0.0
        for s in seeds:
            for sign, side in ((1, rows), (-1, reference)):
                right = sum(side[s]["right"][p] for p in problems)
                total += sign * right / sum(side[s]["samples"][p] for p in problems)
        result.append(total / len(seeds))
    return result


def test_intervals_equal_those_of_a_loop():
    rng = random.Random(0)
    rows, reference = ([counted([rng.randint(0, 2) for _ in range(40)], [1] * 40) for _ in range(3)] for _ in range(2))
    draws = [(rng.choices(range(40), k=40), rng.choices(range(3), k=3)) for _ in range(4000)]
    slow = statistics.quantiles(slow_differences(rows, reference, draws), n=40)
    _, low, high = differences(rows, reference, resamples=4000)["pass@1"]
    assert (low, high) == pytest.approx((slow[0], slow[-1]), abs=0.02)


@pytest.mark.e2e
def test_a_table_shows_what_its_task_keeps_and_the_differences_from_grpo(tmp_path, monkeypatch):
    methods = {name: entry for name, entry in SMALL["methods"].items() if name != "dapo"}
    write_table(tmp_path, "sums", task="worked_sums", methods=methods)
    script = {
        name: {split: [*place, 2, 3] if name.startswith("gfpo") else [*place, 0, 5] for split, place in found.items()}
        for name, found in SCRIPT.items()
    }
    assert reproduce(tmp_path, monkeypatch, "--table", "sums", **script)[0] == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    test = found["rows"]["gfpo"]["test"]
    assert (test["filler"], test["worked/needed"], test["worked/unneeded"]) == ([3, 0], [1, 0], [0, 0])
    assert RATIO not in test and found["rows"]["grpo"]["test"][RATIO] == [1, 0]
    assert found["rows"]["grpo"]["from_reference"] == {}
    difference = found["rows"]["gfpo"]["from_reference"]
    # The means over two seeds of 40 and 44 tokens, and of 52 and 54; Pass@1 of 0.75 twice, and of 0.75 and 0.5.
    assert difference["tokens"] == pytest.approx([-11, -12, -10]) and difference["pass@1"][0] == pytest.approx(0.125)
    assert difference["filler"] == [-2, -2, -2] and difference["worked/unneeded"] == [-1, -1, -1]
    assert all("problems" not in run for row in found["rows"].values() for run in row["seeds"].values())
    record = json.loads((tmp_path / "out/records/gfpo-2-seed1.json").read_text())["outcome"]
    assert record["figures"]["validation"]["worked/needed"] == 1 and len(record["problems"]["tokens"]) == 256

    text = (tmp_path / "out/table.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    kept = ["filler words", "worked where many carry", "where none does"]
    assert lines[0][-6:] == ["regret", *kept, "many / none", "seeds"]
    (row,) = [line for line in lines if line[:2] == ["**gfpo**", "k=2"]]
    assert row[-6:] == ["", "3.00 ± 0.00", "1.000 ± 0.000", "0.000 ± 0.000", "", "2"]
    start = next(number for number, line in enumerate(lines) if line[0] == "minus grpo")
    assert lines[start][2:] == ["Pass@1", "mean tokens", *kept]
    assert [line[0] for line in lines[start + 2 :]] == ["untrained", "gfpo"]
    assert lines[-1][3:] == [
        "-11.0 [-12.0, -10.0]",
        "-2.00 [-2.00, -2.00]",
        "+0.000 [0.000, 0.000]",
        "-1.000 [-1.000, -1.000]",
    ]
    assert "worked_sums from the model tiny; 4 training steps; seeds 0, 1, " in text

    assert (tmp_path / "out/kept.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_a_share_of_the_start_by_hand():
    rows = {"untrained": {"test": {"filler": [4.0, 0.1]}}, "gfpo": {"test": {"filler": [1.0, None]}}, "a": {"test": {}}}
    assert picture.kept_of_start(rows, "filler") == {"untrained": 1.0, "gfpo": 0.25}
    assert picture.kept_of_start(rows, "worked") == picture.kept_of_start({"gfpo": rows["gfpo"]}, "filler") == {}
    rows["untrained"]["test"]["filler"][0] = 0.0
    assert picture.kept_of_start(rows, "filler") == {}


@pytest.mark.e2e
def test_a_record_without_counts_of_problems_is_valid_and_has_no_differences(tmp_path, monkeypatch):
    assert reproduce(tmp_path, monkeypatch, **SCRIPT)[0] == 0
    assert "| minus grpo |" in (tmp_path / "out/table.md").read_text()
    for path in (tmp_path / "out/records").glob("*.json"):
        record = json.loads(path.read_text())
        del record["outcome"]["problems"]
        path.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "out/runs")
    (tmp_path / "out/runs").mkdir()
    assert reproduce(tmp_path, monkeypatch, **SCRIPT) == (0, [])
    assert "minus grpo" not in (tmp_path / "out/table.md").read_text()


def test_lists_of_numbers_take_a_line():
    value = {"a": [1, 2.5, -3e-07], "b": ["x\n[1,\n2]", None], "c": [], "d": [[1, 2], [3]]}
    text = as_json(value)
    assert json.loads(text) == value and text.endswith("}\n")
    assert '"a": [1, 2.5, -3e-07],' in text and text.count("\n") == 12


@pytest.mark.e2e
def test_a_run_whose_folder_is_in_use_holds_up_no_other(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out/runs/gfpo-2-seed0"
    folder.mkdir(parents=True)
    with lock(folder / "lock"):
        status, calls = reproduce(tmp_path, monkeypatch, **SCRIPT)
    assert status == 1
    assert {name for name, _, _ in calls} == ALL - {"gfpo-2-seed0", "gfpo-2-seed1"} | {"gfpo-4-seed1"}
    assert "Failed: gfpo-2-seed0: " in (tmp_path / "out/table.md").read_text()
    # The same where nothing else is left to run: what is wanted in its place starts.
    shutil.rmtree(tmp_path / "out/runs/gfpo-4-seed1")
    (tmp_path / "out/records/gfpo-4-seed1.json").unlink()
    with lock(folder / "lock"):
        assert [name for name, _, _ in reproduce(tmp_path, monkeypatch, **SCRIPT)[1]] == ["gfpo-4-seed1"]
    assert reproduce(tmp_path, monkeypatch, **SCRIPT)[0] == 0
    # Should another process complete it meanwhile, the choice doesn't flip before the next start.
    table = Table(make_plan(tmp_path), config_of)
    gfpo = table.plan.methods["gfpo"]
    assert table.tried(gfpo) == [2]
    table.failed["gfpo-2-seed0"] = "in use"
    assert table.tried(gfpo) == [4]


@pytest.mark.e2e
def test_a_row_that_is_to_be_run_again_says_so_until_it_is(tmp_path, monkeypatch):
    again = SMALL["methods"]["gfpo"] | {"run_again": "its loss is another"}
    write_table(tmp_path, methods=SMALL["methods"] | {"gfpo": again})
    failing = dict.fromkeys(("gfpo-2-seed0", "gfpo-4-seed0", "gfpo-6-seed0"), "fail")
    assert reproduce(tmp_path, monkeypatch, **SCRIPT | failing)[0] == 1
    text = (tmp_path / "out/table.md").read_text()
    assert "| gfpo | to be run again | | | | | | | | |\n" in text
    assert "\nTo be run again: gfpo, because its loss is another.\n" in text
    assert reproduce(tmp_path, monkeypatch, **SCRIPT)[0] == 0
    text = (tmp_path / "out/table.md").read_text()
    assert "| **gfpo** | k=2 | 0.750" in text and "run again" not in text


@pytest.mark.e2e
def test_without_grpo_no_other_value_is_chosen(tmp_path, monkeypatch):
    failing = SCRIPT | {"grpo-0.1-seed0": "fail", "grpo-0.2-seed0": "fail"}
    status, calls = reproduce(tmp_path, monkeypatch, **failing)
    assert status == 1
    assert {name for name, _, _ in calls} == GRID | {"untrained-seed0", "untrained-seed1", "dapo-seed1"}
    assert list(json.loads((tmp_path / "out/results.json").read_text())["rows"]) == ["untrained", "dapo"]


# --- resume ---


@pytest.mark.e2e
def test_only_whole_runs_made_with_the_same_configuration_are_kept(tmp_path, monkeypatch):
    quick = ["--quick", "--methods", "dapo"]
    assert reproduce(tmp_path, monkeypatch, *quick)[0] == 0
    folder = tmp_path / "out/runs/dapo-seed0"
    dump = folder / "validation/2.jsonl"
    record = tmp_path / "out/records/dapo-seed0.json"
    lines = dump.read_text().splitlines(keepends=True)
    for broken in ("".join(lines[:-1]), "".join(lines)[:-20], ""):
        record.unlink()
        dump.write_text(broken)
        assert [name for name, _, _ in reproduce(tmp_path, monkeypatch, *quick)[1]] == ["dapo-seed0"]
    record.unlink()
    (folder / "config.yaml").write_text("another: recipe")
    assert [name for name, _, _ in reproduce(tmp_path, monkeypatch, *quick)[1]] == ["dapo-seed0"]
    assert reproduce(tmp_path, monkeypatch, *quick) == (0, [])


@pytest.mark.e2e
def test_a_record_stands_for_its_run_also_in_another_place(tmp_path, monkeypatch, capsys):
    assert reproduce(tmp_path, monkeypatch, **SCRIPT)[0] == 0
    before = json.loads((tmp_path / "out/results.json").read_text())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for kept in ("records", "settings.json"):
        (tmp_path / "out" / kept).rename(moved / kept)
    shutil.rmtree(tmp_path / "out")
    moved.rename(tmp_path / "elsewhere2")
    monkeypatch.setattr("benchmarks.table.table.ROOT", tmp_path)  # the code is elsewhere too
    again = rt.main(["--out", str(tmp_path / "elsewhere2")], ["false"], config_of)
    assert again == 0, capsys.readouterr()
    assert json.loads((tmp_path / "elsewhere2/results.json").read_text())["rows"] == before["rows"]

    # A record of another configuration doesn't count, and what is no record is refused in a line.
    record = tmp_path / "elsewhere2/records/dapo-seed1.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprint": "another"}))
    assert rt.main(["--out", str(tmp_path / "elsewhere2")], FAKE_TRAIN, config_of, interval_s=0.05) == 0
    assert [path.name for path in (tmp_path / "elsewhere2/runs").glob("*-seed*")] == ["dapo-seed1"]
    record.write_text('{"config"')
    capsys.readouterr()
    assert rt.main(["--out", str(tmp_path / "elsewhere2")], ["false"], config_of) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"table: {record}: is no record of a run (") and errors.count("\n") == 1


@pytest.mark.e2e
def test_a_run_that_is_still_alive_is_not_recorded(tmp_path, monkeypatch):
    quick = ["--quick", "--methods", "dapo"]
    assert reproduce(tmp_path, monkeypatch, *quick)[0] == 0
    record = tmp_path / "out/records/dapo-seed0.json"
    record.unlink()
    with lock(tmp_path / "out/runs/dapo-seed0/lock"):
        assert reproduce(tmp_path, monkeypatch, *quick) == (0, [])
        assert not record.exists()
    assert reproduce(tmp_path, monkeypatch, *quick) == (0, [])
    assert record.exists()


@pytest.mark.e2e
def test_a_record_of_other_settings_does_not_count(tmp_path, monkeypatch):
    quick = ["--quick", "--methods", "dapo"]
    assert reproduce(tmp_path, monkeypatch, *quick)[0] == 0
    for lost in ("settings.json", "data", "runs"):  # what else would refuse, where only records were copied
        file = tmp_path / "out" / lost
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (tmp_path / "out/runs").mkdir()
    status, calls = reproduce(tmp_path, monkeypatch, *quick, "--samples", "2")
    assert status == 0 and {name for name, _, _ in calls} == {"dapo-seed0", "untrained-seed0"}


@pytest.mark.e2e
def test_a_run_that_was_stopped_before_its_validation_is_only_validated(tmp_path, monkeypatch):
    quick = ["--quick", "--methods", "dapo,gfpo"]
    assert reproduce(tmp_path, monkeypatch, *quick)[0] == 0
    for name, step in (("dapo-seed0", 2), ("gfpo-4-seed0", 1)):
        folder = tmp_path / "out/runs" / name
        (folder / "validation/2.jsonl").unlink()
        (tmp_path / f"out/records/{name}.json").unlink()
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(step))
    status, calls = reproduce(tmp_path, monkeypatch, *quick)
    assert status == 0
    assert sorted((name, val_only) for name, val_only, _ in calls) == [
        ("dapo-seed0", "true"),
        ("gfpo-4-seed0", "false"),
    ]


@pytest.mark.e2e
def test_a_smaller_table_in_the_same_folder_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    assert reproduce(tmp_path, monkeypatch, "--quick")[0] == 0
    assert "this table is without" not in capsys.readouterr().out
    assert reproduce(tmp_path, monkeypatch, "--quick", "--methods", "grpo")[0] == 0
    assert "table: this table is without dapo, gfpo, which an earlier one" in capsys.readouterr().out
    (tmp_path / "out/results.json").write_text("{")  # it is written anew
    assert reproduce(tmp_path, monkeypatch, "--quick")[0] == 0
    assert set(json.loads((tmp_path / "out/results.json").read_text())["rows"]) == {"untrained", "grpo", "dapo", "gfpo"}


@pytest.mark.e2e
def test_a_folder_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    assert reproduce(tmp_path, monkeypatch, "--quick")[0] == 0
    capsys.readouterr()
    assert reproduce(tmp_path, monkeypatch, "--quick", "--steps", "9") == (2, [])
    assert "holds a table with steps=2, but now it is 9" in capsys.readouterr().err
    for text in ("{", "[]", "null", "{}"):
        (tmp_path / "out/settings.json").write_text(text)
        assert reproduce(tmp_path, monkeypatch, "--quick") == (2, [])
        error = capsys.readouterr().err
        assert "out/settings.json: no settings" in error and len(error.splitlines()) == 1
    (tmp_path / "out/settings.json").unlink()
    (tmp_path / "file").touch()
    assert rt.main(["--quick", "--out", str(tmp_path / "file")], FAKE_TRAIN, config_of) == 2
    assert capsys.readouterr().err == f"table: --out: {tmp_path}/file is a file; choose a folder.\n"
    assert reproduce(tmp_path, monkeypatch, "--quick", "--seeds", "0,1")[0] == 0  # more seeds are welcome


# --- side by side, and stops ---


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_runs_and_says_how_to_resume(tmp_path, number):
    driver = (
        "import sys; from benchmarks.table import reproduce_table as rt\n"
        f"rt.make_plan.__defaults__ = (__import__('pathlib').Path({str(tmp_path)!r}),)\n"
        "rt.slots_by_memory = lambda most, _: most\n"  # other tests may fill the memory
        f"sys.exit(rt.main(None, {FAKE_TRAIN!r}, lambda job: chr(10).join(job.arguments), 0.05))"
    )
    script = {"grpo-0.1-seed0": "stay", "dapo-seed0": "stay"}
    arguments = ["--quick", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *arguments],
        cwd=ROOT,
        env=os.environ | {"FAKE": json.dumps(script)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    runs = tmp_path / "out/runs"
    try:
        wait_for(lambda: (runs / "grpo-0.1-seed0/here").exists() and (runs / "dapo-seed0/here").exists())
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
    finally:
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    for name in script:
        assert "iapo.train: stopped by SIGTERM" in (runs / name / "train.log").read_text()
    assert not any(child.is_running() for child in children)
    last = output.splitlines()[-1]
    assert last.startswith("table: stopped; the same command resumes: ")
    assert shlex.split(last.partition("resumes: ")[2]) == ["bash", "scripts/reproduce_table.sh", *arguments]


def start_sleeper(folder, seconds=60):
    folder.mkdir(exist_ok=True)
    return jobs.Running(jobs.Job("sleeper", folder, (str(seconds),)), ["sleep"])


@pytest.mark.e2e
def test_no_two_runs_share_a_folder_even_if_their_starter_is_gone(tmp_path):
    run = start_sleeper(tmp_path / "run")
    try:
        with pytest.raises(FolderInUse, match="still alive"):
            start_sleeper(tmp_path / "run")
        job, other = jobs.Job("a", tmp_path / "run", ("0",)), jobs.Job("b", tmp_path / "other", ("0",))
        done, failed = [], {}

        def wanted():
            return [j for j in (job, other) if j not in done]

        jobs.run_all(wanted, lambda r: done.append(r.job), failed, lambda _: None, ["sleep"], 2, 0.01)
        assert list(failed) == ["a"] and done == [other]
    finally:
        run.process.kill()
        run.process.wait()
    start_sleeper(tmp_path / "run", 0).process.wait()


def test_no_more_runs_than_slots_and_none_twice(tmp_path):
    todo = [jobs.Job(f"job{i}", tmp_path / f"job{i}", ("0.1",)) for i in range(5)]
    done, at_once = [], []

    def wanted():
        return [job for job in todo if job not in done]

    def finished(run):
        done.append(run.job)

    jobs.run_all(wanted, finished, {}, lambda running: at_once.append(len(running)), ["sleep"], 2, 0.02)
    assert sorted(job.name for job in done) == [job.name for job in todo]
    assert max(at_once) == 2


@pytest.mark.e2e
def test_a_stop_that_comes_while_a_run_starts_does_not_lose_it(tmp_path, monkeypatch):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    popen, started = subprocess.Popen, []

    def popen_with_a_stop(*arguments, **options):
        started.append(popen(*arguments, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(jobs.subprocess, "Popen", popen_with_a_stop)
    job = jobs.Job("a", tmp_path / "a", ("60",))
    with pytest.raises(SystemExit) as stopped:
        jobs.run_all(lambda: [job], lambda run: None, {}, lambda _: None, ["sleep"], 2, 0.01)
    assert stopped.value.code == 143
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_the_reason_is_of_this_start(tmp_path):
    (tmp_path / "train.log").write_text("iapo.train: what an earlier start said\n")
    run = jobs.Running(jobs.Job("a", tmp_path, ()), ["bash", "-c", "echo noise; kill -9 $$"])
    run.process.wait()
    assert run.reason() == "noise (exit status -9)"


def test_a_run_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.2)
    command = ["bash", "-c", "trap '' TERM; touch ready; while true; do sleep 0.1; done", "stubborn"]
    monkeypatch.chdir(tmp_path)
    run = jobs.Running(jobs.Job("a", tmp_path / "a", ()), command)
    wait_for((tmp_path / "ready").exists)
    jobs.stop([run])
    assert run.process.returncode == -signal.SIGKILL


def test_slots_by_memory():
    gib = 2**30
    assert [jobs.slots_by_memory(2, g * gib) for g in (1, 6, 12, 13, 64)] == [1, 1, 1, 2, 2]
    assert jobs.slots_by_memory(8, 64 * gib) == 8


def test_time_left_follows_the_runs_so_far(tmp_path):
    rt.open_folder(plan := make_plan(tmp_path))
    table = Table(plan, config_of)
    trained = START_S + 4 * 7.0 + 2 * 512 * COMPLETION_S
    untrained = trained - 4 * 7.0
    assert table.seconds_left([], 2) == pytest.approx((9 * trained + 2 * untrained) / 2)
    table.ratios += [2.0, 4.0]
    assert table.seconds_left([SimpleNamespace(seconds=30)], 1) == pytest.approx(3 * (9 * trained + 2 * untrained) - 30)


@pytest.mark.parametrize("table", dict(ROWS))
def test_the_real_quick_tables_are_expected_within_half_an_hour(tmp_path, table):
    rt.open_folder(plan := real_plan(tmp_path, table, "--quick"))
    assert Table(plan, config_of).seconds_left([], 2) < 28 * 60


# --- the picture ---


def test_front_by_hand():
    points = {"a": (40, 0.8), "b": (50, 0.9), "c": (50, 0.8), "d": (60, 0.85), "e": (39, 0.1)}
    assert pareto.front(points) == ["e", "a", "b"]
    assert pareto.front({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]
    assert pareto.front({}) == []


@given(st.dictionaries(st.integers(), st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_front_is_what_no_other_beats(points):
    on_front = pareto.front(points)
    accuracies = [points[name][1] for name in on_front]
    assert on_front and accuracies == sorted(accuracies)
    for name, (tokens, accuracy) in points.items():
        better = [
            other
            for other, (t, a) in points.items()
            if (t < tokens and a >= accuracy) or (t <= tokens and a > accuracy)
        ]
        assert (name in on_front) == (not better)


def row(accuracy, tokens, *tried):
    """A row of results.json: of the mean, and of (value, accuracy, tokens) with the first seed."""
    grid = [{"value": value, "figures": {"test": figures(*figure)}} for value, *figure in tried]
    return {"label": "k=1", "grid": grid, "test": {"tokens": [tokens, None], "pass@1": [accuracy, 0.01]}}


def test_what_is_far_below_is_named():
    rows = {
        "best": row(0.9, 40, (1, 0.95, 41)),
        "edge": row(0.8, 50, (2, 0.79, 51), (1, 0.8, 50)),
        "far": row(0.79, 60, (1, 0.9, 61), (2, 0.1, 62)),
    }
    found = pareto.below(rows, floor=80.0)
    assert found == {"edge k=2, first seed": (51, pytest.approx(79)), "far": (60, pytest.approx(79))}


def test_the_picture_takes_as_many_methods_as_there_are(tmp_path):
    rows = {f"method{i}": row(0.8, 40 + i, *((v, 0.8 + v / 100, 40 + i) for v in (3, 1, 2))) for i in range(20)}
    rows["untrained"] = row(0.8, 40, (None, 0.8, 40))
    rows["method1"] = row(0.8, 40, (1, 0.8, 40), ("all", 0.8, 40))  # numbers and texts
    rows["method2"] = row(0.8, 40, (1, 0.1, 40))
    rows["far below"] = row(0.1, 40, (1, 0.1, 40))
    pareto.draw(rows, ["method0", "method1"], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
