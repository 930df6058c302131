"""What the fork server of `tests.ranks` imports before it forks ranks."""

import os

os.environ["VERL_PLATFORM"] = "cpu"  # verl reads it when it is imported

import iapo.verl_adapter.worker  # noqa: F401
import tests.conftest  # noqa: F401
