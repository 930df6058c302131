"""From the command line to Ray. Read the folder in this order:

1. `compose`: recipes and arguments become one resolved configuration, which is checked.
2. `checks`, `check_files`, `check_prompts`, `check_template`: what is refused, each in one line: field, value, fix.
3. `machine`, `weights`: what the machine has, and whether a run can start on it; the buffer for weights.
4. `provenance`: what a run was started with, and whether a later start may resume it.
5. `run`: Ray and verl's trainer, from the first to the last line.
6. `folder_lock`, `signals`, `shared_memory`: one run per folder, polite stops, nothing left behind.
7. `warmup`: a command of its own, verl's supervised trainer in one process.
"""
