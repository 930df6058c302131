"""What a record of the method table depends on, and that the committed records are those of today's runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("verl")

from benchmarks.table import reproduce_table as rt
from benchmarks.table import restamp
from benchmarks.table.fingerprint import changes_result, fingerprint
from benchmarks.table.plan import resolved_config
from benchmarks.table.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/table/results"


def composed_once():
    """`resolved_config` that composes the first of the jobs that differ in seed and folder alone."""
    firsts = {}

    def config_of(job):
        given = dict(part.split("=", 1) for part in job.arguments)
        seed = given.pop("seed")
        given.pop("run_dir")
        if (key := tuple(given.items())) not in firsts:
            firsts[key] = job, seed, resolved_config(job)
        first, first_seed, text = firsts[key]
        text = re.sub(rf"(?m)^( *(?:seed|data_loader_seed): ){first_seed}$", rf"\g<1>{seed}", text)
        return text.replace(str(first.folder), str(job.folder))

    return config_of


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The table over a copy of the committed records."""
    folder = tmp_path_factory.mktemp("table")
    shutil.copytree(RESULTS / "records", folder / "records")
    shutil.copy(RESULTS / "settings.json", folder)
    plan = rt.make_plan(rt.parse(["--out", str(folder)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IAPO_DATA_DIR", str(folder / "data"))
        rt.open_folder(plan)
        yield Table(plan, config_of=composed_once())


def test_a_config_with_another_seed_is_the_resolved_one(committed):
    config_of = composed_once()
    first, second = (committed.plan.job("gfpo", 4, seed) for seed in (0, 1))
    assert config_of(first) == resolved_config(first)
    assert config_of(second) == resolved_config(second) != config_of(first)


def test_every_needed_run_of_the_table_has_a_committed_record_or_is_to_be_run_again(committed):
    missing = {name for name, value, seed in committed.known() if committed.outcome(name, value, seed) is None}
    assert missing == {name for name, method in committed.plan.methods.items() if method.run_again}


def test_the_committed_table_has_the_rows_of_its_records(committed):
    """Figures of runs that would be others today must not be shown as theirs."""
    found = json.loads((RESULTS / "results.json").read_text())
    assert found["rows"].keys() == {name for name, _, _ in committed.known()} - found["run_again"].keys()
    assert found["run_again"] == {m.name: m.run_again for m in committed.plan.methods.values() if m.run_again}
    text = (RESULTS / "table.md").read_text()
    assert all(f"\n| {name} | to be run again |" in text for name in found["run_again"])


@pytest.fixture(scope="module")
def config(committed):
    plan = committed.plan
    return yaml.load(resolved_config(plan.job("gfpo", 4, 0)), Loader=yaml.CSafeLoader)


def changed(config: dict, **values) -> dict:
    """A copy with other values: section__key=value."""
    copy = json.loads(json.dumps(config))
    for name, value in values.items():
        *path, key = name.split("__")
        node = copy
        for part in path:
            node = node[part]
        node[key] = value
    return copy


@pytest.mark.parametrize(
    "values",
    [
        {"run_dir": "/elsewhere"},
        {"actor_rollout_ref__actor__ppo_max_token_len_per_gpu": 4096},
        {"trainer__v1__sampler__sampler_kwargs__poll_interval": 0.01},
        {"ray_kwargs__ray_init__runtime_env__env_vars": {"OMP_NUM_THREADS": "2"}},
        {"reward__num_workers": 2},
        {"iapo__share_log_prob_forward": False},
        # Keys that a later version adds, at their default.
        {"methods__gfpo__adaptive": None},
        {"iapo__stride": 1},
        {"actor_rollout_ref__actor__clip_ratio": 0.2},
    ],
)
def test_what_does_not_change_a_result_is_left_out(config, values):
    assert fingerprint(changed(config, **values), {}, {}) == fingerprint(config, {}, {})


@pytest.mark.parametrize("name", ["iapo__stride", "methods__gfpo__adaptive", "actor_rollout_ref__actor__clip_ratio"])
def test_a_key_at_its_documented_default_may_be_missing(config, name):
    without = changed(config, **{name: None})
    *path, key = name.split("__")
    node = without
    for part in path:
        node = node[part]
    del node[key]
    assert fingerprint(without, {}, {}) == fingerprint(config, {}, {})


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"iapo__rho": 0.5},
        {"iapo__stride": 2},
        {"methods__gfpo__k": 2},
        {"methods__gfpo___target_": "iapo.methods.dler.Dler"},
        {"actor_rollout_ref__actor__clip_ratio": 0.3},
        {"actor_rollout_ref__actor__optim__lr": 1e-5},
        {"actor_rollout_ref__rollout__n": 4},
        {"data__train_batch_size": 8},
    ],
)
def test_what_changes_a_result_counts(config, values):
    assert fingerprint(changed(config, **values), {}, {}) != fingerprint(config, {}, {})


def test_the_evaluation_counts_and_places_do_not(config):
    here, there = (changed(config, data__train_files=f"{folder}/train.parquet") for folder in ("/one", "/another"))
    assert (
        fingerprint(here, {}, {"/one": "OUT"})
        == fingerprint(there, {}, {"/another": "OUT"})
        != fingerprint(here, {}, {})
    )
    assert fingerprint(config, {"samples": 8}, {}) != fingerprint(config, {"samples": 4}, {})


def test_only_differences_from_the_defaults_are_named(config):
    names = changes_result(config)
    assert {"methods.gfpo._target_", "actor_rollout_ref.rollout.n", "data.train_batch_size"} <= names.keys()
    assert len(names) < 100


@pytest.fixture
def records(tmp_path):
    """Two records with an old fingerprint, and what a checkout and today's build make of them."""
    folder = tmp_path / "records"
    folder.mkdir()
    for run in ("grpo-seed0", "grpo-seed1"):
        (folder / f"{run}.json").write_text(json.dumps({"fingerprint": "old", "outcome": {"run": run}}))
    (tmp_path / "settings.json").write_text("{}")
    return folder


def stamped(records, monkeypatch, before, now):
    found = iter([before, now])
    monkeypatch.setattr(restamp, "examine", lambda *_: next(found))
    status = restamp.main([str(ROOT), str(records)])
    return status, [json.loads(path.read_text()) for path in sorted(records.iterdir())]


def test_restamp_gives_every_record_the_fingerprint_of_today(records, monkeypatch):
    made = {
        run: {"accepted": True, "config": {"seed": number}} for number, run in enumerate(["grpo-seed0", "grpo-seed1"])
    }
    status, after = stamped(records, monkeypatch, made, made)
    assert status == 0
    assert [record["fingerprint"] for record in after] == [
        fingerprint(entry["config"], {}, {}) for entry in made.values()
    ]
    assert [record["outcome"]["run"] for record in after] == list(made)


@pytest.mark.parametrize(
    "run,before,now,problem",
    [
        ("grpo-seed1", {"accepted": False}, {}, "grpo-seed1: {root} doesn't accept its record"),
        ("grpo-seed1", {"config": {"seed": 2}}, {}, "grpo-seed1: seed was 2, now 0"),
        ("grpo-seed1", None, {}, "grpo-seed1: no run of the table"),
        ("grpo-seed0", {}, None, "grpo-seed0: no run of the table"),
    ],
)
def test_restamp_writes_nothing_if_one_record_differs(records, monkeypatch, capsys, run, before, now, problem):
    whole = {"accepted": True, "config": {"seed": 0}}
    sides = [dict.fromkeys(("grpo-seed0", "grpo-seed1"), whole) for _ in range(2)]
    for side, change in zip(sides, (before, now), strict=True):
        side.pop(run)
        if change is not None:
            side[run] = whole | change
    status, after = stamped(records, monkeypatch, *sides)
    assert status == 2 and {record["fingerprint"] for record in after} == {"old"}
    assert capsys.readouterr().err == f"restamp: {problem.format(root=ROOT)}\n"


def test_restamp_takes_the_table_that_the_settings_name(records, monkeypatch):
    """Its name is no part of a fingerprint, the other settings are."""
    (records.parent / "settings.json").write_text('{"table": "worked_sums", "steps": 60}')
    made = {run: {"accepted": True, "config": {}} for run in ("grpo-seed0", "grpo-seed1")}
    asked = []
    monkeypatch.setattr(restamp, "examine", lambda checkout, folder, table: asked.append(table) or made)
    assert restamp.main([str(ROOT), str(records)]) == 0 and asked == ["worked_sums", "worked_sums"]
    stamps = {json.loads(path.read_text())["fingerprint"] for path in records.iterdir()}
    assert stamps == {fingerprint({}, {"steps": 60}, {})}
