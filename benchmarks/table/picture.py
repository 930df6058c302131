"""The picture of a task whose generator knows what is of use: accuracy against tokens, and what each method kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table.kept import Keeping
from benchmarks.table.pareto import place
from benchmarks.table.plan import REFERENCE, UNTRAINED

# Colour and marker of a family of methods; the colours differ also for those who see no red or green.
STYLES = {
    "information": ("knows what a token tells", "#0072B2", "o"),
    "length": ("knows the length", "#E69F00", "s"),
    "control": ("control", "#999999", "^"),
    "neither": ("neither", "#555555", "D"),
}


def kept_of_start(rows: Mapping[str, Mapping[str, Any]], figure: str) -> dict[str, float]:
    """A figure's mean as a share of the untrained model's, by row; {} where that has none."""
    means = {name: row["test"][figure][0] for name, row in rows.items() if figure in row["test"]}
    start = means.get(UNTRAINED)
    return {name: mean / start for name, mean in means.items()} if start else {}


def draw(
    rows: Mapping[str, Mapping[str, Any]], front: Sequence[tuple[float, float]] | None, keeping: Keeping, path: Path
) -> None:
    """Write the picture.

    Args:
        rows: of results.json.
        front: its `oracle_front`.
        keeping: the task's.
        path: of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = {name: row for name, row in rows.items() if name != UNTRAINED}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.28 * len(trained) + 2.4), layout="constrained", width_ratios=[5, 4]
    )
    for name, row in rows.items():
        _, color, marker = STYLES[row["family"]] if name != UNTRAINED else ("before training", "black", "*")
        tokens, accuracy = place(row["test"])
        spread = [row["test"]["tokens"][1] or 0, 100 * (row["test"]["pass@1"][1] or 0)]
        left.errorbar(tokens, accuracy, spread[1], spread[0], marker, color=color, mec="white", ms=9, elinewidth=0.8)
        left.annotate(name, (tokens, accuracy), (6, 4), textcoords="offset points", fontsize=8, color=color)
    for label, color, marker in [("before training", "black", "*"), *STYLES.values()]:
        left.plot([], [], marker, color=color, ms=8, label=label)
    if front:
        left.plot([t for t, _ in front], [100 * a for _, a in front], "--", color="#009E73", lw=1.2, label="oracle")
    lowest, highest = (f(place(row["test"])[1] for row in rows.values()) for f in (min, max))
    left.set_ylim(lowest - 2, highest + 3)
    shortest, longest = (f(place(row["test"])[0] for row in rows.values()) for f in (min, max))
    left.set_xlim(shortest - 2, longest + 4)
    left.set_xlabel("mean tokens of a completion (fewer is better)")
    left.set_ylabel("right answers [%]")
    left.legend(fontsize=8, loc="lower right", frameon=False)
    left.grid(alpha=0.3)

    order = sorted(trained, key=lambda name: (list(STYLES).index(trained[name]["family"]), name != REFERENCE))[::-1]
    for offset, (name, title), shade in ((0.2, keeping.work, "#0072B2"), (-0.2, keeping.waste, "#D55E00")):
        kept = kept_of_start(rows, name)
        at = [number for number, row in enumerate(order) if row in kept]
        bars = right.barh([y + offset for y in at], [100 * kept[order[y]] for y in at], 0.38, color=shade, label=title)
        right.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    right.margins(x=0.1)  # room for the last bar's number
    right.axvline(100, color="black", lw=0.8, ls=":")
    right.set_yticks(range(len(order)), order, fontsize=8)
    for tick, name in zip(right.get_yticklabels(), order, strict=True):
        tick.set_color(STYLES[trained[name]["family"]][1])
    right.set_xlabel("left of it after training [% of before]")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
