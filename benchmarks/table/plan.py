"""What a table trains: the methods of its YAML with their knobs, and the runs that options ask for."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from benchmarks.table.jobs import Job
from iapo.data import write_parquets
from iapo.tasks.embedded import TASKS

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "benchmarks/table"  # NAME.yaml for each
DEFAULT = "table"
REFERENCE, UNTRAINED = "grpo", "untrained"

# What the table itself says of a run, apart from the knobs, or relies on.
RESERVED = {"variant", "model", "data", "data.val_files", "seed", "run_dir"}
RESERVED |= {"trainer.total_training_steps", "trainer.test_freq", "trainer.val_before_train", "trainer.val_only"}
RESERVED |= {"trainer.validation_data_dir", "trainer.default_local_dir", "actor_rollout_ref.rollout.val_kwargs.n"}

KEYS = ("task", "model", "like", "shared", "full", "quick", "methods")
METHOD_KEYS = ("why", "variant", "set", "knob", "values", "match", "seeds", "quick", "run_again", "family")
FAMILIES = ("information", "length", "control", "neither")


@dataclass(frozen=True)
class Method:
    """A row of the table: the values that are tried of the keys `knob`; (None,) if it has no knob."""

    name: str
    why: str
    variant: str  # as iapo.train takes it: one, or several as [a,b]
    knob: tuple[str, ...] = ()
    values: tuple = (None,)
    quick: bool = True  # whether --quick runs it, with the first of its values
    run_again: str = ""  # why the committed table has no figures of it
    fixed: tuple[str, ...] = ()  # overrides of all its runs
    match: str = ""  # the row whose tokens its value has to come near, in place of the rule
    seeds: int | None = None  # how many of the table's seeds it takes, from the first on; None: all
    family: str = "neither"  # one of FAMILIES: what it knows of a token, or that it is a control

    def overrides(self, value) -> list[str]:
        return [*self.fixed, *(f"{key}={value}" for key in self.knob)]

    def label(self, value) -> str:
        """The knob's short name with its value: k=4."""
        return f"{'='.join(key.rpartition('.')[2] for key in self.knob)}={value}" if self.knob else ""

    def sets(self, key: str) -> bool:
        """Whether the row says what a key is."""
        return key in self.knob or key in map(key_of, self.fixed)


@dataclass(frozen=True)
class Plan:
    """What to train, and where."""

    table: str  # the name of its YAML
    task: str  # the embedded task
    model: str
    methods: dict[str, Method]
    steps: int
    samples: int
    seeds: tuple[int, ...]
    out: Path
    step_s: float = 11.0  # expected seconds of a step
    splits: tuple[str, ...] = ("validation", "test")
    shared: tuple[str, ...] = ()  # the overrides that the table gives all rows
    overrides: tuple[str, ...] = ()  # further ones, which --quick and the command line change

    def settings(self) -> dict:
        """What all runs of one output folder share."""
        return {name: getattr(self, name) for name in ("steps", "samples", "splits", "overrides")}

    @property
    def jobs(self) -> int:
        """How many runs it takes, the untrained model's evaluations included."""
        trained = sum(len(method.values) + len(self.seeds_of(name)) - 1 for name, method in self.methods.items())
        return len(self.seeds) + trained

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of a method, or of the untrained model."""
        return self.seeds[: self.methods[name].seeds] if name in self.methods else self.seeds

    def data_file(self, name: str) -> Path:
        """train, a split, or what runs are evaluated on: see `write_evaluation_file`."""
        return self.out / "data" / self.task / f"{name}.parquet"

    def job(self, name: str, value, seed: int) -> Job:
        """The run of a method, or of none, with a value of its knob and a seed."""
        trained = name != UNTRAINED
        title = f"{name}-{str(value).replace('/', '_')}-seed{seed}" if value is not None else f"{name}-seed{seed}"
        folder = self.out / "runs" / title
        arguments = [
            "platform=cpu",
            f"variant={self.methods[name].variant if trained else REFERENCE}",
            f"model={self.model}",
            f"data={self.task}",
            f"data.val_files='{self.data_file('evaluation')}'",
            f"seed={seed}",
            f"run_dir='{folder}'",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.test_freq={self.steps}",
            "trainer.save_freq=10",
            "trainer.max_actor_ckpt_to_keep=1",
            "iapo.validation_information=false",
            *self.shared,
            *(self.methods[name].overrides(value) if trained else ()),
            *self.overrides,
            f"trainer.val_before_train={str(not trained).lower()}",
            f"trainer.val_only={str(not trained).lower()}",
        ]
        return Job(title, folder, tuple(arguments))


def write_evaluation_file(plan: Plan) -> None:
    """The prompts of all splits, `samples` rows for each, told apart by their index, which seeds a completion.

    val_kwargs.n would sample as often, but above 1 verl bootstraps the best of n of every prompt and number, which
    takes longer than the sampling.
    """
    rows = [row for split in plan.splits for row in pq.read_table(plan.data_file(split)).to_pylist()]
    distinct = 1 + max(row["extra_info"]["index"] for row in rows)
    copies = [
        row | {"extra_info": row["extra_info"] | {"index": row["extra_info"]["index"] + copy * distinct}}
        for copy in range(plan.samples)
        for row in rows
    ]
    write_parquets({plan.data_file("evaluation"): copies})


# --- a table's YAML ---


def read_table(path: Path) -> dict:
    """The content of a table's YAML, with the keys that every table has.

    Raises:
        ValueError: it is none, in one line.
    """
    content = keys_of_table(path)
    if "like" in content:
        content = combined(content, path)
    if content.get("task") not in list(TASKS):
        raise ValueError(f"{path.name}: task: {content.get('task')!r} must be one of {', '.join(TASKS)}.")
    if not isinstance(content.get("model"), str):
        raise ValueError(f"{path.name}: model: {content.get('model')!r} must name one, as in model=tiny.")
    for name in ("full", "quick", "methods"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"{path.name}: {name} is missing, or is no mapping.")
    check_overrides(as_list(content.get("shared")), f"{path.name}: shared")
    return content


def keys_of_table(path: Path) -> dict:
    """What a table's YAML says itself.

    Raises:
        ValueError: it is no YAML, or has a key that no table has.
    """
    try:
        content = as_mapping(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: no YAML: {' '.join(str(error).split())}") from None
    if unknown := content.keys() - set(KEYS):
        raise ValueError(f"{path.name}: {min(unknown, key=str)} is unknown; a table has {listed(KEYS)}.")
    return content


def combined(content: dict, path: Path) -> dict:
    """A table with what it doesn't say from the one that it is `like`; of a method that both have, key by key.

    Raises:
        ValueError: there is no such table, it is none, or it is like another one itself.
    """
    other = path.with_name(f"{content['like']}.yaml")
    if other == path or not other.is_file() or "like" in (base := keys_of_table(other)):
        raise ValueError(f"{path.name}: like: {content['like']!r} must be a table of this folder that has no like.")
    methods = dict(as_mapping(base.get("methods")))
    for name, entry in as_mapping(content.get("methods")).items():
        methods[name] = as_mapping(methods.get(name)) | as_mapping(entry)
    return base | content | {"methods": methods}


def as_mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def load_methods(path: Path) -> dict[str, Method]:
    """The methods of a table's YAML, in its order.

    Raises:
        ValueError: the YAML is no table, or an entry none; in one line.
    """
    entries = read_table(path)["methods"]
    methods = {name: method_of(name, entry, f"{path.name}: methods.{name}") for name, entry in entries.items()}
    for name, method in methods.items():
        if method.match and (method.match not in methods or methods[method.match].match or name == REFERENCE):
            raise ValueError(
                f"{path.name}: methods.{name}.match: {method.match!r} must be another row without one, and "
                f"{REFERENCE} has none."
            )
    if REFERENCE in methods and methods[REFERENCE].seeds is not None:
        raise ValueError(f"{path.name}: methods.{REFERENCE}.seeds: all rows are compared with it; leave it out.")
    return methods


def method_of(name: str, entry: object, where: str) -> Method:
    """A row from its entry, which `where` names in errors.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("why"), str):
        raise ValueError(f"{where}.why is missing; say in a line why these values.")
    if unknown := entry.keys() - set(METHOD_KEYS):
        raise ValueError(f"{where}.{min(unknown, key=str)} is unknown; an entry has {listed(METHOD_KEYS)}.")
    variant, keys, values, fixed = (as_list(entry.get(key)) for key in ("variant", "knob", "values", "set"))
    if not all(isinstance(text, str) for text in (name, *variant, *keys)):
        raise ValueError(f"{where}: its name, variant and knob must be texts.")
    if bool(keys) != bool(values) or len(values) > 4:
        raise ValueError(f"{where} needs both knob and 1 to 4 values, or neither.")
    if not all(isinstance(value, bool | int | float | str) for value in values) or len(set(values)) < len(values):
        raise ValueError(f"{where}.values: {values} must be numbers or texts, each once.")
    if not isinstance(quick := entry.get("quick", True), bool):
        raise ValueError(f"{where}.quick: {quick!r} must be true or false.")
    if not isinstance(run_again := entry.get("run_again", ""), str):
        raise ValueError(f"{where}.run_again: {run_again!r} must say why.")
    if not isinstance(match := entry.get("match", ""), str) or (match and not keys):
        raise ValueError(f"{where}.match: {match!r} must name a row, and there must be a knob to choose.")
    seeds = entry.get("seeds")
    if seeds is not None and (isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1):
        raise ValueError(f"{where}.seeds: {seeds!r} must be how many of the table's seeds it takes, at least 1.")
    if (family := entry.get("family", Method.family)) not in FAMILIES:
        raise ValueError(f"{where}.family: {family!r} must be one of {', '.join(FAMILIES)}.")
    check_overrides(fixed, f"{where}.set", keys)
    variants = f"[{','.join(variant)}]" if len(variant) > 1 else variant[0] if variant else name
    return Method(
        name=name,
        why=entry["why"],
        variant=variants,
        knob=tuple(keys),
        values=tuple(values) or (None,),
        quick=quick,
        run_again=run_again,
        fixed=tuple(fixed),
        match=match,
        seeds=seeds,
        family=family,
    )


def check_overrides(overrides: list, where: str, knob: list[str] | None = None) -> None:
    """Check that these are key=value, and say nothing that the table says elsewhere.

    Raises:
        ValueError: one isn't, or does.
    """
    for override in overrides:
        if not isinstance(override, str) or "=" not in override:
            raise ValueError(f"{where}: {override!r} must be key=value.")
        if key_of(override) in RESERVED | set(knob or ()):
            raise ValueError(f"{where}: {override} sets what the table sets elsewhere; drop it.")


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


# --- from options to a plan ---


def make_plan(options: argparse.Namespace, tables: Path = TABLES) -> Plan:
    """The plan that the command's options ask for.

    Args:
        tables: the folder of the tables' YAML.

    Raises:
        ValueError: an unknown table or method, an impossible number, an argument that is no key=value.
    """
    path = tables / f"{options.table}.yaml"
    if options.table not in (names := sorted(file.stem for file in tables.glob("*.yaml"))):
        raise ValueError(f"--table: {options.table!r} must be one of {', '.join(names)}.")
    content, methods = read_table(path), load_methods(path)
    settings = content["quick" if options.quick else "full"]
    methods = chosen(methods, options)
    for name in ("steps", "samples", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name}: {value} must be at least 1.")
    for override in options.overrides:
        if "=" not in override:
            raise ValueError(f"{override}: an argument for the runs is key=value.")
        key = key_of(override)
        if key in RESERVED or any(method.sets(key) for method in methods.values()):
            raise ValueError(
                f"{override}: the table sets {key}; use --table, --seeds, --steps, --samples, --out, or change "
                f"{path.name}."
            )
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else settings["seeds"]
    except ValueError:
        raise ValueError(f"--seeds: {options.seeds!r} must be whole numbers such as 0,1,2.") from None
    return Plan(
        table=options.table,
        task=content["task"],
        model=content["model"],
        methods=methods,
        steps=options.steps or settings["steps"],
        samples=options.samples or settings["samples"],
        seeds=tuple(dict.fromkeys(seeds)),
        step_s=settings["step_s"],
        out=Path(options.out or f"runs/{options.table}{'-quick' if options.quick else ''}").absolute(),
        splits=("test",) if options.quick else ("validation", "test"),
        shared=tuple(as_list(content.get("shared"))),
        overrides=(*settings.get("overrides", ()), *options.overrides),
    )


def chosen(methods: dict[str, Method], options: argparse.Namespace) -> dict[str, Method]:
    """The rows that the options ask for, and those that the choice of their knobs looks at.

    Raises:
        ValueError: an unknown one.
    """
    usual = [name for name, method in methods.items() if method.quick or not options.quick]
    names = [name.strip() for name in options.methods.split(",")] if options.methods else usual
    for name in names:
        if name not in methods:
            raise ValueError(f"--methods: {name!r} must be one of {', '.join(methods)}.")
    if options.quick:  # nothing is chosen
        return {name: replace(m, values=m.values[:1], match="") for name, m in methods.items() if name in names}
    names += [REFERENCE, *(methods[name].match for name in names)]
    return {name: method for name, method in methods.items() if name in names}


def check_runs(plan: Plan, config_of: Callable[[Job], str]) -> dict[str, str]:
    """The configurations of all runs with the first seed by their names.

    Raises:
        ValueError: one would be refused; so that a mistake shows now, and not hours later.
    """
    runs = [(UNTRAINED, None)] + [(method.name, value) for method in plan.methods.values() for value in method.values]
    configs = {}
    for job in [plan.job(*run, plan.seeds[0]) for run in runs]:
        try:
            configs[job.name] = config_of(job)
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from None
    return configs


def resolved_config(job: Job) -> str:
    """The text of the config.yaml that a start of this job would write.

    Raises:
        iapo.launch.checks.ConfigError: iapo.train would refuse it.
    """
    from omegaconf import OmegaConf

    from iapo.launch.checks import check
    from iapo.launch.compose import resolve

    config = resolve(list(job.arguments))
    check(config, files=False)
    return OmegaConf.to_yaml(config)
