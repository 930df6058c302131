"""What this machine has, and whether a run can start on it."""

import os
import re
import socket
import warnings
from collections.abc import Mapping
from importlib.metadata import entry_points

import torch

from iapo.data.read import hub_problem, is_hub_id
from iapo.launch.checks import ConfigError
from iapo.verl_adapter.vllm_plugin import ENTRY_POINT

# What platform=cpu needs in the environment of every process, before verl is imported.
CPU_NEEDS = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # verl's own switch: it has no engine for "cpu" and runs the one for "cuda"
}
# What suits it there. What the user sets in the environment, or in ray_kwargs.ray_init.runtime_env.env_vars, wins.
CPU_SUITS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM puts the model into a process of its own, see platform/cpu.yaml
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else its one thread stays on one core, whoever else is there
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "20000",  # a fifteenth of the default: a thread that waits soon leaves its core to others
    "TOKENIZERS_PARALLELISM": "false",
    "TQ_NUM_THREADS": "1",
}
# A frame of HTTP/2: three bytes of length, type 4, no flags, stream 0.
EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# Set unless the user chooses OMP_NUM_THREADS: a worker trains on its share of all cores, see `verl_adapter.cpu`.
ALL_CORES = "IAPO_ALL_CORES"


def cpu_environment(users: Mapping[str, str]) -> dict[str, str]:
    """The environment of every process with platform=cpu, given what the user set.

    Raises:
        ConfigError: the user set another value than platform=cpu needs.
    """
    for name, value in CPU_NEEDS.items():
        if users.get(name, value) != value:
            raise ConfigError(f"{name}: {users[name]!r}, but platform=cpu needs {value!r}; unset the variable.")
    suits = CPU_SUITS | {ALL_CORES: "0" if "OMP_NUM_THREADS" in users else "1"}
    return CPU_NEEDS | {name: users.get(name, value) for name, value in suits.items()}


def choose_platform(overrides: list[str]) -> str:
    """The last platform=... of the command line, else what the machine has."""
    for override in reversed(overrides):
        if override.startswith("platform="):
            return override.removeprefix("platform=")
    return "gpu" if gpu_count() else "cpu"


def gpu_count() -> int:
    return torch.cuda.device_count()


def check_machine(config) -> None:
    """Refuse a run that can't start here: verl hid that it didn't load our plugin, or GPUs or Ray are missing.

    Raises:
        ConfigError: what is missing, and the fix.
    """
    from verl.plugin.platform import PlatformRegistry
    from verl.utils.device import auto_set_device

    known = os.environ.get("RAY_ADDRESS") or config.ray_kwargs.ray_init.get("address")
    if config.trainer.nnodes > 1 and not known:
        raise ConfigError(
            f"trainer.nnodes: {config.trainer.nnodes}, but RAY_ADDRESS names no Ray cluster; start one on the nodes, "
            "as scripts/slurm/iapo.sbatch does, and set RAY_ADDRESS=auto, or use trainer.nnodes=1."
        )
    if config.trainer.device == "cpu":
        if PlatformRegistry.get("cpu") is None:
            raise ConfigError(
                "platform: 'cpu', but verl didn't load this package's plugin (entry point verl.plugins); install the "
                "package with pip install -e '.[cpu]' and leave VERL_USE_EXTERNAL_PLUGINS unset."
            )
    else:
        most = gpu_count() if config.trainer.nnodes == 1 else 1024
        if gpu_count() == 0 and config.trainer.nnodes == 1:
            raise ConfigError("platform: 'gpu', but this machine has no usable GPU; use platform=cpu model=tiny.")
        if not 1 <= config.trainer.n_gpus_per_node <= most:
            raise ConfigError(
                f"trainer.n_gpus_per_node: {config.trainer.n_gpus_per_node}, but this machine has {gpu_count()} usable "
                f"GPU(s); set it to between 1 and {most}, or use platform=cpu model=tiny."
            )
    check_vllm_plugin()
    check_ray_answers(os.environ.get("RAY_ADDRESS", ""))
    auto_set_device(config)


def check_vllm_plugin() -> None:
    """Refuse a run in which vLLM wouldn't load our plugin; its trainer would wait for ever to send its weights."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        raise ConfigError(
            f"VLLM_PLUGINS: '{allowed}' lacks '{ENTRY_POINT}', which iapo needs; add it, or unset the variable."
        )
    plugins = list(entry_points(group="vllm.general_plugins", name=ENTRY_POINT))
    try:
        plugins[0].load()  # vLLM hides what goes wrong here
    except (IndexError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"iapo: its vLLM plugin isn't installed ({error!r}); install the package as it is now: pip install -e ."
        ) from None


def check_ray_answers(address: str) -> None:
    """Refuse host:port if nothing answers there, or something else than Ray; Ray itself would try for minutes."""
    if not (match := re.fullmatch(r"([\w.-]+):(\d+)", address)):
        return  # none, or "auto", "local", ray://...
    fix = "start Ray there, or unset the variable."
    try:
        connection = socket.create_connection((match[1], int(match[2])), timeout=5)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"RAY_ADDRESS: nothing answers at {address} ({error}); {fix}") from None
    with connection:
        encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # nothing to read without a handshake
        if not encrypted and not speaks_http2(connection):
            raise ConfigError(f"RAY_ADDRESS: {address} is no head of a Ray cluster, but another server; {fix}")


def check_hub(path: str) -> None:
    """Refuse a model of the hub that can't be asked for; transformers would try for a minute and print every try.

    If the hub doesn't answer but its cache here has the model, this process and those that it starts read the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or os.path.isdir(path) or not is_hub_id(path):
        return
    if (reason := hub_problem(constants.ENDPOINT)) is None:
        return
    if not isinstance(try_to_load_from_cache(path, "config.json"), str):  # else a marker, or None
        raise ConfigError(
            f"actor_rollout_ref.model.path: {path} is no folder here, and the hub can't be asked for it ({reason}); "
            "give a folder with a Hugging Face model (model=/a/folder), or check the network."
        )
    warnings.warn(f"HF_HUB_OFFLINE=1 is set, because {reason}; {path} is read from the hub's cache.", stacklevel=2)
    constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"


def speaks_http2(connection: socket.socket, timeout_s: float = 10) -> bool:
    """Whether a server's first frame is that of HTTP/2, its settings (RFC 9113, 3.4); Ray's head is a gRPC server."""
    connection.settimeout(timeout_s)
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EMPTY_SETTINGS)
        return connection.recv(9)[3:4] == EMPTY_SETTINGS[3:4]
    except OSError:
        return False
