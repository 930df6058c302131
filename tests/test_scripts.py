"""The launch scripts, the Slurm script with stand-ins for Slurm and Ray, the image's and the citation's files."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import iapo

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "scripts/slurm/iapo.sbatch"
pytestmark = pytest.mark.e2e

SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), SBATCH]
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl isn't installed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text() or "exec bash " in script.read_text()
    if linter := shutil.which("shellcheck"):
        subprocess.run([linter, "--severity=warning", script], check=True)


def launch(variant, *arguments, cwd, **environment):
    """run_<variant>_qwen0.5b.sh without GPUs and without a network."""
    environment = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        ["bash", ROOT / f"scripts/run_{variant}_qwen0.5b.sh", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def resolved(result):
    """The configuration that a dry run printed."""
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


@needs_verl
def test_run_without_gpus_is_refused_in_one_line(tmp_path):
    result = launch("iapo", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("iapo.train: platform: 'gpu', but this machine has no usable GPU; use platform=")


def test_run_without_the_packages_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    python = stand_in(tmp_path / "empty", "python", "exit 1")
    result = launch("grpo", cwd=tmp_path, PYTHON="empty/python")
    assert result.returncode == 2
    assert result.stderr == (
        f"_run.sh: PYTHON: '{python}' has no package iapo; run bash scripts/setup.sh gpu, or set PYTHON\n"
    )
    result = launch("grpo", cwd=tmp_path, PYTHON="no/such/python")
    assert result.returncode == 2 and "no/such/python' is no program" in result.stderr


@needs_verl
def test_dry_run_of_dapo_from_another_folder(tmp_path):
    result = launch("dapo", "--dry-run", cwd=tmp_path)
    config = resolved(result)
    assert config["actor_rollout_ref"]["actor"]["clip_ratio_high"] == 0.28
    assert config["algorithm"]["filter_groups"]["enable"] is True
    assert config["actor_rollout_ref"]["model"]["path"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config["data"]["train_files"] == f"{ROOT}/data/gsm8k/train.parquet"
    assert config["trainer"]["device"] == "cuda"
    assert config["run_dir"] == f"{ROOT}/runs/dapo-qwen2.5-0.5b-instruct-gsm8k"


def arguments_of(result):
    """What a launch script would give to iapo.train."""
    assert result.returncode == 0, result.stderr
    unbuffered, module, name, *arguments = result.stdout.splitlines()
    assert [unbuffered, module, name] == ["-u", "-m", "iapo.train"]
    return arguments


@needs_verl
def test_overrides_win_and_a_relative_data_folder_is_the_callers(tmp_path, monkeypatch):
    from iapo.launch.compose import resolve

    shows = f"""[ "$1" = -c ] || {{ printf '%s\\n' "$@"; echo "$IAPO_DATA_DIR" >{tmp_path}/folder; }}"""
    python = str(stand_in(tmp_path, "python", shows))
    overrides = ["iapo.alpha=0.05", "data=math500"]
    result = launch("iapo", *overrides, cwd=tmp_path, IAPO_DATA_DIR="my data", PYTHON=python)
    folder = (tmp_path / "folder").read_text().strip()
    assert folder == f"{tmp_path}/my data"
    monkeypatch.setenv("IAPO_DATA_DIR", folder)
    config = resolve(arguments_of(result))
    assert config.algorithm.adv_estimator == "iapo"
    assert config.iapo.alpha == 0.05 and config.iapo.beta == 0.01
    assert config.data.train_files == f"{tmp_path}/my data/math500/train.parquet"


def stand_in(folder, name, body):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def stays(name):
    """A command that stays until it is told to stop, and says so."""
    return f"""trap 'echo "{name} stopped" >>"$LOG"; kill $!; exit 143' TERM; sleep 60 >/dev/null 2>&1 & wait"""


def quickstart(tmp_path, *arguments, training):
    """Start quickstart.sh in a folder whose set-up is done and whose Python is a stand-in."""
    for name in ("scripts", "recipes/variant", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes/variant/iapo_rate.yaml").touch()
    shutil.copy(ROOT / "scripts/quickstart.sh", tmp_path / "scripts")
    stand_in(tmp_path / "scripts", "setup.sh", "exit 0")
    stand_in(tmp_path / ".venv/bin", "python", f"case $* in *iapo.train*) {training} ;; *) echo table ;; esac")
    return subprocess.Popen(
        ["bash", tmp_path / "scripts/quickstart.sh", *arguments],
        env=os.environ | {"IAPO_PLATFORM": "cpu", "LOG": str(tmp_path / "log")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_quickstart_shows_progress_and_the_table(tmp_path):
    script = quickstart(tmp_path, training="echo '(TaskRunner pid=7) iapo: step 1/2'; echo noise")
    output, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    assert output.splitlines()[1:3] == ["iapo: step 1/2", "table"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_quickstart_says_how_to_resume_after_a_stop(tmp_path, number):
    script = quickstart(tmp_path, "iapo.probe='a b'", training=f'touch "$LOG"; {stays("train")}')
    wait_for(lambda: (tmp_path / "log").is_file())
    script.send_signal(number)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 128 + number
    assert calls(tmp_path) == ["train stopped"]
    (folder,) = (tmp_path / "runs").iterdir()
    (line,) = errors.splitlines()
    assert line.startswith("quickstart: stopped; this resumes from the last checkpoint, if there is one: ")
    command = shlex.split(line.partition("there is one: ")[2])
    assert command[-2:] == [f"run_dir=runs/{folder.name}", "iapo.probe='a b'"] and "iapo.train" in command


def test_quickstart_leaves_no_folder_of_a_refused_configuration(tmp_path):
    script = quickstart(tmp_path, training="echo 'iapo.train: iapo.rho: refused'; exit 2")
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 2 and errors == "iapo.train: iapo.rho: refused\n"
    assert not list((tmp_path / "runs").iterdir())


def slurm(tmp_path, *arguments, nodes=3, training="exit 0", ray=None, up=None, **environment):
    """Start the Slurm script with stand-ins that write each call into tmp_path/log.

    The cluster says that `up` nodes joined; by default as many as Ray was started on.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    hostnames = " ".join(f"node{i}" for i in range(1, nodes + 1))
    stand_in(folder, "ray", f'echo "ray $*" >>"$LOG"\n{ray or stays("ray")}')
    stand_in(
        folder,
        "srun",
        r"""for argument; do [[ $argument != --nodelist=* ]] || echo "srun ${argument#--nodelist=}" >>"$LOG"; done
while [[ $1 == --* ]]; do shift; done
exec "$@" """,
    )
    stand_in(
        folder,
        "scontrol",
        f"""if [ "$1" = show ]; then printf '%s\\n' {hostnames}; else echo "scontrol $*" >>"$LOG"; fi""",
    )
    up = up or """$(grep -c '^ray start' "$LOG")"""
    stand_in(
        folder,
        "python",
        f"""case $* in
    *get_node_ip_address*) echo 10.0.0.1 ;;
    *ray.nodes*) echo "nodes={up}" ;;
    *iapo.train*) echo "train $RAY_ADDRESS $*" >>"$LOG"; {training} ;;
esac""",
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_"))}
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": f"node[1-{nodes}]", "SLURM_GPUS_ON_NODE": "8"}
    tools = {"PYTHON": str(folder / "python"), "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    (tmp_path / "log").touch()
    return subprocess.Popen(
        ["bash", SBATCH, *arguments],
        cwd=ROOT,
        env=inherited | job | tools | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def calls(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slurm_starts_the_head_then_workers_then_training(tmp_path):
    job = slurm(tmp_path, "variant=iapo", "data=gsm8k", "run_dir=/a b", training="exit 7")
    output, _ = job.communicate(timeout=60)
    log = calls(tmp_path)
    assert job.returncode == 7, output
    # The head is up before the workers, which may start in any order.
    assert log[0] == "srun node1" and log[1].startswith("ray start --block --head")
    assert {line for line in log[2:] if line.startswith("srun")} == {"srun node2", "srun node3"}
    head, *workers = [line for line in log if line.startswith("ray start")]
    assert "--head --node-ip-address=10.0.0.1 --port=22345" in head and "--temp-dir=/tmp/ray-12345" in head
    assert workers == ["ray start --block --address=10.0.0.1:22345"] * 2
    training = (
        "train 10.0.0.1:22345 -u -m iapo.train platform=gpu trainer.nnodes=3 trainer.n_gpus_per_node=8 "
        "variant=iapo data=gsm8k run_dir=/a b"
    )
    # Ray ends after the training, on every node, and nothing is requeued.
    assert log[log.index(training) :] == [training, *["ray stopped"] * 3]
    assert "iapo.sbatch: Ray runs on 3 nodes" in output


def test_slurm_on_cpus_gives_ray_logical_gpus(tmp_path):
    job = slurm(tmp_path, "platform=cpu", "trainer.n_gpus_per_node=2", nodes=1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    (ray,) = [line for line in calls(tmp_path) if line.startswith("ray start")]
    assert ray.endswith("--num-cpus=8 --num-gpus=2")


def test_slurm_requeues_after_everything_has_stopped(tmp_path):
    job = slurm(tmp_path, nodes=2, training=stays("train"))
    wait_for(lambda: any(line.startswith("train") for line in calls(tmp_path)))
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert calls(tmp_path)[-4:] == ["train stopped", "ray stopped", "ray stopped", "scontrol requeue 12345"]


def test_slurm_cancelled_stops_without_requeue(tmp_path):
    job = slurm(tmp_path, nodes=2, training=stays("train"))
    wait_for(lambda: any(line.startswith("train") for line in calls(tmp_path)))
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 143, output
    assert calls(tmp_path)[-3:] == ["train stopped", "ray stopped", "ray stopped"]


def test_slurm_ends_when_a_node_is_lost(tmp_path):
    lost = """while ! grep -q '^train' "$LOG"; do sleep 0.05; done; exit 3"""
    job = slurm(tmp_path, nodes=1, ray=lost, training=stays("train"))
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "iapo.sbatch: Ray: a node's step ended with status 3 during the run" in output
    assert calls(tmp_path)[-1] == "train stopped"


def test_slurm_gives_up_on_missing_nodes(tmp_path):
    job = slurm(tmp_path, nodes=2, up=1, IAPO_NODES_TIMEOUT="1")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert re.search(r"^iapo\.sbatch: Ray: 1 of 2 nodes after \d+ s \(nodes=1\)", output, re.MULTILINE)
    assert not any(line.startswith("train") for line in calls(tmp_path))


def test_slurm_refuses_to_run_elsewhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(["bash", SBATCH], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "SLURM_JOB_ID: unset" in result.stderr
    environment["SLURM_JOB_ID"] = "1"
    result = subprocess.run(["bash", SBATCH], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and f"working directory: {tmp_path} is not the repository" in result.stderr


def test_image_gets_the_files_that_it_uses():
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    used = re.findall(r"scripts/\S+\.sh", dockerfile)
    assert set(used) == {"scripts/setup.sh", "scripts/run_iapo_qwen0.5b.sh"}
    for name in [*used, "pyproject.toml", "README.md", "LICENSE", "iapo", "recipes"]:
        assert (ROOT / name).exists() and name.split("/")[0] not in ignored
    assert {".git", ".venv", "data", "runs"} <= set(ignored)


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == iapo.__version__ and citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2602.19049"
