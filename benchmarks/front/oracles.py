"""The oracle of each task whose generator knows what is of use."""

from types import ModuleType

from benchmarks.front import checked_registers, worked_sums

# Each has `task`, the module of its task with `kept`; `right_rates` of what is kept; `ways` of answering a problem at
# such rates, and EVERY_FORM that has one; COLUMNS and `columns`, RATES and `rate_rows` for the tables of
# `python -m benchmarks.front`.
ORACLES: dict[str, ModuleType] = {"worked_sums": worked_sums, "checked_registers": checked_registers}
