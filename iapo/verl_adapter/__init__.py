"""Everything that touches verl 0.9.1. No file of verl is copied or changed. Read the folder in this order:

1. `runner`: the Ray task that verl's `run_ppo` starts; it registers what follows.
2. `trainer`: verl's synchronous trainer, with a stage of ours between its own.
3. `replay_buffer`, `rows`: every sampled batch is checked and ordered; what TransferQueue holds of it.
4. `old_log_probs`: when verl's stage of old log-probs can be left out. `estimator`: carries
   `iapo.step.step_advantage`, which is pure, to verl's registry of estimators.
5. `worker`: the remote methods of the actor's processes.
6. `engine`: the exit-entropy pass on the FSDP shards, within verl's forwards or by its own.
7. `reward_manager`: verl's, with lengths, and with errors handed to the trainer.
8. `dataset`, `agent_loop`, `group_rollouts`: an index per row, a seed per completion, few remote calls per prompt.
9. `vllm_plugin`: what vLLM's processes need.
10. `cpu`, `cpu_platform`, `cpu_workarounds`, `packed_attention`: what platform=cpu needs; inert without it.

docs/architecture.md follows one training step through them.
"""

# The name under which `engine` registers with verl, which looks for it in VERL_ENGINE_VENDOR.
ENGINE_VENDOR = "iapo"
