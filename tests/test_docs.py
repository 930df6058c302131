"""The docs against the code: links, paths, commands and keys exist, and what they show runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from iapo.__main__ import COMMANDS
from iapo.config import IapoConfig
from iapo.launch.compose import INNER_RECIPES
from iapo.launch.provenance import by_dotted_key

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks", "findings", "iapo")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
# What a path in the text begins with, from the root or from `iapo/`; those of a run's folder exist only later.
FIRST_FOLDERS = ("iapo", "recipes", "docs", "scripts", "tests", "benchmarks", "findings", "docker", "verl_adapter")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", text)


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page in one language."""
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """The names under which GitHub lists the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines(page: Path) -> Iterator[str]:
    """The commands of a page's bash blocks, without comments."""
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            if command := re.sub(r"(^|\s)#.*", "", line).strip():
                yield command


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, a heading that {file.name} lacks"


@each_page
def test_paths_in_the_text_exist(page):
    """Files have a suffix and folders end in a slash; `iapo/reward/acc` is a metric."""
    named = re.findall(r"`([\w./-]+(?:/|\.\w+))`", prose(page.read_text()))
    in_trees = re.findall(r"[\w./-]+/[\w./-]*", "".join(blocks(page)))
    for path in named + in_trees:
        made_by_the_guide = page.name == "adding-a-method.md" and "weighted_reinforce" in path
        if path.split("/")[0] in FIRST_FOLDERS and not made_by_the_guide:
            assert (ROOT / path).exists() or (ROOT / "iapo" / path).exists(), f"{page.name} names {path}"


@each_page
def test_python_names_in_the_text_exist(page):
    """`iapo.information.exit_entropy` and the like; `iapo.alpha` is a key of the configuration."""
    keys = {field.name for field in fields(IapoConfig)}
    for name in re.findall(r"`(?:pkg://)?(iapo\.[A-Za-z_.]+)`", prose(page.read_text())):
        parts = name.split(".")
        if len(parts) == 2 and parts[1] in keys:
            continue
        if "yaml" in parts or name == "iapo.sbatch":
            continue
        module = next(n for n in range(len(parts), 0, -1) if is_module(parts[:n]))
        if rest := parts[module:]:
            assert module > 1 and len(rest) == 1, f"{page.name} names {name}"
            source = module_file(parts[:module]).read_text()
            assert re.search(rf"\b{rest[0]}\b", source), f"{page.name} names {name}"


def is_module(parts: list[str]) -> bool:
    return module_file(parts).is_file()


def module_file(parts: list[str]) -> Path:
    folder = ROOT.joinpath(*parts)
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@each_page
def test_commands_exist(page):
    for line in [*shell_lines(page), *re.findall(r"`((?:bash|iapo|python -m) [^`]+)`", prose(page.read_text()))]:
        words = line.replace("`", "").split()
        if words[0] == "iapo" and words[1:] and not words[1].startswith("-"):
            names = words[1].split("|")
            assert set(names) <= set(COMMANDS), f"{page.name}: {line}"
        elif words[:2] == ["python", "-m"]:
            own = words[2].split(".")
            assert own[0] not in ("iapo", "benchmarks") or module_file(own).is_file(), f"{page.name}: {line}"
        elif words[0] in ("bash", "sbatch"):
            script = next(word for word in words[1:] if word.endswith((".sh", ".sbatch")))
            assert (ROOT / script).is_file(), f"{page.name}: {line}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 1000


def test_the_algorithm_alone_runs_as_the_readme_shows_it(monkeypatch):
    (code,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    shown = {}
    exec(code, shown)
    h, s, mask, advantages = (shown[name] for name in ("h", "s", "mask", "advantages"))
    assert h.shape == (8, mask.shape[1] + 1) and (h >= 0).all() and (h[:, 0] > 0.1).all()
    torch.testing.assert_close(s.sum(1), h[:, 0] - h[:, -1], atol=1e-5, rtol=0)
    assert advantages.shape == mask.shape and (advantages[mask == 0] == 0).all() and advantages.abs().sum() > 0
    assert "verl" not in code


def test_the_readme_lists_every_method_as_its_page_does():
    row = re.compile(r"^\| (.*`.*) \| (?:.* \|)? ?([^|]+) \| ([^|]+) \|$", re.MULTILINE)

    def listed(page: Path) -> dict[str, tuple[list[str], str]]:
        """What a page's table of methods says by variant: papers and stages."""
        table = next(part for part in page.read_text().split("\n\n") if "| acts on |" in part)
        found = {}
        for names, papers, stages in row.findall(table):
            for name in re.findall(r"`(\w+)`", names):
                found[name] = sorted(set(re.findall(r"\d{4}\.\d{5}", papers))), stages
        return found

    readme, page = listed(ROOT / "README.md"), listed(ROOT / "docs" / "methods.md")
    assert set(readme) == {path.stem for path in (ROOT / "recipes" / "variant").glob("*.yaml")}
    assert readme == page


def test_configuration_has_every_key_with_its_default():
    page = (ROOT / "docs" / "configuration.md").read_text()
    for field in fields(IapoConfig):
        row = re.search(rf"^\| `iapo\.{field.name}` \| ([^|]*) \|", page, re.MULTILINE)
        assert row, f"iapo.{field.name}"
        plain = field.default is None or isinstance(field.default, bool)
        default = yaml.safe_dump(field.default).split()[0] if plain else str(field.default)
        assert row[1].replace("`", "").replace(r"\n", "\n").startswith(default), f"iapo.{field.name}"
    defaults = yaml.safe_load((ROOT / "recipes" / "defaults.yaml").read_text())
    for key in by_dotted_key({name: node for name, node in defaults.items() if name != "iapo"}):
        assert f"`{key}`" in page, key
    for group in ("variant", "model", "data", "format", "platform"):
        for path in (ROOT / "recipes" / group).glob("*.yaml"):
            assert path.stem in INNER_RECIPES or f"`{path.stem}`" in page, path


def test_configuration_shows_how_the_recipes_of_models_sample():
    """The table of models: format, sampling of validation, response tokens; `-7b` ends the name before it."""
    page, shown = (ROOT / "docs" / "configuration.md").read_text(), set()
    for names, answer_format, sampling, tokens in re.findall(
        r"^\| ((?:`[\w.-]+`(?:, )?)+) \| `(\w+)`[^|]* \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE
    ):
        first, *ends = re.findall(r"`([\w.-]+)`", names)
        for name in [first, *(first.rpartition("-")[0] + end for end in ends)]:
            recipe = yaml.safe_load((ROOT / "recipes" / "model" / f"{name}.yaml").read_text())
            (given,) = [entry["override /format"] for entry in recipe.get("defaults", [])] or ["tags"]
            said = {key: float(value) for key, value in re.findall(r"(temperature|top_p|top_k) ([\d.]+)", sampling)}
            expected = recipe["actor_rollout_ref"]["rollout"]["val_kwargs"]
            greedy = {"temperature": 0.0, "do_sample": False} if sampling.startswith("greedy") else {}
            assert (answer_format, said | greedy) == (given, expected), name
            assert tokens == str(recipe.get("data", {}).get("max_response_length", "as the data set")), name
            shown.add(name)
    sampled = {path.stem for path in (ROOT / "recipes" / "model").glob("*.yaml") if "val_kwargs" in path.read_text()}
    assert shown == sampled


@each_page
def test_a_block_that_makes_a_model_makes_its_data_too(page):
    """Copied as it is, it must not end where `iapo train` asks for the data."""
    for block in blocks(page, "bash"):
        if re.search("^iapo (model|warmup) ", block, re.MULTILINE):
            made = set(re.findall(r"^iapo data (\w+)", block, re.MULTILINE))
            assert set(re.findall(r"\bdata=(\w+)", block)) <= made, f"{page.name}: {block}"


def test_environment_variables_of_ours_are_documented():
    """Each that a script or a module reads, `IAPO_RUN_ID` as one that a run sets itself."""
    read = set()
    for path in [*ROOT.glob("scripts/**/*"), *ROOT.glob("iapo/**/*.py")]:
        if path.is_file():
            read |= set(re.findall(r"\bIAPO_[A-Z_]+\b", path.read_text()))
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert read and all(f"`{name}`" in page for name in read), read


def test_results_show_the_table_and_the_readme_its_rows():
    results = ROOT / "benchmarks/table/results"
    rows = (results / "table.md").read_text().partition("\n\n")[0].splitlines()
    page, readme = (ROOT / "docs" / "results.md").read_text(), (ROOT / "README.md").read_text()
    assert "\n".join(rows) in page and len(rows) > 2
    assert f"all {len(rows) - 2} rows" in readme
    table = {cells[1].strip(" *"): cells for cells in (row.split("|") for row in rows[2:])}
    shown = {
        "`grpo`": "grpo",
        "`iapo`, alpha=0.01": "iapo",
        "`length_penalty`, weight=2": "length_penalty",
        "`iapo_rate`, rho=2": "iapo_rate",
        "`iapo_rate` with `dapo`, rho=3": "iapo_rate+dapo",
    }
    for label, name in shown.items():
        _, _, _, accuracy, tokens, _, _, minimum, *_ = table[name]
        assert f"| {label} |{accuracy}|{tokens}| {minimum.split()[0]} |" in readme, label
    assert "(benchmarks/table/results/pareto.png)" in readme and (results / "pareto.png").is_file()


@pytest.mark.e2e
def test_a_method_is_added_by_the_three_files_of_the_guide(tmp_path):
    for name in ("iapo", "recipes", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    guide = ROOT / "docs" / "adding-a-method.md"
    names = re.findall(r"^`(\S+weighted_reinforce\.\w+)`", guide.read_text(), re.MULTILINE)
    files = [code for language, code in BLOCK.findall(guide.read_text()) if language in ("python", "yaml")]
    assert len(names) == len(files) == 3
    for name, block in zip(names, files, strict=True):
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(block)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*command):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    code = [name for name in names if name.endswith(".py")]
    run("ruff", "check", *code)
    run("ruff", "format", "--check", *code)
    own, every = "tests/methods/test_weighted_reinforce.py", "tests/methods/test_every_method.py"
    passed = run("pytest", "-q", "-W", "ignore", own, every, "-k", "weighted_reinforce")
    assert re.search(r"^\d\d passed", passed, re.MULTILINE), passed
    variant = ["iapo.train", "--dry-run", "platform=cpu"]
    assert "positive: 0.2" in run(*variant, "variant=weighted_reinforce", "methods.weighted_reinforce.positive=0.2")
    assert "rho: 1.0" in run(*variant, "variant=[iapo_rate,weighted_reinforce]")
    assert "k: 3" in run(*variant, "variant=grpo", "algorithm.adv_estimator=iapo",
                         "+methods.mine._target_=iapo.methods.gfpo.Gfpo", "+methods.mine.k=3")  # fmt: skip
