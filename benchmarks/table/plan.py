"""What the table trains: the methods of table.yaml with their knobs, and the runs that options ask for."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from benchmarks.table.jobs import Job
from iapo.data import write_parquets

ROOT = Path(__file__).parents[2]
REFERENCE, UNTRAINED = "grpo", "untrained"

# What the table itself says of a run, apart from the knobs, or relies on.
RESERVED = {"variant", "data", "data.val_files", "seed", "run_dir", "trainer.total_training_steps", "trainer.test_freq"}
RESERVED |= {"trainer.val_before_train", "trainer.val_only", "trainer.validation_data_dir", "trainer.default_local_dir"}
RESERVED |= {"actor_rollout_ref.rollout.val_kwargs.n"}


@dataclass(frozen=True)
class Method:
    """A line of table.yaml: the values that are tried of the keys `knob`; (None,) if it has no knob."""

    name: str
    why: str
    variant: str  # as iapo.train takes it: one, or several as [a,b]
    knob: tuple[str, ...] = ()
    values: tuple = (None,)
    quick: bool = True  # whether --quick runs it, with the first of its values
    run_again: str = ""  # why the committed table has no figures of it

    def overrides(self, value) -> list[str]:
        return [f"{key}={value}" for key in self.knob]

    def label(self, value) -> str:
        """The knob's short name with its value: k=4."""
        return f"{'='.join(key.rpartition('.')[2] for key in self.knob)}={value}" if self.knob else ""


@dataclass(frozen=True)
class Plan:
    """What to train, and where."""

    methods: dict[str, Method]
    steps: int
    samples: int
    seeds: tuple[int, ...]
    out: Path
    step_s: float = 11.0  # expected seconds of a step
    splits: tuple[str, ...] = ("validation", "test")
    overrides: tuple[str, ...] = ()

    def settings(self) -> dict:
        """What all runs of one output folder share."""
        return {name: getattr(self, name) for name in ("steps", "samples", "splits", "overrides")}

    @property
    def jobs(self) -> int:
        """How many runs it takes, the untrained model's evaluations included."""
        grid = sum(len(method.values) for method in self.methods.values())
        return len(self.seeds) + grid + len(self.methods) * (len(self.seeds) - 1)

    def data_file(self, name: str) -> Path:
        """train, a split, or what runs are evaluated on: see `write_evaluation_file`."""
        return self.out / "data" / "verbose_arithmetic" / f"{name}.parquet"

    def job(self, name: str, value, seed: int) -> Job:
        """The run of a method, or of none, with a value of its knob and a seed."""
        trained = name != UNTRAINED
        title = f"{name}-{str(value).replace('/', '_')}-seed{seed}" if value is not None else f"{name}-seed{seed}"
        folder = self.out / "runs" / title
        arguments = [
            "platform=cpu",
            f"variant={self.methods[name].variant if trained else REFERENCE}",
            "model=tiny",
            "data=verbose_arithmetic",
            f"data.val_files='{self.data_file('evaluation')}'",
            f"seed={seed}",
            f"run_dir='{folder}'",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.test_freq={self.steps}",
            "trainer.save_freq=10",
            "trainer.max_actor_ckpt_to_keep=1",
            "iapo.validation_information=false",
            # One update per batch in every row, whatever the recipe; table.yaml says why.
            "actor_rollout_ref.actor.ppo_mini_batch_size=${data.train_batch_size}",
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


def load_methods(path: Path) -> dict[str, Method]:
    """The methods of a table.yaml, in its order.

    Raises:
        ValueError: an entry that is none, in one line.
    """
    methods = {}
    for name, entry in read_section(path, "methods").items():
        where = f"{path.name}: methods.{name}"
        if not isinstance(entry, dict) or not isinstance(entry.get("why"), str):
            raise ValueError(f"{where}.why is missing; say in a line why these values.")
        if unknown := entry.keys() - {"why", "variant", "knob", "values", "quick", "run_again"}:
            raise ValueError(
                f"{where}.{min(unknown, key=str)} is unknown; an entry has why, variant, knob, values, quick and "
                "run_again."
            )
        variant, keys, values = (as_list(entry.get(key)) for key in ("variant", "knob", "values"))
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
        variants = f"[{','.join(variant)}]" if len(variant) > 1 else variant[0] if variant else name
        methods[name] = Method(name, entry["why"], variants, tuple(keys), tuple(values) or (None,), quick, run_again)
    return methods


def read_section(path: Path, name: str) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: no YAML: {' '.join(str(error).split())}") from None
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path.name}: {name} is missing, or is no mapping.")
    return section


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def make_plan(options: argparse.Namespace, path: Path = ROOT / "benchmarks/table/table.yaml") -> Plan:
    """The plan that the command's options ask for.

    Raises:
        ValueError: an unknown method, an impossible number, an argument that is no key=value.
    """
    settings = read_section(path, "quick" if options.quick else "full")
    methods = load_methods(path)
    usual = [name for name, method in methods.items() if method.quick or not options.quick]
    chosen = [name.strip() for name in options.methods.split(",")] if options.methods else usual
    for name in chosen:
        if name not in methods:
            raise ValueError(f"--methods: {name!r} must be one of {', '.join(methods)}.")
    if not options.quick and REFERENCE not in chosen:
        chosen.append(REFERENCE)  # the rule that chooses a knob's value looks at it
    methods = {name: method for name, method in methods.items() if name in chosen}
    if options.quick:
        methods = {name: replace(m, values=m.values[:1]) for name, m in methods.items()}
    for name in ("steps", "samples", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name}: {value} must be at least 1.")
    for override in options.overrides:
        if "=" not in override:
            raise ValueError(f"{override}: an argument for the runs is key=value.")
        key = override.partition("=")[0].lstrip("+~")
        if key in RESERVED or any(key in method.knob for method in methods.values()):
            raise ValueError(
                f"{override}: the table sets {key}; use --seeds, --steps, --samples, --out, or change {path.name}."
            )
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else settings["seeds"]
    except ValueError:
        raise ValueError(f"--seeds: {options.seeds!r} must be whole numbers such as 0,1,2.") from None
    return Plan(
        methods=methods,
        steps=options.steps or settings["steps"],
        samples=options.samples or settings["samples"],
        seeds=tuple(dict.fromkeys(seeds)),
        step_s=settings["step_s"],
        out=Path(options.out or ("runs/table-quick" if options.quick else "runs/table")).absolute(),
        splits=("test",) if options.quick else ("validation", "test"),
        overrides=(*settings.get("overrides", ()), *options.overrides),
    )


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
