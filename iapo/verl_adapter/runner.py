"""The Ray task that runs the trainer: verl's own, after this package's trainer and estimator are registered."""

from verl.trainer.main_ppo import TaskRunnerV1


class IapoTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    def run(self, config):
        import iapo.verl_adapter.estimator
        import iapo.verl_adapter.trainer  # noqa: F401

        super().run(config)
