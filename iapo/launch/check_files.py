"""What a run reads and where it writes, checked before Ray starts: folder, reward function, data, model, checkpoint.

Each check yields its problems, one line each: field, value, fix.
"""

import inspect
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from iapo.answer_format import FORMATS
from iapo.arguments import obstacle
from iapo.checkpoints import local_ranks, problem, resume_point, step_folder, steps, tracker_file
from iapo.config import IapoConfig
from iapo.data import NAMES
from iapo.data.judge import unreadable_rows
from iapo.launch.check_prompts import OUR_REWARD, is_embedded, prompt_problems
from iapo.launch.provenance import differences, saved_config
from iapo.launch.weights import KEY, largest_weight
from iapo.methods import load_states, make_methods
from iapo.tasks.embedded import TASK_OF, TASKS
from iapo.tasks.reference import references, unjudgeable
from iapo.tools.model import MODELS

# What a tokenizer is read from; a folder without any of these has none.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# What verl's DAPORewardManager passes to a reward function, by keyword.
REWARD_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def file_problems(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    """Everything that is wrong with the files; the prompts are read only if nothing else is wrong."""
    problems = [*_paths(config), *_reward(config), *_data(config, iapo), *_resume(config), *_model(config, iapo)]
    yield from problems or [*prompt_problems(config), *_long_references(config, iapo)]


def _paths(config: DictConfig) -> Iterator[str]:
    if reason := obstacle(Path(config.run_dir)):
        yield f"run_dir: {config.run_dir} {reason}; choose another."


def _reward(config: DictConfig) -> Iterator[str]:
    from verl.utils.import_utils import load_module

    reward = config.reward.custom_reward_function
    if not reward.path:
        return  # verl then uses its own
    if not reward.path.startswith("pkg://") and not Path(reward.path.removeprefix("file://")).is_file():
        yield f"reward.custom_reward_function.path: {reward.path} is no file; set a Python file or pkg://module."
        return
    try:
        module = load_module(reward.path)
    except Exception as error:  # whatever the module raises; verl wraps it for files
        reason = " ".join(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}".split())
        yield f"reward.custom_reward_function.path: {reward.path} can't be loaded ({reason}); fix it."
        return
    name = f"reward.custom_reward_function.name: {reward.name!r}"
    if not callable(function := getattr(module, str(reward.name), None)):
        yield f"{name} is no function of {reward.path}; set the name of one."
        return
    passed = dict.fromkeys(REWARD_ARGUMENTS) | dict(reward.get("reward_kwargs") or {})
    try:
        inspect.signature(function).bind(**passed)
    except TypeError as error:
        yield f"{name} can't be called by keyword with {', '.join(passed)} ({error}); let it take these, or **kwargs."


def _data(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    """A file is read once, and a complaint about several is one line."""
    fields: dict[str | None, list[str]] = {}
    for field in ("train_files", "val_files"):
        for name in listed(OmegaConf.select(config, f"data.{field}")) or [None]:
            fields.setdefault(name, []).append(f"data.{field}")
    places: dict[str, list[str]] = {}
    for name, given in fields.items():
        where = f"{' and '.join(dict.fromkeys(given))}: {name}"
        for complaint in _parquet(config, iapo, where, name):
            places.setdefault(complaint, []).append(where)
    for complaint, (first, *others) in places.items():
        yield f"{first}{complaint}" + (f" The same holds for {', '.join(others)}." if others else "")


def _parquet(config: DictConfig, iapo: IapoConfig, where: str, name: str | None) -> Iterator[str]:
    """Complaints, each in words that follow `where`, which names field and file."""
    import pyarrow
    import pyarrow.parquet

    path, prompt = Path(str(name)).expanduser(), config.data.prompt_key
    if name is None or not path.is_file():
        known = path.parent.name in NAMES
        make = f"make it with iapo data {path.parent.name} --out {path.parent.parent}, or " if known else ""
        yield f" is no file; {make}set the path of a parquet file."
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            rows = file.read(columns=[c for c in (prompt, "data_source", "reward_model") if c in schema.names])
    except (OSError, pyarrow.ArrowInvalid) as error:
        yield f" can't be read as parquet ({' '.join(str(error).split())}); make it again."
        return
    if len(rows) == 0:
        yield " has no rows; make it again."
        return
    missing = [column for column in (prompt, "data_source", "reward_model") if column not in schema.names]
    if missing:
        yield f" lacks the columns {', '.join(missing)}; it has {', '.join(schema.names)}."
    else:
        judged_by_us = config.reward.custom_reward_function.path == OUR_REWARD[0] or iapo.needs_references
        problems = [*_columns(schema, rows, prompt)] or [
            *_other_task(config, rows["data_source"].unique().to_pylist()),
            *_questions(rows[prompt], prompt),
            *_references(f"{where}, column", rows["reward_model"], judged_by_us),
        ]
        yield from (f", column {line}" for line in problems)


def _columns(schema, rows, prompt_key: str) -> Iterator[str]:
    """What verl would fail on or leave out without a word."""
    import pyarrow.types as types

    prompt, reward = schema.field(prompt_key).type, schema.field("reward_model").type
    is_list = types.is_list(prompt) or types.is_large_list(prompt) or types.is_fixed_size_list(prompt)
    if not is_list or not {"role", "content"} <= _fields(prompt.value_type):
        yield f"{prompt_key}: {prompt} must be a list of chat messages, structs with role and content."
    if "ground_truth" not in _fields(reward):
        yield f'reward_model: {reward} must be a struct with ground_truth, as {{"style": "rule", "ground_truth": "4"}}.'
    for name, fix in ((prompt_key, "each must hold chat messages"), ("data_source", "each must name the data set")):
        if count := rows[name].null_count:
            yield f"{name}: {count} rows are null; {fix}."


def _other_task(config: DictConfig, sources: Iterable[str]) -> Iterator[str]:
    """An embedded model knows the words of its own task alone; others are dropped from the prompt."""
    model = Path(str(config.actor_rollout_ref.model.path)).name
    if is_embedded(config) and model in TASK_OF and (others := TASKS.keys() & set(sources) - {TASK_OF[model]}):
        (name, *_) = sorted(others)
        fitting = next(other for other, task in TASK_OF.items() if task == name)
        yield (
            f"data_source: rows of {name}, but the model is {model}, which learned {TASK_OF[model]}; set "
            f"data={TASK_OF[model]}, or model={fitting}."
        )


def _questions(column, prompt_key: str) -> Iterator[str]:
    """Prompts that ask nothing, in an Arrow column of chat messages; a template writes 'None', or verl drops them."""
    empty = [number for number, messages in enumerate(column.to_pylist()) if not _asks(messages)]
    if empty:
        yield f"{prompt_key}: {len(empty)} rows ask nothing, the first is row {empty[0]}; each needs a user's question."


def _asks(messages: list[dict]) -> bool:
    """Whether every message of the user has content, text or not, and there is one."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return bool(asked) and all(content.strip() if isinstance(content, str) else content for content in asked)


def _references(where: str, column, judged_by_us: bool) -> Iterator[str]:
    """Reference answers that make every completion of their row wrong, in the Arrow column reward_model.

    Only our own reward says which values it can judge. Another may take a dict, or none.

    Args:
        where: names the column's file, in the warning of answers that the verifier can't read.
    """
    rows = column.to_pylist()
    null = [number for number, row in enumerate(rows) if row is None]
    if null:
        yield f"reward_model: {len(null)} rows are null, the first is row {null[0]}; each must hold a ground_truth."
        return
    truths = [row["ground_truth"] for row in rows]
    if judged_by_us and (problem := unjudgeable(truths)):
        yield (
            f"reward_model.ground_truth: {problem}; each must be a number, text, or a list of these, any of which is "
            "right; correct or remove it."
        )
    elif judged_by_us:
        try:
            bad = unreadable_rows(truths)
        except ImportError as error:
            yield f"reward_model.ground_truth: these answers can't be judged ({error})."
            return
        if len(bad) == len(truths):
            yield (
                f"reward_model.ground_truth: the verifier can read none of the {len(truths)} answers, the first is "
                f"{truths[0]!r}; give numbers, LaTeX or words."
            )
        elif bad:
            warnings.warn(
                f"{where} reward_model.ground_truth: the verifier can't read at least {len(bad)} of the {len(truths)} "
                f"answers, the first is {truths[bad[0]]!r} of row {bad[0]}, so any other spelling of them is judged "
                "wrong; give numbers, LaTeX or words, or remove these rows.",
                stacklevel=2,
            )


def _fields(kind) -> set[str]:
    """The names in an Arrow struct; none for any other type."""
    import pyarrow.types as types

    return {field.name for field in kind} if types.is_struct(kind) else set()


def _model(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    from transformers import AutoConfig, AutoTokenizer

    path = config.actor_rollout_ref.model.path
    if os.path.isabs(path) and not os.path.isdir(path):
        made = next((name for name, model in MODELS.items() if model.name == Path(path).name), None)
        make = f"make it with iapo model {made} --out {path}, or " if made else ""
        yield f"actor_rollout_ref.model.path: {path} is no folder; {make}give one that holds a Hugging Face model."
        return
    loaded = []
    for part, kind in (("config.json", AutoConfig), ("tokenizer", AutoTokenizer)):
        try:
            trust = config.actor_rollout_ref.model.trust_remote_code
            loaded.append(kind.from_pretrained(path, trust_remote_code=trust))
        except Exception as error:  # of transformers, of its libraries, or of the model's own code
            yield not_loaded("actor_rollout_ref.model.path", path, part, error)
            return
    model_config, tokenizer = loaded
    problems = [
        *_model_files(config, model_config, tokenizer),
        *_positions(config, model_config),
        *_shortest_answer(config, tokenizer),
        *_bucket(config, model_config),
    ]
    yield from problems
    if iapo.probes and not problems:
        yield from _probing(config, iapo, model_config, tokenizer)
    yield from _attention(config, model_config)


def not_loaded(field: str, path: str, part: str, error: Exception) -> str:
    """One line about a model's config.json or tokenizer, `part`, that transformers can't load from a folder or hub."""
    local = os.path.isdir(path)
    if local and not (Path(path) / "config.json").is_file():
        return f"{field}: {path} holds no config.json; give a folder that holds a Hugging Face model."
    if local and part == "tokenizer" and not any((Path(path) / name).is_file() for name in VOCABULARIES):
        return f"{field}: {path} holds no tokenizer (tokenizer.json and the like); put it there."
    reason = shorten(f"{type(error).__name__}: {error}", 250, placeholder=" ...")
    hub = "give a folder with a Hugging Face model (model=/a/folder) or a hub name that this machine can reach"
    return f"{field}: the {part} of {path} can't be loaded ({reason}); {'correct or replace it' if local else hub}."


def _probing(config: DictConfig, iapo: IapoConfig, model_config, tokenizer) -> Iterator[str]:
    """The tokenizer can write the probe, and the model can serve the probe pass."""
    from iapo.probe.supported_models import unsupported

    path = config.actor_rollout_ref.model.path
    probe = tokenizer.encode(iapo.probe, add_special_tokens=False)
    for name in ("probe", "exit_marker"):
        text = getattr(iapo, name)
        if tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) != text:
            yield f"iapo.{name}: {text!r} can't be written with the vocabulary of {path}; use other text."
            return
    length = config.data.max_prompt_length + config.data.max_response_length + len(probe)
    if iapo.score == "answer_logprob" and iapo.region == "response":
        length += config.data.max_response_length  # a probe, and the answer once more, after the answer
    if reason := unsupported(model_config, length):
        yield f"actor_rollout_ref.model.path: {path} can't serve the exit-entropy pass at {length} tokens: {reason}."


def _long_references(config: DictConfig, iapo: IapoConfig) -> Iterator[str]:
    """With a right answer after the probe, the longest sequence is longer still."""
    import pyarrow.parquet
    from transformers import AutoConfig, AutoTokenizer

    from iapo.probe.supported_models import unsupported

    if not iapo.needs_references:
        return
    model, data = config.actor_rollout_ref.model, config.data
    tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    names = [name for field in ("train_files", "val_files") for name in listed(config.data[field])]
    columns = [pyarrow.parquet.read_table(name, columns=["reward_model"])["reward_model"] for name in names]
    truths = [row["ground_truth"] for column in columns for row in column.to_pylist()]
    texts = {text + iapo.answer_end for truth in truths for text in references(truth)}
    length = data.max_prompt_length + data.max_response_length
    length += max(len(tokenizer.encode(iapo.probe + text, add_special_tokens=False)) for text in texts)
    model_config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    if reason := unsupported(model_config, length):
        yield (
            f"actor_rollout_ref.model.path: {model.path} can't serve the exit-entropy pass at {length} tokens, with "
            f"the longest reference answer: {reason}."
        )


def listed(files) -> list[str]:
    """One file, or several, as verl takes both."""
    return [files] if isinstance(files, str) else list(files or [])


def _model_files(config: DictConfig, model_config, tokenizer) -> Iterator[str]:
    path = config.actor_rollout_ref.model.path
    if os.path.isdir(path):
        yield from weight_problems("actor_rollout_ref.model.path", Path(path))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up where there are no files
        yield f"actor_rollout_ref.model.path: {path} holds no tokenizer (tokenizer.json and the like); put it there."
    elif tokenizer.eos_token_id is None:
        yield f"actor_rollout_ref.model.path: {path} has a tokenizer without eos_token; add it to its configuration."
    elif problem := other_end(path, tokenizer, model_config):
        yield problem
    elif not tokenizer.chat_template and not config.actor_rollout_ref.model.custom_chat_template:
        yield (
            f"actor_rollout_ref.model.path: {path} has a tokenizer without a chat template; add chat_template.jinja, "
            "or set actor_rollout_ref.model.custom_chat_template."
        )


def weight_problems(field: str, folder: Path) -> Iterator[str]:
    """What is wrong with the weights of a model's folder."""
    if not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        yield f"{field}: {folder} holds no weights (*.safetensors or *.bin); put them there."
    for file in sorted(folder.glob("*.safetensors")):
        if not is_whole(file):
            yield f"{field}: {file} is cut short; get it again."


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes of length, the header, the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def other_end(path: str, tokenizer, model_config) -> str | None:
    """What is wrong with the end tokens of generation_config.json or, where a model has none, of config.json.

    vLLM ends completions at these too. Where config.json has no eos_token_id, the default of its model type counts.
    """
    from transformers import GenerationConfig

    local, name = os.path.isdir(path), "generation_config.json"
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError as error:
        if local and (file := Path(path) / name).is_file():
            return f"actor_rollout_ref.model.path: {file} can't be read ({' '.join(str(error).split())}); correct it."
        ends, name = GenerationConfig.from_model_config(model_config).eos_token_id, "config.json"
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    if not ends or tokenizer.eos_token_id in ends:
        return None
    return (
        f"actor_rollout_ref.model.path: {path} has eos_token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), but "
        f"its {name} ends at eos_token_id {sorted(ends)}; correct the one that is wrong."
    )


def _attention(config: DictConfig, model_config) -> Iterator[str]:
    """platform=cpu has an attention of its own, which is not for every model."""
    from iapo.verl_adapter.packed_attention import IMPLEMENTATION, lacking

    key = "actor_rollout_ref.model.override_config.attn_implementation"
    if OmegaConf.select(config, key) == IMPLEMENTATION:
        length = config.data.max_prompt_length + config.data.max_response_length
        if name := lacking(model_config, length):
            path = config.actor_rollout_ref.model.path
            yield f"{key}: {IMPLEMENTATION} lacks {name}, which {path} has; set it to sdpa."


def _bucket(config: DictConfig, model_config) -> Iterator[str]:
    try:
        name, needed = largest_weight(model_config)
    except (ValueError, KeyError):  # no causal language model of transformers; `_probing` and verl say more
        return
    except Exception as error:  # of whatever a model makes of a number that it can't use
        path, reason = config.actor_rollout_ref.model.path, f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield f"actor_rollout_ref.model.path: no model can be made of {path}'s config.json ({reason}); correct it."
        return
    size = OmegaConf.select(config, KEY)
    if size is None:  # not filled in yet
        return
    if not isinstance(size, int) or isinstance(size, bool) or size < needed:
        yield f"{KEY}: {size} MiB don't hold {name} of {needed}; set it to at least {needed}, or to null."


def _positions(config: DictConfig, model_config) -> Iterator[str]:
    text = model_config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    maximum = getattr(text, "max_position_embeddings", None)
    length = config.data.max_prompt_length + config.data.max_response_length
    # Other rotary types reach further, each in its own way.
    if maximum and rope.get("rope_type", "default") == "default" and length > maximum:
        yield (
            f"data.max_response_length: {config.data.max_response_length}, with "
            f"data.max_prompt_length={config.data.max_prompt_length}, exceeds the {maximum} positions of "
            f"{config.actor_rollout_ref.model.path}; lower them, or choose another model=."
        )


def _shortest_answer(config: DictConfig, tokenizer) -> Iterator[str]:
    """Where no well-formed completion fits, our reward makes all completions equal."""
    reward, answer_format = config.reward.custom_reward_function, FORMATS[config.iapo.format]
    if (reward.path, reward.name) != OUR_REWARD:
        return
    text = f"{answer_format.probe}0{answer_format.answer_end}"
    text = text if answer_format.well_formed(text) else answer_format.opening + text
    needed = len(tokenizer.encode(text, add_special_tokens=False))
    if config.data.max_response_length < needed:
        yield (
            f"data.max_response_length: {config.data.max_response_length} tokens hold no answer in the format "
            f"{answer_format.name!r}; the shortest, {text!r}, has {needed}; raise it."
        )


def _resume(config: DictConfig) -> Iterator[str]:
    tracker, mode = tracker_file(config), config.trainer.resume_mode
    if mode not in ("auto", "disable", "resume_path"):
        yield f"trainer.resume_mode: {mode!r} must be auto, disable or resume_path."
    if mode == "disable" and tracker.is_file():
        yield (
            f"trainer.resume_mode: 'disable' would write over the run with checkpoints in {tracker.parent}; choose "
            "another run_dir, or remove that one."
        )
    if config.trainer.resume_from_path and mode != "resume_path":
        yield (
            f"trainer.resume_from_path: {config.trainer.resume_from_path} has no effect with "
            f"trainer.resume_mode={mode}; set trainer.resume_mode=resume_path, or leave it out."
        )
    contents = config.actor_rollout_ref.actor.checkpoint.load_contents
    if mode == "auto" and not tracker.is_file():
        folders = [step_folder(tracker.parent, step) for step in steps(tracker.parent)]
        if whole := [folder.name for folder in folders if problem(folder, contents, local_ranks(config)) is None]:
            yield (
                f"run_dir: {tracker.parent} holds {whole[-1]} but no {tracker.name}, so the run would start from the "
                "beginning; write its number into that file, or choose another run_dir."
            )
    if mode == "resume_path":
        yield from _resume_path(config, contents)
    if mode != "auto" or not tracker.is_file():
        return
    if not saved_config(config).is_file():
        yield (
            f"run_dir: {config.run_dir} holds checkpoints but no config.yaml, which says what they were made with; "
            "restore the file, or choose another run_dir."
        )
        return
    yield from _step_reached(config, tracker)
    yield from _changed(config)


def _resume_path(config: DictConfig, contents: Sequence[str]) -> Iterator[str]:
    """verl reads the step from the end of the path as it is written."""
    field, path = "trainer.resume_from_path", config.trainer.resume_from_path
    if not re.fullmatch(r"(.*/)?global_step_[0-9]+", str(path)):
        yield f"{field}: {path} must end in global_step_<N>; give a step's folder, without a slash at its end."
        return
    folder, ranks = Path(path), local_ranks(config)
    if reason := problem(folder, contents, ranks):
        found = [step_folder(folder.parent, step) for step in steps(folder.parent)]
        whole = [other.name for other in found if problem(other, contents, ranks) is None]
        yield f"{field}: {reason}; choose another step (whole: {', '.join(whole) or 'none'})."
        return
    try:
        load_states(make_methods(OmegaConf.to_container(config, resolve=True)["methods"]), folder)
    except ValueError as error:
        yield str(error)


def _changed(config: DictConfig) -> Iterator[str]:
    """What the run began with and now differs; a resumed run must be the same run."""
    try:
        changed = list(differences(config))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        yield (
            f"run_dir: {config.run_dir}/config.yaml, which says what its checkpoint was made with, can't be read "
            f"({reason}); restore the file, or choose another run_dir."
        )
        return
    for field, before, now in changed[:5]:
        yield (
            f"run_dir: {config.run_dir} holds a checkpoint made with {field}={before}, but now it is {now}; set it "
            "back to resume, or choose another run_dir."
        )
    if len(changed) > 5:
        yield f"run_dir: {config.run_dir}/config.yaml differs in {len(changed) - 5} more fields; choose another one."


def _step_reached(config: DictConfig, tracker: Path) -> Iterator[str]:
    """The newest checkpoint may be broken; then an older one has to do, which the trainer finds in the same way."""
    found = resume_point(config)
    if found.step is None:
        reason = found.problems[-1] if found.problems else f"{tracker.parent} holds no step"
        yield (
            f"run_dir: no run can resume from {tracker.parent}: {reason}; restore it, remove {tracker.name} to start "
            "from the beginning, or choose another run_dir."
        )
        return
    total = config.trainer.total_training_steps
    if total is not None and found.step >= total and not config.trainer.val_only:
        yield (
            f"trainer.total_training_steps: {total}, but the run in {config.run_dir} is complete, at step "
            f"{found.step}; set a larger number to train on."
        )
    elif found.problems:
        warnings.warn(f"run_dir: {found.problems[0]}; the run resumes from step {found.step}.", stacklevel=2)
