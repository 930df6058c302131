"""The worked example of docs/adding-a-method.md, followed to the letter in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_method_is_added_by_the_three_files_of_the_guide(tmp_path):
    for name in ("iapo", "recipes", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    guide = (ROOT / "docs" / "adding-a-method.md").read_text()
    names = re.findall(r"^`(\S+weighted_reinforce\.\w+)`", guide, re.MULTILINE)
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", guide, re.DOTALL)
    assert len(names) == len(blocks) == 3
    for name, block in zip(names, blocks, strict=True):
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(block)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*command):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    own, every = "tests/methods/test_weighted_reinforce.py", "tests/methods/test_every_method.py"
    passed = run("pytest", "-q", "-W", "ignore", own, every, "-k", "weighted_reinforce")
    assert re.search(r"^\d\d passed", passed, re.MULTILINE), passed
    variant = ["iapo.train", "--dry-run", "platform=cpu"]
    assert "positive: 0.2" in run(*variant, "variant=weighted_reinforce", "methods.weighted_reinforce.positive=0.2")
    assert "rho: 1.0" in run(*variant, "variant=[iapo_rate,weighted_reinforce]")
    assert "k: 3" in run(*variant, "variant=grpo", "algorithm.adv_estimator=iapo",
                         "+methods.mine._target_=iapo.methods.gfpo.Gfpo", "+methods.mine.k=3")  # fmt: skip


def test_the_readme_shows_the_table_of_the_results():
    readme = (ROOT / "README.md").read_text()
    results = ROOT / "benchmarks" / "results"
    rows = [line for line in (results / "table.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(rows) in readme and len(rows) > 2
    assert "(benchmarks/results/pareto.png)" in readme and (results / "pareto.png").is_file()
