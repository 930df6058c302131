"""Every variant x model x data x platform composes and passes verl's validation; bad input gets one clear line."""

import copy
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Thread

import grpc
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from iapo import train
from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.data import EVALUATION, prepare
from iapo.launch import compose, machine, provenance, weights
from iapo.launch.check_prompts import prompt_problems
from iapo.launch.checks import ConfigError, check, check_with_verl
from iapo.launch.folder_lock import FolderInUse, lock_run_dir
from iapo.launch.provenance import by_dotted_key
from iapo.probe import supported_models
from iapo.tasks.embedded import TASK_OF, TASKS

VARIANTS = sorted(path.stem for path in (compose.recipes_dir() / "variant").glob("*.yaml"))
# Format, temperature and top_p and top_k of validation, response tokens, positions of the model as published.
REASONING = {
    "deepseek-r1-distill-qwen-1.5b": ("boxed", 0.6, 0.95, -1, 8192, 131072),
    "deepseek-r1-distill-qwen-7b": ("boxed", 0.6, 0.95, -1, 8192, 131072),
    "qwen2.5-math-1.5b": ("boxed_no_think", 0.0, 1.0, -1, 3072, 4096),
    "qwen3-0.6b": ("boxed", 0.6, 0.95, 20, 8192, 40960),
    "qwen3-1.7b": ("boxed", 0.6, 0.95, 20, 8192, 40960),
    "qwen3-4b": ("boxed", 0.6, 0.95, 20, 8192, 40960),
}
MODELS = [
    "tiny",
    "tiny-worked",
    "tiny-registers",
    "qwen2.5-0.5b-instruct",
    "qwen2.5-1.5b-instruct",
    "qwen2.5-7b-instruct",
    *REASONING,
    "my-org/my-model",
]
DATA = [
    "verbose_arithmetic",
    "worked_sums",
    "checked_registers",
    "gsm8k",
    "svamp",
    "math500",
    "dapo_math_17k",
    "/some/folder",
]
PLATFORMS = ["cpu", "gpu"]
# Those of variants that do not measure the paper's.
SCORES = {"iapo_ne": "next_token_entropy", "iapo_progress": "reference_answer", "iapo_fitted": "reference_answer"}
# Lengths and batches that suit the embedded model.
SHORT = [
    "data.max_prompt_length=32",
    "data.max_response_length=128",
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
]
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
PROMPT = [[{"role": "user", "content": "1+1="}]] * 16
REWARD = [{"style": "rule", "ground_truth": "2"}] * 16


def truths(good, *others):
    """The column reward_model with nine rows of one ground truth, then others."""
    return {"reward_model": [{"style": "rule", "ground_truth": truth} for truth in [good] * 9 + list(others)]}


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IAPO_DATA_DIR", raising=False)


def resolve(*overrides):
    return compose.resolve(list(overrides))


@cache
def composed(data_dir, *choices):
    paths = {
        "model=path": ["actor_rollout_ref.model.path=/m"],
        "data=parquet": ["data.train_files=/t", "data.val_files=/v"],
    }
    return resolve(
        "platform=cpu", "run_dir=/r", *choices, *(path for choice in choices for path in paths.get(choice, []))
    )


def changed(*overrides):
    """What `resolve("platform=cpu", ...)` gives, without composing it again where only values differ.

    What is computed from a changed value stays as it was; run_dir and the folders in it are the exception.
    """
    expanded = [part for override in overrides for part in compose.expand(override)]
    choices = [part for part in expanded if part.partition("=")[0] in ("variant", "model", "data", "format")]
    config = copy.deepcopy(composed(os.environ.get("IAPO_DATA_DIR"), *choices))
    given = OverridesParser.create().parse_overrides([part for part in expanded if part not in choices])
    run_dir = os.path.abspath(next((o.value() for o in given if o.key_or_group == "run_dir"), "runs/a"))
    for key in ("run_dir", "trainer.default_local_dir", "trainer.validation_data_dir"):
        OmegaConf.update(config, key, run_dir + OmegaConf.select(config, key).removeprefix("/r"))
    for override in given:
        if override.key_or_group != "run_dir":
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


@pytest.mark.parametrize("overrides", [["iapo.alpha=0.5"], ["variant=dapo", "run_dir=a", "trainer.logger=[console]"]])
def test_a_changed_configuration_is_the_resolved_one(overrides):
    mine, real = (
        by_dotted_key(OmegaConf.to_container(config))
        for config in (changed(*overrides), resolve("platform=cpu", *overrides))
    )
    named = {"trainer.experiment_name", "run_dir", "trainer.default_local_dir", "trainer.validation_data_dir"}
    different = {key.rpartition(".TENSORBOARD")[0] or key for key in mine if mine[key] != real[key]}
    assert mine.keys() == real.keys()
    assert different <= {"ray_kwargs.ray_init.runtime_env.env_vars", *(() if "run_dir=a" in overrides else named)}


def test_the_lists_above_are_complete():
    recipes = compose.recipes_dir()
    for group, names in (("model", [*MODELS[:-1], "path", "smollm2-135m-instruct"]), ("platform", PLATFORMS)):
        assert sorted(names) == sorted(path.stem for path in (recipes / group).glob("*.yaml"))
    inner = {"parquet", "iapo_data", "evaluation"}
    assert {path.stem for path in (recipes / "data").glob("*.yaml")} == {*DATA[:-1], *EVALUATION} | inner


def composes(variant, model, data, platform):
    config = resolve(
        f"variant={variant}", f"model={model}", f"data={data}", f"platform={platform}", "trainer.n_gpus_per_node=8"
    )
    check_with_verl(config)
    assert not OmegaConf.missing_keys(config.data) and not OmegaConf.missing_keys(config.iapo)
    assert config.trainer.v1.trainer_mode == "iapo"
    assert config.data.train_files.endswith("train.parquet")
    return config


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_composes_and_passes_verl(variant, platform):
    """With the others in turn: each model with each data set, each of both with each platform."""
    number = 2 * VARIANTS.index(variant) + PLATFORMS.index(platform)
    model, data = MODELS[number % len(MODELS)], DATA[number // len(MODELS) % len(DATA)]
    config = composes(variant, model, data, platform)
    check(config, files=False)
    assert config.iapo.score == SCORES.get(variant, "first_token_entropy")  # its own, whatever the model is


@pytest.mark.parametrize("name", EVALUATION)
def test_a_set_for_evaluation_validates_and_does_not_train(name):
    own = f"{Path.cwd()}/data/{name}/test.parquet"
    config = changed(f"data={name}", "trainer.val_only=true", "actor_rollout_ref.actor.ppo_mini_batch_size=16")
    assert (config.data.train_files, config.data.val_files, config.data.val_max_samples) == (own, own, -1)
    check(config, files=False)
    fix = rf"is for evaluation only; train on another data=, with data.val_files={own}, or set trainer.val_only=true.$"
    with pytest.raises(ConfigError, match=f"^data.train_files: {own} {fix}"):
        check(changed(f"data={name}", "actor_rollout_ref.actor.ppo_mini_batch_size=16"), files=False)
    with pytest.raises(ConfigError, match=f"^data.train_files: {own} {fix}"):
        check(changed(*SHORT, f"data.train_files=[/d/train.parquet,{own}]"), files=False)
    check(changed(*SHORT, f"data.val_files=[/d/test.parquet,{own}]"), files=False)


@pytest.mark.parametrize("model", REASONING)
def test_reasoning_models_have_their_format_sampling_and_lengths(model):
    config = composes("iapo_rate", model, "gsm8k", "gpu")
    check(config, files=False)
    given, temperature, top_p, top_k, tokens, positions = REASONING[model]
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (temperature, top_p, top_k)
    assert sampling.do_sample == (temperature > 0)
    assert config.actor_rollout_ref.rollout.temperature == (temperature or 1.0)
    assert (config.actor_rollout_ref.rollout.top_p, config.actor_rollout_ref.rollout.top_k) == (1, -1)
    assert config.data.max_response_length == tokens <= positions - config.data.max_prompt_length
    assert config.iapo.format == config.reward.custom_reward_function.reward_kwargs.format == given
    assert config.iapo.probe == FORMATS[given].probe
    assert config.data.apply_chat_template_kwargs == ({"enable_thinking": True} if "qwen3" in model else {})
    by_hand = resolve(f"model={model}", "data=gsm8k", "platform=gpu", "format=tags", "data.max_response_length=100")
    assert by_hand.iapo.format == "tags" and by_hand.data.max_response_length == 100
    assert "reward_kwargs" not in by_hand.reward.custom_reward_function


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_the_small_real_model_in_small_steps_on_a_cpu(variant):
    config = resolve(f"variant={variant}", "model=smollm2-135m-instruct", "data=gsm8k", "platform=cpu")
    check_with_verl(config)
    check(config, files=False)
    sizes = (config.data.train_batch_size, config.actor_rollout_ref.rollout.n)
    assert (*sizes, config.data.max_response_length, config.data.val_max_samples) == (4, 4, 96, 16)


def test_the_small_steps_are_for_a_cpu_and_give_way_to_the_command_line():
    model = "model=smollm2-135m-instruct"
    gpu = resolve(model, "data=gsm8k", "platform=gpu")
    assert (gpu.data.train_batch_size, gpu.actor_rollout_ref.rollout.n, gpu.data.max_response_length) == (64, 8, 2048)
    cpu = resolve("data.max_response_length=200", "platform=cpu", "data=gsm8k", model)
    assert (cpu.data.train_batch_size, cpu.data.max_response_length) == (4, 200)
    warm = resolve("platform=cpu", "data=gsm8k", model, "actor_rollout_ref.model.path=/warm")
    assert (warm.actor_rollout_ref.model.path, warm.data.train_batch_size) == ("/warm", 4)


def test_the_small_real_model_is_validated_as_its_authors_advise():
    """Temperature 0.2 and top_p 0.9; training samples the whole distribution."""
    rollout = resolve("model=smollm2-135m-instruct", "data=gsm8k", "platform=cpu").actor_rollout_ref.rollout
    validated = rollout.val_kwargs
    assert (validated.temperature, validated.top_p, validated.top_k, validated.do_sample) == (0.2, 0.9, -1, True)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1, -1)


def test_a_model_that_a_command_makes_is_asked_for_by_the_command(verbose_arithmetic):
    folder = Path(resolve("platform=cpu", "model=smollm2-135m-instruct").actor_rollout_ref.model.path)
    assert folder == Path(os.environ.get("IAPO_DATA_DIR", "data")).absolute() / "models" / "smollm2-135m-instruct"
    with pytest.raises(ConfigError) as error:
        check(changed(*SHORT, f"actor_rollout_ref.model.path={folder}"))
    assert str(error.value) == (
        f"actor_rollout_ref.model.path: {folder} is no folder; make it with iapo model smollm2-135m --out {folder}, or "
        "give one that holds a Hugging Face model."
    )


def test_model_data_set_and_platform_set_different_keys():
    """So what holds for each of them holds for all together, and a variant with one of them is as with another."""

    def keys(group, package):
        files = (compose.recipes_dir() / group).glob("*.yaml")
        recipes = [by_dotted_key(OmegaConf.to_container(OmegaConf.load(path)), package) for path in files]
        return {key for recipe in recipes for key in recipe if "defaults" not in key}

    model, data, platform, variant = keys("model", ""), keys("data", "data"), keys("platform", ""), keys("variant", "")
    # A reasoning model's lengths win over those of a data set.
    assert model & data == {"data.max_prompt_length", "data.max_response_length"}
    assert not model & variant and not data & variant
    # The embedded model needs no gradient checkpointing, and the CPU loads no data in processes of their own.
    assert model & platform == {"actor_rollout_ref.model.enable_gradient_checkpointing"}
    assert data & platform == set() and variant & platform == set()


@pytest.mark.parametrize(
    "variants", ["[iapo_rate,gfpo]", "[dapo,iapo]", "[length_penalty,gfpo,iapo]", "[gfpo,dr_grpo]"]
)
def test_variants_act_together(variants):
    config = composes(variants, "tiny", "verbose_arithmetic", "cpu")
    check(config, files=False)
    names = variants.strip("[]").split(",")
    assert config.trainer.experiment_name == f"{'+'.join(names)}-tiny-verbose_arithmetic"
    assert set(config.methods) == set(names) & {"gfpo", "length_penalty"}
    assert config.algorithm.filter_groups.enable == ("dapo" in names)
    assert config.actor_rollout_ref.actor.use_kl_loss == (not {"dapo", "dr_grpo"} & set(names))
    assert (config.iapo.alpha > 0, config.iapo.rho > 0) == ("iapo" in names, "iapo_rate" in names)


@pytest.mark.parametrize("variants", ["[iapo,iapo_ne]", "[iapo_ne,iapo]"])
def test_of_two_variants_that_set_the_same_key_the_later_wins(variants):
    score = "next_token_entropy" if variants == "[iapo,iapo_ne]" else "first_token_entropy"
    assert resolve(f"variant={variants}", "platform=cpu").iapo.score == score


def test_a_setting_that_a_later_variant_takes_back_is_named():
    lost = (
        "^variant: dapo sets actor_rollout_ref.actor.loss_agg_mode=token-mean, in place of seq-mean-token-sum-norm of"
    )
    with pytest.warns(UserWarning, match=lost):
        resolve("variant=[dr_grpo,dapo]", "platform=cpu")
    # top_entropy builds on dapo.
    assert [*compose.overwritten(["dapo", "top_entropy"]), *compose.overwritten(["dapo", "iapo_rate"])] == []


def test_recipes_of_any_form_that_hydra_takes_are_compared(tmp_path, monkeypatch):
    (tmp_path / "variant").mkdir()
    recipes = {
        "empty": "# nothing",
        "a": "x: {y: 5e-4}",
        "b": "defaults: [empty, _self_, /variant/a, override /data: gsm8k]",
        "c": "x: {y: 0.0005, z: 1}",
        "d": "x: {y: 1}",
    }
    for name, text in recipes.items():
        (tmp_path / "variant" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(compose, "recipes_dir", lambda: tmp_path)
    assert list(compose.overwritten(["b", "c"])) == []
    assert list(compose.overwritten(["b", "d"])) == [
        "variant: d sets x.y=1, in place of 0.0005 of b; put the one you want last."
    ]


def test_variants_differ_where_they_should():
    grpo, dapo, iapo, rate = (changed(f"variant={name}") for name in ("grpo", "dapo", "iapo", "iapo_rate"))
    assert [c.algorithm.adv_estimator for c in (grpo, dapo, iapo, rate)] == ["iapo"] * 4
    assert [IapoConfig.from_mapping(c.iapo).is_grpo for c in (grpo, dapo)] == [True, True]
    assert not any(c.methods for c in (grpo, dapo, iapo, rate))
    assert (iapo.iapo.alpha > 0, iapo.iapo.beta > 0, iapo.iapo.rho) == (True, True, 0)
    assert (rate.iapo.alpha, rate.iapo.beta, rate.iapo.rho > 0) == (0, 0, True)
    assert [c.actor_rollout_ref.actor.use_kl_loss for c in (grpo, dapo, iapo, rate)] == [True, False, True, True]
    assert [c.algorithm.filter_groups.enable for c in (grpo, dapo, iapo, rate)] == [False, True, False, False]
    actor, overlong = dapo.actor_rollout_ref.actor, dapo.reward.reward_kwargs.overlong_buffer_cfg
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.loss_agg_mode) == (0.2, 0.28, "token-mean")
    assert (overlong.enable, overlong.len, dapo.reward.reward_kwargs.max_resp_len) == (True, 25, 128)


@pytest.mark.parametrize(
    ("prompts", "updates", "size"),
    [(512, 16, 32), (16, 8, 2), (16, 16, 1), (4, 16, 1), (20, 8, 2), (12, 8, 1), (7, 2, 1)],
)
def test_a_batch_makes_equal_updates_as_many_as_asked_for_or_one_per_prompt(prompts, updates, size):
    assert compose.mini_batch(prompts, updates) == size
    assert prompts % size == 0 and prompts // size >= min(updates, prompts)


@pytest.mark.parametrize(
    ("variant", "updates"), [("dapo", 16), ("top_entropy", 16), ("dler", 8), ("laser", 2), ("iapo", 1)]
)
def test_recipes_that_clip_make_as_many_updates_per_batch_as_their_sources(variant, updates):
    config = resolve(f"variant={variant}", "model=qwen2.5-7b-instruct", "data=dapo_math_17k", "platform=gpu")
    assert config.data.train_batch_size == updates * config.actor_rollout_ref.actor.ppo_mini_batch_size
    by_hand = resolve(f"variant={variant}", "platform=cpu", "actor_rollout_ref.actor.ppo_mini_batch_size=3")
    assert by_hand.actor_rollout_ref.actor.ppo_mini_batch_size == 3


def test_overrides_of_the_command_line_win():
    config = resolve("variant=iapo", "model=qwen2.5-0.5b-instruct", "data=gsm8k", "platform=gpu", "iapo.alpha=0.05")
    assert config.iapo.alpha == 0.05
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.data.train_files == str(Path.cwd() / "data" / "gsm8k" / "train.parquet")
    assert config.run_dir == str(Path.cwd() / "runs" / "iapo-qwen2.5-0.5b-instruct-gsm8k")
    assert config.trainer.default_local_dir == config.run_dir + "/checkpoints"


def test_the_deviations_name_the_schedule_on_qwen_and_restore_the_papers():
    page = (Path(__file__).parent.parent / "docs/deviations.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| schedule on Qwen2.5 |")]
    _, _, _, ours, restored, _ = row.split("|")
    run = ["model=qwen2.5-1.5b-instruct", "data=gsm8k", "platform=gpu", "trainer.n_gpus_per_node=8"]
    config = resolve(*run)
    batch, steps = config.data.train_batch_size, config.trainer.total_training_steps
    assert f"{batch} prompts per update, {steps} updates" in ours and config.actor_rollout_ref.actor.optim.lr == 1e-6
    command, _ = re.findall("`(.*?)`", restored)
    paper = resolve(*run, *command.split())
    check_with_verl(paper)
    assert 12 <= paper.data.train_batch_size <= 16
    assert paper.trainer.total_training_steps == 2 * 7473 // paper.data.train_batch_size
    assert paper.actor_rollout_ref.actor.ppo_mini_batch_size == paper.data.train_batch_size


def test_a_local_model_folder_with_a_plain_name_is_a_path(tmp_path):
    (tmp_path / "mymodel").mkdir()
    assert resolve("model=mymodel", "platform=cpu").actor_rollout_ref.model.path == str(tmp_path / "mymodel")


@pytest.mark.parametrize("name", ["a b", "a=b", "a, b", "it's", "[a](b)", "{a}<b>:", "a\\'b\\"])
def test_a_path_may_hold_what_hydra_cannot_read(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    read = OverridesParser.create().parse_override
    for value in (folder, f"'{folder}'", f'"{folder}"'):
        choice, path = compose.expand(f"model={value}")
        assert (choice, read(path).value()) == ("model=path", str(folder))
        choice, *paths = compose.expand(f"data={value}")
        assert choice == "data=parquet"
        assert [read(path).value() for path in paths] == [f"{folder}/train.parquet", f"{folder}/test.parquet"]


def test_the_advice_on_values_that_hydra_cannot_read_works(tmp_path):
    (tmp_path / "a, b=c)").mkdir()
    with pytest.raises(ConfigError, match=r"^run_dir: '/a, b=c\)' can't be read; .* is quoted twice: 'key=\"a, b\"'.$"):
        resolve("platform=cpu", "run_dir=/a, b=c)")
    config = resolve("platform=cpu", 'run_dir="/a, b=c)"', f"model={tmp_path}/a, b=c)")
    assert (config.run_dir, config.actor_rollout_ref.model.path) == ("/a, b=c)", f"{tmp_path}/a, b=c)")


def test_an_empty_data_folder_is_refused(monkeypatch):
    monkeypatch.setenv("IAPO_DATA_DIR", "")
    with pytest.raises(
        ConfigError, match=r"^IAPO_DATA_DIR: '' names no folder; set the variable to one, or unset it.$"
    ):
        resolve("platform=cpu")


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["variant=ipo"], "^variant: 'ipo' must be one of dapo, dler, .*, or several as \\[iapo_rate,gfpo\\].$"),
        (["variant=[gfpo,laserr]"], "^variant: 'laserr' must be one of"),
        (["variant=[gfpo,gfpo]"], "^variant: \\[gfpo,gfpo\\] names gfpo twice; name it once.$"),
        (["variant=[]"], "^variant: '' must be one of"),
        (["variant=null"], "^variant: 'null' must be one of"),
        (["variant=[[gfpo]]"], "^variant: '\\[gfpo\\]' must be one of"),
        (
            ["model=qwen"],
            "^model: 'qwen' must be one of deepseek-r1-distill-qwen-1.5b, .*, tiny, tiny-registers, tiny-worked, or a ",
        ),
        (
            ["data=gsm8kk"],
            "^data: 'gsm8kk' must be one of aime24, aime25, amc23, checked_registers, dapo_math_17k, gsm8k, math500, "
            "minerva, olympiadbench, svamp, verbose_arithmetic, worked_sums, or a ",
        ),
        (["help"], "^'help': an argument is key=value; see iapo train --help.$"),
        (["alpha=0.1"], "^alpha: unknown key; did you mean iapo.alpha\\?$"),
        (["iapo.probe=</think>\n<answer>"], "^iapo.probe: '</think>.n<answer>' can't be read; a value with spaces or"),
        (["iapo.alfa=0.1"], "^iapo.alfa: unknown key; did you mean iapo.alpha\\?$"),
        (["trainer.lr=1"], "^trainer.lr: unknown key; did you mean actor_rollout_ref.actor.optim.lr\\?$"),
        (["trainer.zzz=1"], "^trainer.zzz: unknown key; --dry-run lists all.$"),
        (["iapo.alpha"], "'iapo.alpha'.*an argument is key=value"),
        (
            ["iapo.alpha=1,2"],
            "^iapo.alpha: '1,2' stands for several runs; give one, a list as 'iapo.alpha=\\[1,2\\]', or a text with",
        ),
        (
            ["variant=iapo_rate,gfpo"],
            "^variant: 'iapo_rate,gfpo' stands for several runs; give one, or several that act together as variant="
            "\\[iapo_rate,gfpo\\].$",
        ),
        (["variant='iapo_rate,gfpo'"], "^variant: 'iapo_rate,gfpo' must be one of"),
        (["model="], "^model: '' must be one of .*, or a folder that holds a model, or a hub name"),
        (["data="], "^data: '' must be one of .*, or a folder that holds train.parquet and test.parquet.$"),
        (["model=a b)"], "^model: 'a b\\)' must be one of"),
        (
            ["iapo.format=boxed", "data.max_response_length=3"],
            "^iapo.format: 'boxed' sets neither markers nor probe; give format=boxed in its place, one of tags, boxe",
        ),
        (["iapo.probe=a b)"], "^iapo.probe: 'a b\\)' can't be read.*quoted twice"),
        (["iapo.alpha=[1,2"], "^iapo.alpha: '\\[1,2' can't be read; "),
        (["data.max_response_length=abc"], "^data.max_response_length: 'abc' must be a whole number of at least 1.$"),
        (["data.max_prompt_length=null"], "^data.max_prompt_length: None must be a whole number of at least 1.$"),
    ],
)
def test_what_does_not_compose_gets_one_line(overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve("platform=cpu", *overrides)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["iapo.alpha=-1"], "iapo.alpha: -1 must be a number >= 0"),
        (["seed=-1"], "^seed: -1 must be a whole number from 0 to 4294967295.$"),
        (["seed=4294967296"], "^seed: 4294967296 must be a whole number from 0 to 4294967295.$"),
        (["seed=0.5"], "^seed: 0.5 must be a whole number from 0"),
        (["seed=null"], "^seed: None must be a whole number from 0"),
        (["data.seed=-1"], "^data.seed: -1 must be a whole number from 0 to 4294967295.$"),
        (["actor_rollout_ref.rollout.seed=true"], "^actor_rollout_ref.rollout.seed: True must be a whole number"),
        (["iapo.gate=some"], "iapo.gate: 'some' must be one of"),
        (["iapo.share_log_prob_forward=1"], "iapo.share_log_prob_forward: 1 must be true or false"),
        (
            ["iapo.rho=1", "algorithm.adv_estimator=rloo"],
            "^iapo.rho=1: no effect with algorithm.adv_estimator=rloo; set",
        ),
        (["variant=gfpo", "algorithm.adv_estimator=grpo"], "^methods.gfpo: no effect with .*=grpo; set .*=iapo.$"),
        (
            ["trainer.val_only=true", "trainer.val_before_train=false"],
            "^trainer.val_before_train: false leaves nothing to do with trainer.val_only=true; set it to true.$",
        ),
        (
            ["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"],
            "^actor_rollout_ref.actor.loss_scale_factor: None, so .* divides by the longest response of each micro",
        ),
        (
            ["data.truncation=left"],
            "^data.truncation: 'left' has no effect in verl's v1 trainer; leave it at 'error'.$",
        ),
        (["data.return_full_prompt=true"], "^data.return_full_prompt: True has no effect in verl's v1 trainer"),
        (
            ["data.reward_fn_key=source"],
            "^data.reward_fn_key: 'source' has no effect in verl's v1 trainer; leave it at",
        ),
        (["data.train_max_samples=null"], "^data.train_max_samples: None must be a whole number of at least -1.$"),
        (["trainer.logger=[swanlab]"], "^trainer.logger: 'swanlab' needs the package swanlab, which isn't installed"),
        (["trainer.n_gpus_per_node=0"], "^trainer.n_gpus_per_node: 0 must be at least 1; it counts ranks on a CPU.$"),
        (["methods=null"], "^methods: None must be a mapping of names to sections"),
        (["variant=gfpo", "methods.gfpo.k=1"], "^methods.gfpo.k: 1 must be a whole number of at least 2.$"),
        (["variant=gfpo", "methods.gfpo.k=8"], "^methods.gfpo.k: 8 of actor_rollout_ref.rollout.n=8 completions"),
        (["variant=gfpo", "methods.gfpo._target_=no.such.Class"], "^methods.gfpo: no.such.Class can't be made of "),
        (
            ["variant=gtpo", "algorithm.use_kl_in_reward=true", "actor_rollout_ref.actor.use_kl_loss=false"],
            "^algorithm.use_kl_in_reward: true has no effect with gtpo: it judges by right and wrong alone",
        ),
        (["variant=[dr_grpo,dler]"], "^algorithm.norm_adv_by_std_in_grpo: false has no effect with dler, which has"),
        (
            ["variant=[s_grpo,dr_grpo]"],
            "^actor_rollout_ref.actor.loss_agg_mode: 'seq-mean-token-sum-norm' counts the completions that s_grpo leav",
        ),
        ([f"{LOSS_MODE}=vanila"], f"^{LOSS_MODE}: 'vanila' must be one of cispo, .*, geo_mean, .*, vanilla.$"),
        (
            ["variant=top_entropy", f"{LOSS_MODE}=sapo"],
            f"^{LOSS_MODE}: 'sapo' takes the mean over each .* which counts the completions that top_entropy leaves",
        ),
        (["variant=dler", f"{LOSS_MODE}=geo_mean"], f"^{LOSS_MODE}: 'geo_mean' takes the mean over completions, which"),
        (
            ["variant=iapo", f"{LOSS_MODE}=geo_mean"],
            f"^{LOSS_MODE}: 'geo_mean' gives .*, which undoes iapo.alpha=0.01 and iapo.beta=0.01; set it to vanilla.$",
        ),
        (["variant=gtpo", f"{LOSS_MODE}=geo_mean"], f"^{LOSS_MODE}: 'geo_mean' gives .*, which undoes gtpo; set it"),
        (
            ["variant=iapo", "algorithm.rollout_correction.rollout_rs=token_k1"],
            "^algorithm.rollout_correction.rollout_rs: 'token_k1' cuts tokens out of responses",
        ),
        (["variant=iapo_ne", "iapo.rho=1"], "^iapo.score: 'next_token_entropy' says nothing about the answer"),
        (
            ["variant=iapo_ne", "algorithm.rollout_correction.bypass_mode=true"],
            "bypass_mode: true gives no next-token entropies for iapo.score=next_token_entropy; set",
        ),
        (
            ["variant=gtpo_trajectory", "algorithm.rollout_correction.bypass_mode=true"],
            "bypass_mode: true gives no next-token entropies for gtpo_trajectory; set",
        ),
        (
            ["variant=[dapo,gtpo]"],
            "^reward.reward_kwargs.overlong_buffer_cfg.enable: true has no effect with gtpo: it .*; set it to false.$",
        ),
        (
            ["variant=[dler,top_entropy]"],
            "^reward.reward_kwargs.overlong_buffer_cfg.enable: true has no effect with dler: all .*; set it to false.$",
        ),
        (
            ["variant=[dapo,grpo_lambda]"],
            "^algorithm.filter_groups.enable: true does not go with grpo_lambda: it drops .*; set it to false.$",
        ),
        (["actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n: 1"),
        (["actor_rollout_ref.actor.strategy=megatron"], "strategy: 'megatron' must be fsdp or fsdp2"),
        (["actor_rollout_ref.model.use_fused_kernels=true"], "use_fused_kernels: true"),
        (["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"], "ulysses_sequence_parallel_size: 2"),
        (["trainer.v1.trainer_mode=sync"], "trainer_mode: 'sync' must be 'iapo'"),
        (["trainer.use_v1=false"], "trainer.use_v1"),
        (["variant=dapo", "algorithm.filter_groups.metric=length"], "filter_groups.metric: 'length'"),
        (
            ["variant=dapo", "reward.reward_kwargs.overlong_buffer_cfg.len=500"],
            "overlong_buffer_cfg.len: 500 must be between 1 and data.max_response_length=128",
        ),
        (["variant=dapo", "reward.reward_kwargs.overlong_buffer_cfg.len=abc"], "cfg.len: abc must be between 1 and"),
        (
            ["variant=dapo", "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=-3"],
            "overlong_buffer_cfg.penalty_factor: -3 must be a number of at least 0",
        ),
        (["data.train_batch_size=99999"], "data.train_files: .* has 4096 rows, 99999 are needed; give more, or lower"),
        (["data=svamp"], "svamp/train.parquet is no file; make it with iapo data svamp --out /"),
        (["data=math500"], "math500/train.parquet is no file; make it with iapo data math500 --out /"),
        (
            ["data=/my/own"],
            "(?m)^data.train_files: /my/own/train.parquet is no file; set the path of a parquet file. The same holds "
            "for data.val_files: /my/own/test.parquet.$",
        ),
        (
            ["data.train_files=/d/x", "data.val_files=/d/x"],
            "^data.train_files and data.val_files: /d/x is no file; set the path of a parquet file.$",
        ),
        (["model=/no/such/model"], "actor_rollout_ref.model.path: /no/such/model is no folder"),
        (
            ["actor_rollout_ref.rollout.n=two"],
            "actor_rollout_ref.rollout.n: 'two' must be a whole number of at least 1",
        ),
        (["data.train_batch_size=0"], "data.train_batch_size: 0 must be a whole number"),
        (["actor_rollout_ref.actor.optim.lr=fast"], "lr: 'fast' must be a number"),
        (["trainer.total_training_steps=-3"], "trainer.total_training_steps: -3"),
        (["run_dir=/proc/x"], "run_dir: /proc/x can't be made, /proc can't be written to"),
        (["run_dir=/sys/x"], "run_dir: /sys/x can't be made, /sys can't be written to"),
        (["run_dir=/etc/passwd/x"], "run_dir: /etc/passwd/x can't be made, /etc/passwd can't be written to"),
        (["reward.custom_reward_function.path=/no/r.py"], "reward.custom_reward_function.path: /no/r.py is no file"),
        (["trainer.logger=[console,wanbd]"], "trainer.logger: 'wanbd' must be one of wandb, .*tensorboard"),
        (["trainer.logger=wanbd"], "trainer.logger: 'wanbd' must be one of"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "parallel_size: 2 must be 1 with platform=cpu"),
        (
            ["data.max_response_length=500"],
            "data.max_response_length: 500, with data.max_prompt_length=32, exceeds the 512 positions of .*/tiny",
        ),
        (
            ["actor_rollout_ref.actor.ppo_mini_batch_size=32"],
            "ppo_mini_batch_size: 32 must not exceed data.train_batch_size=16",
        ),
        (
            [
                "trainer.n_gpus_per_node=2",
                "actor_rollout_ref.rollout.n=3",
                "actor_rollout_ref.actor.ppo_mini_batch_size=1",
            ],
            "ppo_mini_batch_size: 1 prompts with rollout.n=3 completions can't be shared equally by 2 ranks; .* of 2.",
        ),
    ],
)
def test_contradictions_are_refused(overrides, message, verbose_arithmetic):
    with pytest.raises(ConfigError, match=message):
        check(changed(*overrides))


FITS = "</think>\n<answer>"
OWN_REWARD = "def compute_score(**_): return 1"


@pytest.mark.parametrize(
    "probe",
    [
        "##",
        "<answer>",  # the reasoning doesn't end
        "</think><answer>",  # no new line
        "</think>\n\n<answer>",
        "</think>\n<answer><answer>",
        "</think>\nThe answer is <answer>",
        FITS + "5</answer> so <answer>",
    ],
)
def test_a_probe_that_does_not_fit_the_rewarded_format_is_refused(probe):
    with pytest.raises(ConfigError) as error:
        check(with_iapo(probe=probe), files=False)
    (line,) = str(error.value).splitlines()
    assert line == (
        f"iapo.probe: {probe!r} asks for a format that iapo.reward does not pay for, such as "
        f"{f'<think>{probe}0</answer>'!r}; set {FITS!r}, or set a reward function of your own."
    )


@pytest.mark.parametrize(
    "name,key,value,message",
    [
        ("boxed", "probe", "\n</think>\n\nThe answer is \\boxed{", None),
        (
            "boxed",
            "probe",
            "</think>\n<answer>",
            "iapo.format: 'boxed' with the probe .* of 'tags'; set format=boxed without iapo.probe, or format=tags.",
        ),
        ("boxed", "probe", "\n</think>\n\n", r"iapo.probe: .* asks for a format that iapo.reward does not pay for"),
        ("boxed", "probe", "\n\\boxed{", r"iapo.probe: .* asks for a format that iapo.reward does not pay for"),
        ("boxed", "exit_marker", "</reason>", "iapo.exit_marker: '</reason>' is not how iapo.probe=.* begins, so"),
        ("boxed", "answer_end", "</answer>", "iapo.answer_end: '</answer>' ends no answer that iapo.reward pays for"),
        ("boxed_no_think", "probe", " So \\boxed{", "iapo.exit_marker: .* is not how iapo.probe=.* begins, so"),
        ("boxed_no_think", "probe", "</think> \\boxed{", r"iapo.probe: .* asks for a format that iapo.reward does"),
    ],
)
def test_a_key_by_hand_wins_over_its_format_and_is_checked_against_it(name, key, value, message):
    config = changed(f"format={name}")
    config.iapo.update({key: value, "score": "reference_answer"})
    if message is None:
        check(config, files=False)
        return
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        check(config, files=False)
    assert len(str(error.value).splitlines()) == 1


def recipe(group, name):
    """A file of the recipes; what it builds on is not in it."""
    return OmegaConf.load(compose.recipes_dir() / group / f"{name}.yaml")


@pytest.mark.parametrize("model", [path.stem for path in (compose.recipes_dir() / "model").glob("*.yaml")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_score_auto_is_resolved_for_every_variant_and_model(variant, model, capsys):
    """Without composing, which takes a second: of a model only its path counts, of a variant only its own score."""
    compose.register_resolvers()
    settings = compose.settings_of(variant)
    own, progress = settings.get("iapo.score", IapoConfig.score), settings.get("iapo.progress", 0)
    assert own == SCORES.get(variant, "first_token_entropy")
    config = OmegaConf.merge(recipe("model", model), {"iapo": {"score": own, "progress": progress}})
    if model == "path":
        config.actor_rollout_ref.model.path = "/a/folder"
    compose.choose_score(config)
    assert config.iapo.score == own and capsys.readouterr().err == ""  # which a variant keeps on every model
    config.iapo.score = "auto"
    compose.choose_score(config)
    entropy = model in TASK_OF and not progress
    assert config.iapo.score == ("first_token_entropy" if entropy else "reference_answer")
    assert capsys.readouterr().err == f"iapo: iapo.score=auto is {config.iapo.score} in this run\n"


@pytest.mark.parametrize(
    "variant,model,score",
    [
        ("iapo", "tiny", "first_token_entropy"),
        ("iapo_ne", "smollm2-135m-instruct", "reference_answer"),
        ("[iapo_rate,gfpo]", "qwen3-0.6b", "reference_answer"),
    ],
)
def test_a_dry_run_resolves_the_score_auto_and_prints_it(variant, model, score, capsys):
    config = resolve("data=gsm8k", "platform=cpu", f"variant={variant}", f"model={model}", "iapo.score=auto")
    assert config.iapo.score == score
    assert capsys.readouterr().err == f"iapo: iapo.score=auto is {score} in this run\n"


def test_a_first_token_that_may_be_layout_is_warned_of():
    for model, score, warned, *more in (
        ("qwen3-0.6b", "first_token_entropy", True),
        ("qwen3-0.6b", "reference_answer", False),
        ("qwen3-0.6b", "first_token_entropy", False, "iapo.probe='\\n</think>\\n\\nIt is \\\\boxed{'"),
        ("tiny", "first_token_entropy", False),
    ):
        config = resolve(f"model={model}", "data=gsm8k", "platform=cpu", f"iapo.score={score}", *more)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check(config, files=False)
        assert [str(w.message).startswith("iapo.score: 'first_token_entropy' on a model of") for w in caught] == (
            [True] if warned else []
        )


def test_right_answers_that_are_scored_must_be_there_and_fit(verbose_arithmetic, monkeypatch):
    """An own reward function may do without a ground truth; `iapo.score=reference_answer` can't."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d").mkdir()
    Path("r.py").write_text("def compute_score(**_):\n    return {'score': 1.0, 'acc': 1.0}\n")
    run = ["data=d", *SHORT, "reward.custom_reward_function.path=r.py", "trainer.total_training_steps=1"]
    run += ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]

    def write(*others):
        rows = {"prompt": PROMPT[: 9 + len(others)], "data_source": ["x"] * (9 + len(others))} | truths("2", *others)
        for split in ("train", "test"):
            pq.write_table(pa.table(rows), f"d/{split}.parquet")

    write(" ")
    check(changed(*run))
    with pytest.raises(ConfigError, match=r"column reward_model.ground_truth: row 9 has 0 characters, not 1 to 1000; "):
        check(changed(*run, "iapo.score=reference_answer"))
    write("1" * 900)
    check(changed(*run))
    monkeypatch.setattr(supported_models, "unsupported", lambda _, length: "it is short" if length > 900 else None)
    with pytest.raises(ConfigError, match=r"pass at 10\d\d tokens, with the longest reference answer: it is short.$"):
        check(changed(*run, "iapo.score=reference_answer"))


def test_the_ends_of_reasoning_and_answer_have_to_fit_too():
    for iapo, message in (
        ({"exit_marker": "</reason>"}, "^iapo.exit_marker: '</reason>' is not how iapo.probe='</think>.* begins, so"),
        ({"probe": " so\n" + FITS}, "^iapo.exit_marker: '</think>' is not how iapo.probe=' so.* begins, so"),
        ({"score": "answer_logprob", "answer_end": "</a>"}, "^iapo.answer_end: '</a>' ends no answer that iapo.reward"),
        ({"score": "reference_answer", "answer_end": "</a>"}, "^iapo.answer_end: '</a>' ends no answer that iapo.rewa"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check(with_iapo(**iapo), files=False)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "iapo",
    [
        {"probe": "\n " + FITS},
        {"probe": FITS + "The answer is "},
        {"probe": " so\n" + FITS, "exit_marker": "so"},
        {"probe": " so\n" + FITS, "region": "response"},
        {"score": "answer_logprob", "answer_end": "\n</answer>"},
        {"probe": "##", "rho": 0.0, "validation_information": False},  # nothing is probed
        {"probe": "##", "rho": 0.0, "alpha": 1.0, "score": "next_token_entropy", "validation_information": False},
        {"answer_end": "</a>"},  # read by score=answer_logprob alone
    ],
)
def test_a_probe_that_fits_or_is_not_used_is_not_refused(iapo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(with_iapo(**iapo), files=False)


def test_another_reward_may_want_another_format(verbose_arithmetic):
    Path("r.py").write_text(OWN_REWARD)
    config = with_iapo(probe="##", exit_marker="so")
    config.reward.custom_reward_function.path = f"{Path.cwd()}/r.py"
    check(config, files=False)
    with pytest.raises(
        ConfigError, match=r"^iapo.probe: '##' can't be written with the vocabulary of .*/tiny; use oth"
    ):
        check(config)


def with_iapo(**values):
    config = changed()
    config.iapo.update(values)
    return config


@pytest.fixture
def verbose_arithmetic(data_dir, monkeypatch):
    monkeypatch.setenv("IAPO_DATA_DIR", str(data_dir))


def test_an_embedded_model_with_the_data_of_another_one_is_refused(verbose_arithmetic):
    """Its vocabulary lacks words of the other task, so prompts would lose characters without a word."""
    prepare("worked_sums", train_size=4096, test_size=4)
    with pytest.raises(ConfigError) as error:
        check(changed("data=data/worked_sums", *SHORT))
    (line,) = str(error.value).splitlines()
    assert ", column data_source: rows of worked_sums, but the model is tiny, which learned verbose_ari" in line
    assert "; set data=verbose_arithmetic, or model=tiny-worked. The same holds for data.val_files: " in line


def test_a_parquet_that_verl_cannot_use_is_refused(verbose_arithmetic, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(b"x")
    pq.write_table(pa.table({"prompt": ["1+1="]}), tmp_path / "d" / "test.parquet")
    with pytest.raises(ConfigError) as error:
        check(changed("data=d", *SHORT))
    first, second = str(error.value).splitlines()
    assert first.startswith("data.train_files: ") and "can't be read as parquet" in first
    shutil.copy("d/test.parquet", "d/train.parquet")
    with pytest.raises(ConfigError) as error:
        check(changed("data=d", *SHORT))
    assert str(error.value) == (
        f"data.train_files: {tmp_path}/d/train.parquet lacks the columns data_source, reward_model; it has prompt. The "
        f"same holds for data.val_files: {tmp_path}/d/test.parquet."
    )
    assert second.endswith("test.parquet lacks the columns data_source, reward_model; it has prompt.")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"prompt": ["1+1="] * 16}, "prompt: string must be a list of chat messages, structs with role and content."),
        ({"prompt": [["1+1="]] * 16}, "prompt: list<.*string> must be a list of chat messages"),
        ({"prompt": [[{"role": "user"}]] * 16}, "prompt: list<.*> must be a list of chat messages"),
        ({"reward_model": ["2"] * 16}, "reward_model: string must be a struct with ground_truth"),
        ({"reward_model": [{"answer": "2"}] * 16}, "reward_model: struct<answer: string> must be a struct with"),
        ({"reward_model": [None] * 16}, "reward_model: null must be a struct with ground_truth"),
        (
            {"reward_model": REWARD[:13] + [None] * 3},
            "reward_model: 3 rows are null, the first is row 13; each must hold a ground_truth.$",
        ),
        (truths("2", None, None), "reward_model.ground_truth: row 9 is null, and 1 more can't be judged; each must be"),
        (truths("2", ""), "reward_model.ground_truth: row 9 has 0 characters, not 1 to 1000; each must be a number"),
        (truths(2.0, math.nan), "reward_model.ground_truth: row 9 is nan, no finite number; each must be a number"),
        (truths("2", "NaN"), "reward_model.ground_truth: row 9 is 'NaN', no answer; each must be a number, text"),
        (truths(True), "reward_model.ground_truth: row 0 is True, no number or text, and 8 more can't be judged"),
        (truths(["2", "3"], []), "reward_model.ground_truth: row 9 is an empty list; each must be a number, text, or"),
        (
            truths(["2"], ["2", None]),
            "reward_model.ground_truth: row 9 is null; each must be a number, text, or a list",
        ),
        (truths([["2"]]), "reward_model.ground_truth: row 0 is a list of lists or dicts, and 8 more can't be judged"),
        (
            truths({"answer": "2"}),
            "reward_model.ground_truth: row 0 is a dict, and 8 more can't be judged; each must be",
        ),
        (
            truths("np.arcsin(10/13)", "???"),
            "reward_model.ground_truth: the verifier can read none of the 10 answers, the first is 'np.arcsin",
        ),
        (
            {"prompt": PROMPT[:13] + [[{"role": "user", "content": content}] for content in (None, "1", " ")]},
            "prompt: 2 rows ask nothing, the first is row 13; each needs a user's question.$",
        ),
        ({"prompt": [*PROMPT[:15], []]}, "prompt: 1 rows ask nothing, the first is row 15;"),
        ({"prompt": PROMPT[:14] + [None] * 2}, "prompt: 2 rows are null; each must hold chat messages.$"),
        ({"data_source": ["x"] * 13 + [None] * 3}, "data_source: 3 rows are null; each must name the data set"),
    ],
)
def test_rows_that_verl_cannot_use_are_refused(change, message, verbose_arithmetic):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d").mkdir()
    good = {"prompt": PROMPT, "reward_model": REWARD, "data_source": ["x"] * 16}
    pq.write_table(pa.table(good), "d/test.parquet")
    rows = good | change
    pq.write_table(
        pa.table({name: column[: min(map(len, rows.values()))] for name, column in rows.items()}), "d/train.parquet"
    )
    with pytest.raises(ConfigError, match=f"^data.train_files: .*/d/train.parquet, column {message}") as error:
        check(changed("data=d", *SHORT))
    assert len(str(error.value).splitlines()) == 1


def test_reference_answers_that_the_verifier_cannot_read_are_warned_of(verbose_arithmetic):
    answers = [{"style": "rule", "ground_truth": truth} for truth in ["2"] * 14 + ["np.arcsin(10/13)", "???"]]
    write_rows("d", {"prompt": PROMPT, "data_source": ["x"] * 16, "reward_model": answers})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(changed("data=d", *SHORT))
    assert [str(w.message) for w in caught] == [
        f"data.{field}: {Path.cwd()}/d/{split}.parquet, column reward_model.ground_truth: the verifier can't read at "
        "least 2 of the 16 answers, the first is 'np.arcsin(10/13)' of row 14, so any other spelling of them is judged "
        "wrong; give numbers, LaTeX or words, or remove these rows."
        for field, split in (("train_files", "train"), ("val_files", "test"))
    ]


@pytest.mark.parametrize("truth", [2, 2.5, ["2", "two"], "\\frac{1}{2}"])
def test_a_reference_answer_may_be_a_number_or_a_list(truth, verbose_arithmetic):
    write_rows("d", {"prompt": PROMPT, "data_source": ["x"] * 16, "reward_model": [{"ground_truth": truth}] * 16})
    check(changed("data=d", *SHORT))


def test_another_reward_may_judge_what_ours_cannot(verbose_arithmetic):
    write_rows("d", {"prompt": PROMPT, "data_source": ["x"] * 16, "reward_model": [{"ground_truth": {"a": 1}}] * 16})
    Path("r.py").write_text("def compute_score(**_): return 1")
    check(changed("data=d", *SHORT, f"reward.custom_reward_function.path={Path.cwd()}/r.py"))
    with pytest.raises(ConfigError, match="row 0 is a dict, and 15 more can't be judged"):
        check(changed("data=d", *SHORT))


def write_rows(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path(folder).mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), f"{folder}/{split}.parquet")


def test_prompts_that_are_too_long_or_refused_by_the_template(verbose_arithmetic):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d").mkdir()
    long = [[{"role": "user", "content": "1+" * 40 + "1="}]]
    rows = {"reward_model": REWARD, "data_source": ["x"] * 16}
    pq.write_table(pa.table({"prompt": PROMPT[:15] + long} | rows), "d/train.parquet")
    pq.write_table(pa.table({"prompt": PROMPT[:1] + long * 15} | rows), "d/test.parquet")
    with pytest.warns(UserWarning, match="^data.train_files: 1 of the 16 prompts are left out: 1 have more"):
        check(changed("data=d", *SHORT, "data.train_batch_size=15", "actor_rollout_ref.rollout.n=2"))
    with pytest.raises(
        ConfigError,
        match=r"^data.max_prompt_length: 32 tokens hold only 15 of the 16 prompts of .*train.parquet, 16 are needed;",
    ):
        check(changed("data=d", *SHORT))
    pq.write_table(pa.table({"prompt": long * 16} | rows), "d/test.parquet")
    with pytest.raises(ConfigError, match=r"hold only 0 of the 16 prompts of .*/d/test.parquet, 1 are needed"):
        check(changed("data=d", *SHORT, "data.train_batch_size=15"))
    with pytest.raises(
        ConfigError, match=r"^data.filter_overlong_prompts: false, but 32 tokens hold only 15 of the 16"
    ):
        check(changed("data=d", *SHORT, "data.filter_overlong_prompts=false"))
    two = f"data.train_files=[{os.getcwd()}/d/train.parquet,{os.getcwd()}/d/train.parquet]"
    pq.write_table(pa.table({"prompt": PROMPT} | rows), "d/test.parquet")
    check(changed("data=d", *SHORT, two, "data.train_batch_size=30"))
    with pytest.raises(ConfigError, match=r"^data.train_files: .* has 32 rows, 33 are needed; give more, or lower"):
        check(changed("data=d", *SHORT, two, "data.train_batch_size=33"))
    check(changed("data=d", *SHORT, "data.train_batch_size=16", "trainer.val_only=true"))
    pq.write_table(pq.read_table("d/test.parquet").slice(0, 0), "d/test.parquet")
    with pytest.raises(ConfigError, match=r"^data.val_files: .*/d/test.parquet has no rows; make it again.$"):
        check(changed("data=d", *SHORT, "data.train_batch_size=15"))
    template = "{% if messages[0].content != '1+1=' %}{{ raise_exception('no sums') }}{% endif %}"
    quoted = f'actor_rollout_ref.model.custom_chat_template="{template}"'
    refused = r"^data.train_files: the chat template of .*/tiny refuses all of the \d+ prompts \(no sums\); change them"
    with pytest.raises(ConfigError, match=refused):
        check(changed(quoted))


@pytest.mark.parametrize(
    "file,text,reason",
    [
        ("chat_template.jinja", "{{ raise_exception('no system\nprompt') }}", "TemplateError: no system prompt"),
        ("chat_template.jinja", "{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("tokenizer_config.json", "{{ messages[9].content }}", "UndefinedError: "),
    ],
)
def test_a_broken_chat_template_is_the_models(file, text, reason, verbose_arithmetic):
    tiny = Path(train.__file__).parent / "assets/tiny"
    shutil.copytree(tiny, "m", ignore=shutil.ignore_patterns("chat_template.jinja"))
    settings = json.loads(Path("m/tokenizer_config.json").read_text())
    if file == "tokenizer_config.json":
        text = json.dumps(settings | {"chat_template": text})
    Path("m", file).write_text(text)
    with pytest.raises(ConfigError) as error:
        check(changed("model=m"))
    (line,) = str(error.value).splitlines()
    here = Path.cwd()
    assert line.startswith(f"actor_rollout_ref.model.path: the chat template of {here}/m fails on any prompt ({reason}")
    assert line.endswith(f"); correct {here}/m/{file}, or set actor_rollout_ref.model.custom_chat_template.")


@pytest.mark.parametrize(
    "template,message",
    [
        ("opens_think", "^iapo.format: 'tags' asks the model for <think>, but the chat template of .*/m writes it"),
        ("dated", "^actor_rollout_ref.model.path: the chat template of .*/m writes today's date, so a run that"),
    ],
)
def test_a_template_that_contradicts_the_run_is_refused_before_ray(template, message, verbose_arithmetic):
    """`test_template.py` has the other cases; here a start asks."""
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m")
    shutil.copy(Path(__file__).parent / f"templates/{template}.jinja", "m/chat_template.jinja")
    with pytest.raises(ConfigError, match=message):
        check(changed("model=m"))


def test_a_broken_chat_template_of_the_configuration_is_named(verbose_arithmetic):
    with pytest.raises(ConfigError) as error:
        check(changed("actor_rollout_ref.model.custom_chat_template='{{ messages[9].content }}'"))
    (line,) = str(error.value).splitlines()
    assert line.startswith("actor_rollout_ref.model.custom_chat_template: '{{ messages[9].content }}' fails on any ")


def asking(instruction):
    return [[{"role": "user", "content": f"1+1={instruction}"}]] * 16


@pytest.mark.parametrize(
    "prompts,options,warned",
    [
        (PROMPT, [], "data.train_files: 16 of the 16 prompts, data.val_files: 16 of the 16 prompts don't ask for"),
        (PROMPT[:3] + asking("<answer>")[3:], [], "data.train_files: 3 of the 16 prompts, data.val_files: 3 of"),
        (PROMPT, ["trainer.val_only=true"], "data.val_files: 16 of the 16 prompts don't ask for"),
        (PROMPT, ["reward.custom_reward_function.path=r.py"], None),  # it may pay for anything
        (asking("<answer>"), [], None),
        (asking("Put it into \\boxed{}."), [], "data.train_files: 16 of the 16 prompts, "),
        (asking("Put it into \\boxed{}."), ["format=boxed_no_think"], None),
        (asking("<answer>"), ["format=boxed_no_think"], "data.train_files: 16 of the 16 prompts, "),
    ],
)
def test_prompts_that_do_not_ask_for_the_format_are_warned_of(
    prompts, options, warned, monkeypatch, verbose_arithmetic
):
    monkeypatch.setattr("iapo.launch.check_prompts.is_embedded", lambda config: False)
    write_rows("d", {"prompt": prompts, "data_source": ["x"] * 16, "reward_model": REWARD})
    Path("r.py").write_text(OWN_REWARD)
    config = changed("data=d", *SHORT, "data.max_prompt_length=99", *options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(prompt_problems(config))
    lines = [str(w.message) for w in caught]
    assert [line[: len(warned or "")] for line in lines] == [warned] * bool(warned)
    assert all("; unless the model writes it unasked, make the data with iapo data NAME" in line for line in lines)


def test_the_embedded_models_write_their_format_unasked(verbose_arithmetic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(prompt_problems(changed())) == []


def test_prompts_must_last_for_the_steps(verbose_arithmetic):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d").mkdir()
    rows = {"prompt": PROMPT, "reward_model": REWARD, "data_source": ["x"] * 16}
    for split in ("train", "test"):
        pq.write_table(pa.table(rows), f"d/{split}.parquet")
    run = ["data=d", *SHORT, "data.train_batch_size=6", "trainer.total_training_steps=5"]
    run.append("actor_rollout_ref.actor.ppo_mini_batch_size=6")
    check(changed(*run, "trainer.total_epochs=3"))  # two steps of an epoch, and four prompts left
    message = (
        "^trainer.total_training_steps: 5, but 16 prompts give 4 steps of 6 in trainer.total_epochs=2; set "
        "trainer.total_epochs to at least 3, or trainer.total_training_steps=4.$"
    )
    with pytest.raises(ConfigError, match=message):
        check(changed(*run, "trainer.total_epochs=2"))
    check(changed(*run, "trainer.total_epochs=2", "trainer.total_training_steps=null"))
    with pytest.raises(ConfigError, match=r"but 7 prompts give 2 steps of 6 in "):
        check(changed(*run, "trainer.total_epochs=2", "data.train_max_samples=7"))


def test_the_rows_that_are_checked_are_those_that_verl_chooses(verbose_arithmetic):
    """Half of the prompts are too long; which half is read depends on the seed."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from iapo.launch.check_prompts import chosen_messages

    Path("d").mkdir()
    prompts = [[{"role": "user", "content": f"{number}+1="}] for number in range(16)]
    pq.write_table(pa.table({"prompt": prompts, "reward_model": REWARD, "data_source": ["x"] * 16}), "d/train.parquet")
    tokenizer = AutoTokenizer.from_pretrained(Path(train.__file__).parent / "assets/tiny")
    for seed, shuffle in ((0, True), (1, True), (0, False)):
        options = [f"data.seed={seed}", f"data.shuffle={shuffle}", "data.train_max_samples=5"]
        options.append("data.filter_overlong_prompts_workers=null")  # see findings/datasets_replaces_environ.sh
        config = changed("data=d", *SHORT, *options)
        dataset = RLHFDataset(config.data.train_files, tokenizer, config.data, max_samples=5)
        assert chosen_messages(config, "train_files") == [row["prompt"] for row in dataset.dataframe]


@pytest.mark.parametrize(
    "lost,message",
    [
        (["model.safetensors"], "holds no weights \\(\\*.safetensors or \\*.bin\\); put them there.$"),
        (["tokenizer.json", "tokenizer_config.json"], "holds no tokenizer \\(tokenizer.json and the like\\)"),
        (["chat_template.jinja"], "has a tokenizer without a chat template; add chat_template.jinja, or set"),
    ],
)
def test_a_model_folder_that_lacks_files_is_refused(lost, message, verbose_arithmetic):
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m", ignore=lambda *_: lost)
    with pytest.raises(ConfigError, match=f"^actor_rollout_ref.model.path: .*/m {message}") as error:
        check(changed("model=m", "data=verbose_arithmetic"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("config.json", "{", "the config.json of .*/m can't be loaded \\(OSError: It looks like .* not a valid JSON"),
        ("config.json", "[]", "the config.json of .*/m can't be loaded \\(TypeError: "),
        (
            "config.json",
            '{"model_type": "mymodel"}',
            "the config.json of .*/m can't be loaded .* type `mymodel` but Tr",
        ),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "the config.json of .* 'hidden_size' expected"),
        ("config.json", {"num_attention_heads": 0}, "no model can be made of .*/m's config.json \\(ZeroDivisionError"),
        ("config.json", None, "/.*/m holds no config.json; give a folder that holds a Hugging Face model.$"),
        (
            "tokenizer.json",
            "{",
            "the tokenizer of .*/m can't be loaded \\(JSONDecodeError: .*; correct or replace it.$",
        ),
        ("tokenizer.json", "{}", "the tokenizer of .*/m can't be loaded \\("),
        ("tokenizer_config.json", "{", "the tokenizer of .*/m can't be loaded \\("),
    ],
)
def test_what_transformers_cannot_load_gets_one_line(file, text, message, verbose_arithmetic):
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m")
    if isinstance(text, dict):
        text = json.dumps(json.loads(Path("m", file).read_text()) | text)
    Path("m", file).unlink()
    if text is not None:
        Path("m", file).write_text(text)
    config = changed("model=m", "data=verbose_arithmetic")
    weights.size_bucket(config)  # which comes first, and leaves the problem to the check
    with pytest.raises(ConfigError, match=f"^actor_rollout_ref.model.path: {message}") as error:
        check(config)
    assert len(str(error.value).splitlines()) == 1


def test_a_llama_without_a_tokenizer_gets_one_line(verbose_arithmetic):
    """transformers makes up a tokenizer for some model types, and raises for others."""
    ignore = shutil.ignore_patterns("tokenizer*")
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m", ignore=ignore)
    settings = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    with pytest.raises(
        ConfigError, match=r"^actor_rollout_ref.model.path: .*/m holds no tokenizer \(tokenizer.json an"
    ):
        check(changed("model=m", "data=verbose_arithmetic"))


def test_a_tokenizer_without_an_end_token_is_refused(verbose_arithmetic):
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m")
    settings = json.loads(Path("m/tokenizer_config.json").read_text())
    Path("m/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(ConfigError, match=r"^actor_rollout_ref.model.path: .*/m has a tokenizer without eos_token; ad"):
        check(changed("model=m", "data=verbose_arithmetic"))


def test_responses_that_can_hold_no_answer_are_refused(verbose_arithmetic):
    """<think> </think> \n <answer> 0 </answer> are six tokens of the embedded model."""
    run = ["data.max_prompt_length=32", "iapo.probe_at=stride"]
    check(changed(*run, "data.max_response_length=6"))
    with pytest.raises(
        ConfigError, match=r"^data.max_response_length: 5 tokens hold no answer in the format 'tags'; the"
    ):
        check(changed(*run, "data.max_response_length=5"))
    Path("r.py").write_text(OWN_REWARD)
    check(changed(*run, "data.max_response_length=5", f"reward.custom_reward_function.path={Path.cwd()}/r.py"))


def test_weights_that_are_cut_short_and_end_tokens_that_differ_are_refused(verbose_arithmetic):
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m")
    check(changed("model=m", "data=verbose_arithmetic"))
    settings = json.loads(Path("m/generation_config.json").read_text())
    for ends, problem in ((5, r"ends at eos_token_id \[5\]; correct the one"), ("{", "config.json can't be read")):
        text = "{" if ends == "{" else json.dumps(settings | {"eos_token_id": ends})
        Path("m/generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"^actor_rollout_ref.model.path: .*{problem}"):
            check(changed("model=m", "data=verbose_arithmetic"))
    Path("m/generation_config.json").write_text(json.dumps(settings))
    weights = Path("m/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"^actor_rollout_ref.model.path: .*/model.safetensors is cut short; get it"):
        check(changed("model=m", "data=verbose_arithmetic"))


@pytest.mark.parametrize(
    "changes,ends",
    [
        ({"eos_token_id": 5}, r"\[5\]"),
        ({"eos_token_id": [5, 7]}, r"\[5, 7\]"),
        ({"eos_token_id": [5, 2]}, None),
        ({"eos_token_id": None}, None),
        ({"eos_token_id": None, "model_type": "gpt2", "n_positions": 512}, r"\[50256\]"),  # GPT-2's default
    ],
)
def test_without_a_generation_config_the_end_tokens_of_the_config_count(changes, ends, verbose_arithmetic):
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m", ignore=lambda *_: ["generation_config.json"])
    settings = json.loads(Path("m/config.json").read_text()) | changes
    given = {name: value for name, value in settings.items() if value is not None}
    Path("m/config.json").write_text(json.dumps(given))
    if ends is None:
        check(changed("model=m", "data=verbose_arithmetic"))
        return
    message = (
        rf"^actor_rollout_ref.model.path: .*/m has eos_token .* \(2\), but its config.json ends at eos_token_id {ends}"
    )
    with pytest.raises(ConfigError, match=message):
        check(changed("model=m", "data=verbose_arithmetic"))


def test_a_format_by_its_key_alone_and_an_unknown_one():
    with pytest.raises(ConfigError, match=r"^iapo.format: 'boxed' with the probe .* of 'tags'; set format=boxed w"):
        check(with_iapo(format="boxed"), files=False)
    with pytest.raises(ConfigError, match=r"^format: 'xml' must be one of tags, boxed, boxed_no_think.$"):
        resolve("platform=cpu", "format=xml")
    with pytest.raises(ConfigError, match=r"reward_kwargs.format: 'tags' is not iapo.format='boxed'; leave it out.$"):
        resolve("platform=cpu", "format=boxed", "+reward.custom_reward_function.reward_kwargs.format=tags")


@pytest.mark.parametrize(
    "change",
    [
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "data.dataloader_num_workers=2",
    ],
)
def test_what_may_change_a_result_may_not_change_on_resume(verbose_arithmetic, change):
    config = changed("run_dir=r")
    provenance.save(config)
    checkpoint(config, 10)
    check(changed("run_dir=r", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=5000"))  # packing
    with pytest.raises(ConfigError, match=f"holds a checkpoint made with {change.partition('=')[0]}="):
        check(changed("run_dir=r", change))


CONTENTS = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_a_chat_template_of_the_configuration_will_do(verbose_arithmetic):
    ignore = shutil.ignore_patterns("chat_template.jinja")
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m", ignore=ignore)
    check(changed("model=m", f"actor_rollout_ref.model.custom_chat_template='{CONTENTS}'"))


@pytest.mark.parametrize(
    "source,message",
    [
        ("def compute_score(:", "path: .*/r.py can't be loaded \\(SyntaxError: invalid syntax"),
        ("import no_such_module", "path: .*/r.py can't be loaded \\(ModuleNotFoundError: No module named 'no_such_mod"),
        ("def score(**_): return 1", "name: 'compute_score' is no function of .*/r.py; set the name of one.$"),
        ("compute_score = 1", "name: 'compute_score' is no function of .*/r.py"),
        (
            "def compute_score(solution_str, ground_truth): return 1",
            "name: 'compute_score' can't be called by keyword with data_source, solution_str, ground_truth, extra_info "
            "\\(got an unexpected keyword argument 'data_source'\\)",
        ),
        ("def compute_score(answer, **_): return 1", "\\(missing a required argument: 'answer'\\)"),
    ],
)
def test_a_reward_function_that_verl_cannot_call_is_refused(source, message, verbose_arithmetic):
    Path("r.py").write_text(source)
    with pytest.raises(ConfigError, match=message) as error:
        check(changed(f"reward.custom_reward_function.path={Path.cwd()}/r.py"))
    assert str(error.value).startswith("reward.custom_reward_function.") and len(str(error.value).splitlines()) == 1


def test_a_reward_function_may_take_arguments_of_the_configuration(verbose_arithmetic):
    Path("r.py").write_text("async def f(data_source, solution_str, ground_truth, extra_info, weight): return weight")
    given = ["reward.custom_reward_function.path=r.py", "reward.custom_reward_function.name=f"]
    check(changed(*given, "+reward.custom_reward_function.reward_kwargs.weight=2"))
    with pytest.raises(ConfigError, match="missing a required argument: 'weight'"):
        check(changed(*given))


def test_epochs_may_decide_when_a_run_ends(verbose_arithmetic):
    check(changed("trainer.total_training_steps=null", "trainer.total_epochs=3"))


def test_an_unknown_option_is_refused(capsys):
    assert train.main(["--alpha", "0.1"]) == 2
    assert capsys.readouterr().err == "iapo.train: --alpha: unknown option; known are --dry-run and --help.\n"


def test_the_embedded_default_passes_every_check(verbose_arithmetic):
    check(changed())


def checkpoint(config, step):
    folder = Path(config.trainer.default_local_dir) / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    for name in ("data", *(f"actor/{part}_world_size_1_rank_0" for part in ("model", "optim", "extra_state"))):
        torch.save({"weight": torch.ones(1000)}, folder / f"{name}.pt")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def test_a_broken_newest_checkpoint_gives_way_to_the_newest_whole_one(verbose_arithmetic):
    config = changed("run_dir=r")
    provenance.save(config)
    folders = [checkpoint(config, step) for step in (3, 9)]
    file = folders[1] / "actor/model_world_size_1_rank_0.pt"
    check(changed("run_dir=r"))
    file.write_bytes(file.read_bytes()[:-100])
    line = f"^run_dir: {file} is cut short; the run resumes from step 3.$"
    with pytest.warns(UserWarning, match=line):
        check(changed("run_dir=r"))
    provenance.save(config)
    starts = [json.loads(line) for line in Path("r/starts.jsonl").read_text().splitlines()]
    assert "resumes_from" not in starts[0]
    assert (starts[1]["resumes_from"], starts[1]["skipped"]) == (3, [f"{file} is cut short"])
    with pytest.warns(UserWarning, match=line), pytest.raises(ConfigError, match="holds a checkpoint made with"):
        check(changed("run_dir=r", "iapo.rho=0.125"))  # a wrong configuration is still refused
    shutil.rmtree(folders[0])
    with pytest.raises(ConfigError, match=f"^run_dir: no run can resume from .*: {file} is cut short; restore it, rem"):
        check(changed("run_dir=r"))
    shutil.rmtree(folders[1])
    with pytest.raises(ConfigError, match=r"^run_dir: no run can resume from .*names step 9, which isn't there; rest"):
        check(changed("run_dir=r"))


@pytest.mark.parametrize("content,reason", [(b"20", "names step 20"), (b"", "holds '' and no"), (b"\xff", "holds ")])
def test_a_tracker_file_that_names_no_checkpoint(verbose_arithmetic, content, reason):
    config = changed("run_dir=r")
    provenance.save(config)
    tracker = checkpoint(config, 10).parent / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(content)
    with pytest.warns(UserWarning, match=f"^run_dir: {tracker.name} {reason}.*; the run resumes from step 10.$"):
        check(changed("run_dir=r"))


def test_a_lost_tracker_does_not_let_a_run_begin_anew_over_whole_checkpoints(verbose_arithmetic):
    config = changed("run_dir=r")
    provenance.save(config)
    folder = checkpoint(config, 10)
    (folder.parent / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(ConfigError, match=r"^run_dir: .* holds global_step_10 but no latest_checkpointed_iteration.tx"):
        check(changed("run_dir=r"))
    (folder / "data.pt").unlink()  # a first save that was never finished
    check(changed("run_dir=r"))


def test_a_path_to_resume_from_must_be_a_whole_step(verbose_arithmetic):
    folder = checkpoint(changed("run_dir=other"), 10)
    resume = ["run_dir=r", "trainer.resume_mode=resume_path"]
    check(changed(*resume, f"trainer.resume_from_path={folder}"))
    with pytest.raises(
        ConfigError, match=r"^trainer.resume_from_path: .*/checkpoints must end in global_step_<N>; give a"
    ):
        check(changed(*resume, f"trainer.resume_from_path={folder.parent}"))
    for path in (f"{folder}/", "null", folder.parent / "10"):
        with pytest.raises(
            ConfigError, match=rf"^trainer.resume_from_path: {path}.* must end in global_step_".replace("null", "None")
        ):
            check(changed(*resume, f"trainer.resume_from_path={path}"))
    with pytest.raises(
        ConfigError, match=r"global_step_10 has no effect with trainer.resume_mode=auto; set trainer.res"
    ):
        check(changed("run_dir=r", f"trainer.resume_from_path={folder}"))
    (folder / "actor/optim_world_size_1_rank_0.pt").unlink()
    with pytest.raises(ConfigError, match=r"^trainer.resume_from_path: .*optim_world_size_1_rank_0.pt is missing; cho"):
        check(changed(*resume, f"trainer.resume_from_path={folder}"))
    checkpoint(changed("run_dir=other"), 8)
    with pytest.raises(ConfigError, match=r"; choose another step \(whole: global_step_8\).$"):
        check(changed(*resume, f"trainer.resume_from_path={folder}"))


def test_checkpoints_of_an_unknown_configuration_are_refused(verbose_arithmetic):
    checkpoint(changed("run_dir=r"), 2)
    with pytest.raises(ConfigError, match=r"^run_dir: .*/r holds checkpoints but no config.yaml"):
        check(changed("run_dir=r"))


def test_a_complete_run_is_not_started_again(verbose_arithmetic):
    config = changed("run_dir=r")
    provenance.save(config)
    checkpoint(config, 5)
    check(changed("run_dir=r", "trainer.total_training_steps=6"))
    with pytest.raises(ConfigError, match=r"^trainer.total_training_steps: 5, .*/r is complete, at step 5"):
        check(changed("run_dir=r", "trainer.total_training_steps=5"))
    # What it learned can be validated once more.
    check(changed("run_dir=r", "trainer.total_training_steps=5", "trainer.val_only=true"))


def test_another_experiment_in_the_same_run_dir_is_refused(verbose_arithmetic):
    config = changed("run_dir=r")
    provenance.save(config)
    check(changed("run_dir=r", "iapo.rho=0.7"))  # no checkpoint yet: nothing to mix up
    checkpoint(config, 2)
    shared = f"iapo.share_log_prob_forward={not config.iapo.share_log_prob_forward}".lower()
    speed = ("iapo.max_tokens_per_micro_batch=8", shared)
    for free in ("trainer.total_training_steps=80", "trainer.experiment_name=x", *speed):
        check(changed("run_dir=r", free))
    for change in ("actor_rollout_ref.actor.optim.lr=1e-5", "iapo.region=response", "actor_rollout_ref.rollout.n=4"):
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            check(changed("run_dir=r", change))
    with pytest.raises(ConfigError, match=r"holds a checkpoint made with iapo.rho=1.0, but now it is 0.7"):
        check(changed("run_dir=r", "iapo.rho=0.7"))
    with pytest.raises(ConfigError, match=r"^trainer.resume_mode: 'disable' would write over the run with check.*/r/"):
        check(changed("run_dir=r", "iapo.rho=0.7", "trainer.resume_mode=disable"))
    check(changed("run_dir=other", "trainer.resume_mode=disable"))
    with pytest.raises(ConfigError, match=r"^trainer.resume_mode: 'never' must be auto, disable or resume_path.$"):
        check(changed("run_dir=r", "trainer.resume_mode=never"))
    for unreadable in (b"a: [1", b"\xff\xfe\x00"):
        Path("r/config.yaml").write_bytes(unreadable)
        with pytest.raises(ConfigError, match=r"^run_dir: .*/r/config.yaml, .* can't be read") as error:
            check(changed("run_dir=r"))
        assert len(str(error.value).splitlines()) == 1
    Path("r/config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"differs in [0-9]+ more fields; choose another one") as error:
        check(changed("run_dir=r"))
    assert len(str(error.value).splitlines()) == 6


def run_command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "iapo.train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


@pytest.mark.e2e
def test_the_command_fails_before_ray_with_exit_status_2(verbose_arithmetic):
    result = run_command(
        "platform=cpu", "variant=iapo", "algorithm.adv_estimator=rloo", "actor_rollout_ref.rollout.n=1"
    )
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("iapo.train: ")]
    assert len(lines) == 2 and "Traceback" not in result.stderr
    assert not Path("runs").exists()


@pytest.mark.e2e
def test_ctrl_c_before_ray_is_one_line(tmp_path):
    """Sent by a module that the command imports, so in the middle of its imports."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, signal\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'omegaconf': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    result = run_command("--dry-run", "platform=cpu", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.getcwd()}")
    assert result.returncode == 130 and result.stderr == "iapo.train: interrupted\n"


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name,module,number,status,said",
    [
        ("data", "iapo.data", "SIGINT", 130, "interrupted"),
        ("warmup", "iapo.launch.warmup", "SIGTERM", 143, "stopped by SIGTERM"),
    ],
)
def test_a_stop_while_a_command_is_imported_is_one_line(tmp_path, name, module, number, status, said):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, signal\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.{number})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "iapo", name, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (result.returncode, result.stderr) == (status, f"iapo.{name}: {said}\n")


def test_dry_run_prints_the_resolved_configuration(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command sets
    for name, value in machine.cpu_environment({}).items():
        monkeypatch.setenv(name, value)
    assert train.main(["--dry-run", "platform=cpu", "variant=iapo", "iapo.alpha=0.05"]) == 0
    printed = capsys.readouterr().out
    config = OmegaConf.create(printed)  # and nothing else
    assert config.iapo.alpha == 0.05 and "${" not in printed
    assert list(config.iapo) == [field.name for field in dataclasses.fields(IapoConfig)]
    assert train.main(["--dry-run", "platform=cpu", "iapo.alpha=-1"]) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and refused.err == "iapo.train: iapo.alpha: -1 must be a number >= 0.\n"


@pytest.mark.e2e
def test_a_dry_run_ends_with_what_the_checks_say():
    command = [sys.executable, "-m", "iapo.train", "--dry-run", "platform=cpu", "iapo.gate=correct", "iapo.score=auto"]
    command.append("run_dir=/proc/x")
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    lines = shown.stdout.splitlines()
    assert shown.returncode == 0 and len(lines) > 1000
    assert lines[-3:] == [  # without verl's line that all checks passed
        "iapo: iapo.score=auto is first_token_entropy in this run",
        "warning: iapo.gate=correct has no effect with iapo.alpha=0.",
        "iapo: a dry run doesn't check machine, data, model and run folder; a run does, before it starts",
    ]


def test_what_else_verl_says_of_a_configuration_stays(capsys):
    both = ["algorithm.use_kl_in_reward=true", "actor_rollout_ref.actor.use_kl_loss=true"]
    check_with_verl(changed("variant=grpo", *both))
    assert capsys.readouterr() == ("", "NOTICE: You have both enabled in-reward kl and kl loss.\n")


def test_a_running_ray_cluster_gets_no_resources(monkeypatch):
    assert resolve("platform=cpu", "trainer.n_gpus_per_node=2").ray_kwargs.ray_init.num_gpus == 2
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    ray_init = resolve("platform=cpu").ray_kwargs.ray_init
    assert (ray_init.num_cpus, ray_init.num_gpus) == (None, None)


def test_losses_of_verl_may_take_the_place_of_the_clipped_one():
    for overrides in (
        "variant=gfpo LOSS=sapo",
        "variant=iapo LOSS=gspo",
        "variant=dapo LOSS=cispo",
        "variant=dler LOSS=dppo_tv",
    ):
        check(changed(*overrides.replace("LOSS", LOSS_MODE).split()), files=False)
    own_mean = "which is a mean over each completion's tokens first; seq-mean-token-mean averages the KL loss alike.$"
    with pytest.warns(UserWarning, match=f"loss_agg_mode=token-mean has no effect on the policy loss sapo, {own_mean}"):
        check(changed("variant=iapo", f"{LOSS_MODE}=sapo"), files=False)
    with pytest.warns(UserWarning, match="the policy loss geo_mean, which is a mean over completions; "):
        check(changed("variant=length_penalty", f"{LOSS_MODE}=geo_mean"), files=False)


def test_sapo_and_geo_mean_average_as_the_checks_say():
    """Of verl's own functions: on the old policy, where SAPO's gate of ratio 1 has slope 1."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    actor = omega_conf_to_dataclass(resolve("variant=grpo", "platform=cpu").actor_rollout_ref.actor)
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=3, global_batch_size=3, loss_scale_factor=None)
    mask, advantages = torch.tensor([[1, 1], [1, 0], [0, 0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, 0.0]])

    def gradient(mode):
        log_prob = torch.full((3, 2), -0.5, requires_grad=True)
        loss, _ = get_policy_loss_fn(mode)(torch.full((3, 2), -0.5), log_prob, advantages, mask, "token-mean", actor)
        return torch.autograd.grad(loss, log_prob)[0]

    # A mean over the three tokens; over tokens, then all three rows; of the row's mean advantage, then all three rows.
    expected = {
        "vanilla": [[-1 / 3, 1 / 3], [-2 / 3, 0], [0, 0]],
        "sapo": [[-1 / 6, 1 / 6], [-2 / 3, 0], [0, 0]],
        "geo_mean": [[0, 0], [-2 / 3, 0], [0, 0]],
    }
    for mode, rows in expected.items():
        torch.testing.assert_close(gradient(mode), torch.tensor(rows), atol=1e-6, rtol=1e-5)


def test_options_without_effect_warn(verbose_arithmetic):
    for override, message in (
        ("iapo.gate=correct", "iapo.gate=correct has no effect with iapo.alpha=0"),
        ("variant=grpo iapo.share_log_prob_forward=false", "iapo.share_log_prob_forward=False has no effect: no term"),
        ("iapo.max_gap=8", "iapo.max_gap has no effect with iapo.probe_at=stride"),
        ("iapo.answer_end=X", "iapo.answer_end has no effect with iapo.score=first_token_entropy"),
        ("iapo.rho=0 iapo.score=next_token_entropy", "iapo.score=next_token_entropy has no effect with iapo.alpha=0"),
        ("variant=iapo_ne iapo.validation_information=false iapo.stride=2", "iapo.stride=2 has no effect without a"),
    ):
        with pytest.warns(UserWarning, match=message):
            check(changed(*override.split()))


def test_the_ablation_without_probes_warns_of_nothing():
    overrides = ["iapo.validation_information=false", "iapo.region=response"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(changed("variant=iapo_ne", *overrides), files=False)
    assert not [str(w.message) for w in caught if "no effect" in str(w.message)]


def test_gpus_that_are_not_there_are_refused(verbose_arithmetic, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = resolve("platform=gpu", "trainer.n_gpus_per_node=0", "trainer.nnodes=4")
    with pytest.raises(ConfigError, match=r"trainer.n_gpus_per_node: 0"):
        machine.check_machine(config)


def test_several_nodes_need_a_ray_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"^trainer.nnodes: 2, but RAY_ADDRESS names no Ray cluster; start one"):
        machine.check_machine(resolve("platform=cpu", "trainer.nnodes=2"))


def test_a_platform_that_is_none_is_refused(capsys):
    assert train.main(["platform=tpu"]) == 2
    assert capsys.readouterr().err == "iapo.train: platform: 'tpu' must be cpu or gpu.\n"


@pytest.mark.parametrize("name", TASKS)
def test_embedded_data_are_generated_where_they_are_missing(name):
    config = resolve("platform=cpu", f"data={name}")
    compose.prepare_data(config)
    assert Path(config.data.val_files) == Path("data", name, "test.parquet").absolute()
    written = Path(config.data.val_files).stat().st_mtime_ns
    compose.prepare_data(config)
    assert Path(config.data.val_files).stat().st_mtime_ns == written
    assert [path.name for path in Path("data").iterdir()] == [name]


def test_data_that_cannot_be_written_is_refused(monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("IAPO_DATA_DIR", "file")
    with pytest.raises(
        ConfigError, match=r"^IAPO_DATA_DIR: .*/file/verbose_arithmetic .*; set the variable to a folder"
    ):
        compose.prepare_data(resolve("platform=cpu"))


def test_a_second_run_in_the_same_folder_is_refused():
    folder = Path("r").absolute()
    in_use = pytest.raises(FolderInUse, match=rf"/r is in use by .* alive \(process {os.getpid()} on .*\); wait")
    with lock_run_dir(folder), in_use:
        lock_run_dir(folder)
    lock_run_dir(folder).close()


def test_a_file_system_without_locks_warns(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    locked = pytest.warns(UserWarning, match=r"^run_dir: .*/r can't be locked .*not supported.*; start no second run")
    with locked, lock_run_dir(Path("r").absolute()):
        pass


def test_a_ray_cluster_that_does_not_answer_is_refused(free_port):
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS: nothing answers at 127.0.0.1:{free_port} .*refused"):
        machine.check_ray_answers(f"127.0.0.1:{free_port}")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: nothing answers at localhost:99999 "):
        machine.check_ray_answers("localhost:99999")
    server = grpc.server(ThreadPoolExecutor(1))  # as Ray's head is one
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    machine.check_ray_answers(address)
    server.stop(None)
    for elsewhere in ("", "auto", "ray://head:10001"):
        machine.check_ray_answers(elsewhere)


@pytest.fixture
def no_hub(free_port, monkeypatch, tmp_path):
    """A hub that does not answer, and its empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return constants


def test_a_model_that_the_hub_does_not_give_is_one_line(no_hub, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a second try"))
    with pytest.raises(ConfigError) as error:
        compose.checked_config(["platform=cpu", "model=org/name"])
    (line,) = str(error.value).splitlines()
    assert line.startswith(
        "actor_rollout_ref.model.path: org/name is no folder here, and the hub can't be asked for it "
        f"({no_hub.ENDPOINT} doesn't answer: "
    )
    assert line.endswith("); give a folder with a Hugging Face model (model=/a/folder), or check the network.")
    assert capfd.readouterr() == ("", "") and not Path("data").exists()


def test_a_model_in_the_hubs_cache_is_read_where_the_hub_does_not_answer(no_hub):
    folder = Path(no_hub.HF_HUB_CACHE, "models--org--name")
    for path, text in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    with pytest.warns(UserWarning, match=r"^HF_HUB_OFFLINE=1 is set, because http://.*; org/name is read from the hub"):
        machine.check_hub("org/name")
    assert no_hub.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_only_a_model_of_the_hub_asks_it(no_hub, monkeypatch):
    monkeypatch.setattr(machine, "hub_problem", lambda endpoint: pytest.fail("asked"))
    Path("a/b").mkdir(parents=True)
    for path in ("a/b", "/no/folder", "plain", "a/b/c"):
        machine.check_hub(path)
    monkeypatch.setattr(no_hub, "HF_HUB_OFFLINE", True)
    machine.check_hub("org/name")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b"", None])
def test_a_port_at_which_another_server_listens_is_refused(reply, monkeypatch):
    """It may reply, close the connection, or stay silent (None)."""
    ours = machine.speaks_http2
    monkeypatch.setattr(machine, "speaks_http2", lambda connection: ours(connection, timeout_s=0.5))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        kept = []

        def answer():
            kept.append(server.accept()[0])
            if reply is not None:
                kept[0].sendall(reply)
                kept[0].close()

        thread = Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match=f"^RAY_ADDRESS: {address} is no head of a Ray cluster, but another serv"):
            machine.check_ray_answers(address)
        thread.join()
        monkeypatch.setenv("RAY_USE_TLS", "1")
        machine.check_ray_answers(address)


@pytest.mark.e2e
def test_a_missing_plugin_is_loud(verbose_arithmetic):
    result = run_command("platform=cpu", VERL_USE_EXTERNAL_PLUGINS="none")
    assert result.returncode == 2 and "didn't load this package's plugin" in result.stderr


@pytest.mark.e2e
def test_a_ray_that_does_not_start_fails_the_run_with_one_last_line(verbose_arithmetic, tmp_path):
    (tmp_path / "file").touch()
    result = run_command("platform=cpu", f"run_dir={tmp_path}/r", RAY_TMPDIR=f"{tmp_path}/file")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("iapo.train: the run failed: ")
    assert "Traceback" in result.stderr  # before the one line, for whoever has to fix it
    assert (tmp_path / "r" / "starts.jsonl").is_file()


@pytest.mark.e2e
def test_an_installed_wheel_composes_from_any_folder(tmp_path):
    """The recipes and the embedded model travel inside the wheel."""
    repository = Path(train.__file__).parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", repository]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "wheel").glob("iapo-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    result = run_command("--dry-run", "platform=cpu", "variant=dapo", PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert f"path: {site}/iapo/assets/tiny" in result.stdout
    assert f"agent_loop_config_path: {site}/iapo/recipes/agent_loops.yaml" in result.stdout


ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars"


def test_the_environment_is_the_users_where_it_may_be(monkeypatch):
    for name in {*machine.cpu_environment({}), "TENSORBOARD_DIR"}:
        monkeypatch.delenv(name, raising=False)
    given = OmegaConf.select(resolve("platform=cpu", "run_dir=/r"), ENV_VARS)
    assert (given.OMP_NUM_THREADS, given.IAPO_ALL_CORES, given.VERL_PLATFORM) == ("1", "1", "cpu")
    assert given.TENSORBOARD_DIR == "/r/tensorboard"
    for name, value in {"OMP_NUM_THREADS": "3", "VLLM_CPU_KVCACHE_SPACE": "4", "NOT_OURS": "x"}.items():
        monkeypatch.setenv(name, value)
    line = [f"+{ENV_VARS}.GOMP_SPINCOUNT=7", f"+{ENV_VARS}.MINE=a", f"+{ENV_VARS}.TENSORBOARD_DIR=/t"]
    given = OmegaConf.select(resolve("platform=cpu", *line), ENV_VARS)
    assert (given.OMP_NUM_THREADS, given.IAPO_ALL_CORES, given.VLLM_CPU_KVCACHE_SPACE) == ("3", "0", "4")
    assert (given.GOMP_SPINCOUNT, given.MINE, given.TENSORBOARD_DIR) == ("7", "a", "/t")  # text: Ray takes no numbers
    assert "NOT_OURS" not in given  # Ray's workers inherit it
    # iapo.train sets the environment of its own process first; the second look must see the same.
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in machine.cpu_environment(os.environ).items():
        monkeypatch.setenv(name, value)
    given = OmegaConf.select(resolve("platform=cpu"), ENV_VARS)
    assert (given.OMP_NUM_THREADS, given.IAPO_ALL_CORES) == ("1", "1")
    given = OmegaConf.select(resolve("platform=cpu", f"+{ENV_VARS}.OMP_NUM_THREADS=2"), ENV_VARS)
    assert (given.OMP_NUM_THREADS, given.IAPO_ALL_CORES) == ("2", "0")


def test_what_the_platform_needs_is_refused_where_the_user_sets_something_else(monkeypatch):
    with pytest.raises(ConfigError, match=r"^VERL_PLATFORM: 'cuda', but platform=cpu needs 'cpu'; unset the var"):
        resolve("platform=cpu", f"+{ENV_VARS}.VERL_PLATFORM=cuda")


@pytest.mark.parametrize("all_cores,changes", [("1", True), ("0", False), (None, True)])
def test_a_worker_takes_all_cores_unless_the_user_chose(monkeypatch, all_cores, changes):
    from iapo.verl_adapter import cpu

    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("IAPO_ALL_CORES", raising=False)
    if all_cores:
        monkeypatch.setenv("IAPO_ALL_CORES", all_cores)
    cpu.use_all_cores(ranks=2)
    assert chosen == ([3] if changes else [])


def test_a_typed_line_break_is_one():
    config = resolve("platform=cpu", 'iapo.probe="</think>\\n<answer>"', 'iapo.exit_marker="</think>"')
    assert config.iapo.probe == "</think>\n<answer>" == IapoConfig().probe


def test_the_buffer_for_weights_holds_the_largest_of_them(verbose_arithmetic):
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = AutoConfig.from_pretrained(Path(train.__file__).parent / "assets/tiny")
    name, size = weights.largest_weight(tiny)
    model = AutoModelForCausalLM.from_config(tiny)
    assert dict(model.named_parameters())[name].nbytes == max(p.nbytes for p in model.parameters()) <= size * 2**20
    config = changed("data=verbose_arithmetic")
    weights.size_bucket(config)
    assert OmegaConf.select(config, weights.KEY) == 16
    check(config)
    # A model like SmolLM2-135M, whose embedding has 49,152 x 576 weights of 4 bytes, 108 MiB.
    shutil.copytree(Path(train.__file__).parent / "assets/tiny", "m")
    large = json.loads(Path("m/config.json").read_text()) | {"vocab_size": 49152, "hidden_size": 576}
    Path("m/config.json").write_text(json.dumps(large))
    config = changed("data=verbose_arithmetic", "model=m")
    weights.size_bucket(config)
    assert OmegaConf.select(config, weights.KEY) == 108
    check(config)
    config = changed("data=verbose_arithmetic", "model=m", f"{weights.KEY}=16")
    weights.size_bucket(config)
    with pytest.raises(ConfigError, match=r"megabytes: 16 MiB don't hold model.embed_tokens.weight of 108; set"):
        check(config)


def test_another_column_may_hold_the_prompts(verbose_arithmetic):
    import pyarrow as pa
    import pyarrow.parquet as pq

    Path("d").mkdir()
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"chat": PROMPT, "reward_model": REWARD, "data_source": ["x"] * 16}), f"d/{split}.parquet"
        )
    check(changed("data=d", *SHORT, "data.prompt_key=chat"))
    with pytest.raises(ConfigError, match=r"^data.train_files: .* lacks the columns prompt; it has chat"):
        check(changed("data=d", *SHORT))
    with pytest.raises(ConfigError, match=r"^data.train_files: .* lacks the columns question; it has"):
        check(changed("data=d", *SHORT, "data.prompt_key=question"))


@pytest.mark.parametrize(
    "environment,netrc,fine",
    [
        ({}, "", False),
        ({"WANDB_API_KEY": "k"}, "", True),
        ({"WANDB_MODE": "offline"}, "", True),
        ({"WANDB_MODE": "online"}, "", False),
        ({}, "machine api.wandb.ai login user password k", True),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password k", False),
    ],
)
def test_a_logger_that_cannot_log_in_is_refused(monkeypatch, tmp_path, environment, netrc, fine):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in (environment | {"NETRC": str(tmp_path / "netrc")}).items():
        monkeypatch.setenv(name, value)
    config = changed("trainer.logger=[console,wandb]")
    if fine:
        check(config, files=False)
    else:
        with pytest.raises(ConfigError, match=r"^trainer.logger: 'wandb' has no API key; run wandb login, or set"):
            check(config, files=False)


def test_a_file_is_no_folder_of_data(tmp_path):
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ConfigError, match=r"^data: .*/train.parquet is a file; give a folder that holds train.parq"):
        resolve("platform=cpu", f"data={tmp_path}/train.parquet")
