"""What of a run's configuration changes its result, and a short name for it.

A record stands for a run as long as nothing differs that changes the result. Beyond rounding, the result does not
depend on where files are, on how often something is saved or logged, on threads and processes, or on how forwards are
packed. A key at its documented default is left out too: a key that is added later, with a default that means the
behaviour of before, leaves the records valid.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache

from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf

from iapo.config import IapoConfig
from iapo.launch.provenance import WITHOUT_EFFECT, by_dotted_key, is_in

# Keys that may change a result, but not one of the table: no run of it has a critic, a teacher or a correction by
# rollout log-probs, all have the same loops, micro-batches by tokens, and rows with an index of their own.
UNUSED = (
    "critic",
    "distillation",
    "data.custom_cls",
    "data.dataloader_num_workers",
    "actor_rollout_ref.rollout.calculate_log_probs",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
)


def fingerprint(config: Mapping, settings: Mapping, places: Mapping[str, str]) -> str:
    """A hash of what changes a run's result and of how it is evaluated.

    Args:
        config: a resolved configuration.
        settings: of the evaluation.
        places: names for folders, which may be elsewhere on another machine.
    """
    text = json.dumps([changes_result(config), settings], sort_keys=True)
    for folder, name in places.items():
        text = text.replace(folder, name)
    return hashlib.sha256(text.encode()).hexdigest()


def changes_result(config: Mapping) -> dict[str, object]:
    """The keys of a resolved configuration that change a result and aren't at their documented default."""
    defaults = documented_defaults(json.dumps(sorted(_targets(config).items())))
    found = {
        key: value
        for key, value in by_dotted_key(config).items()
        if not is_in(key, WITHOUT_EFFECT + UNUSED) and not (key in defaults and defaults[key] == value)
    }
    if found.get("algorithm.adv_estimator") == "grpo":  # verl's; the same bits as ours with all weights 0
        found["algorithm.adv_estimator"] = "iapo"
    return found


def _targets(config: Mapping) -> dict[str, str]:
    return {name: section["_target_"] for name, section in (config.get("methods") or {}).items()}


@cache
def documented_defaults(targets: str) -> dict[str, object]:
    """By dotted key: verl's own configuration, `IapoConfig`, and the knobs of the methods in `targets`, JSON."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        verl = OmegaConf.to_container(compose("ppo_trainer"), resolve=True)
    ours = {"iapo": asdict(IapoConfig()), "methods": {}}
    for name, target in json.loads(targets):
        knobs = fields(get_class(target))
        ours["methods"][name] = {knob.name: knob.default for knob in knobs if knob.default is not MISSING}
    return by_dotted_key(verl) | by_dotted_key(ours)
