"""When verl's forward for old log-probs can be left out. No verl import."""

from omegaconf import DictConfig, OmegaConf

from iapo.config import IapoConfig
from iapo.methods import make_methods


def needs_old_log_probs(config: DictConfig) -> bool:
    """Whether a forward for old log-probs says more than the update's own forward of the same policy.

    It doesn't where a batch makes one update, so that the old policy is the one that is updated and all ratios are 1,
    and where nothing else reads its log-probs, entropies, keys or values: no term, no method, no probe, no penalty in
    the reward, no comparison with the rollout's log-probs.
    """
    iapo = IapoConfig.from_mapping(OmegaConf.to_container(config.iapo, resolve=True))
    methods = make_methods(OmegaConf.to_container(config.methods, resolve=True))
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    several_updates = actor.ppo_epochs > 1 or actor.ppo_mini_batch_size < config.data.train_batch_size
    return (
        several_updates
        or iapo.beta > 0
        or iapo.needs_exit_entropy
        or iapo.needs_next_token_entropy
        or any("entropy" in method.needs for method in methods.values())
        or algorithm.use_kl_in_reward
        or config.actor_rollout_ref.rollout.calculate_log_probs
        or bool(OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"))
    )
