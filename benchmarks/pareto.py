"""The picture of the table: accuracy against tokens, one curve per method over its knob, and the Pareto front."""

from pathlib import Path

MARKERS = [*"osD^v<>PX*phHd8", (4, 1, 0), (5, 1, 0), (6, 1, 0), (3, 0, 30), (3, 0, 90)]


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the (tokens, accuracy) that no other beats: with fewer tokens at no lower accuracy, or with higher
    accuracy at no more tokens. From the fewest tokens on; equal points are all in or all out."""

    def beaten(tokens: float, accuracy: float) -> bool:
        return any(t <= tokens and a >= accuracy and (t, a) != (tokens, accuracy) for t, a in points.values())

    return sorted((name for name, point in points.items() if not beaten(*point)), key=lambda name: points[name])


def far_below(points: dict[str, tuple[float, float]], span: float) -> list[str]:
    """The names of the (tokens, accuracy) more than `span` below the best, which would squeeze the others' picture."""
    best = max(accuracy for _, accuracy in points.values())
    return [name for name, (_, accuracy) in points.items() if accuracy < best - span]


def curve(row: dict) -> dict[object, tuple[float, float]]:
    """(tokens, accuracy in percent) of each value of a row's knob, with the first seed, in the order of the values."""
    grid = sorted(row["grid"], key=lambda entry: entry["value"] if isinstance(entry["value"], int | float) else 0)
    tested = {entry["value"]: entry["figures"]["test"] for entry in grid}
    return {value: (figures["tokens"], 100 * figures["pass@1"]) for value, figures in tested.items()}


def draw(rows: dict[str, dict], on_front: list[str], path: Path) -> None:
    """Write the picture.

    Args:
        rows: of results.json. The large marker is the mean over seeds with the chosen value of the knob, with its
            standard deviation; the thin line joins the values of the knob with the first seed.
        on_front: names of the rows on the Pareto front.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    tab, dark = plt.get_cmap("tab10").colors, plt.get_cmap("Dark2").colors
    colors = [*tab, *dark[:-1], "navy", "maroon", "black"]  # both have nearly the same grey
    places = {name: (row["test"]["tokens"][0], 100 * row["test"]["pass@1"][0]) for name, row in rows.items()}
    far_rows = far_below(places, span=10)  # with all their values
    curves = {name: curve(row) for name, row in rows.items() if name not in far_rows}
    places |= {f"{name} with {value}": place for name, tried in curves.items() for value, place in tried.items()}
    outside = far_below(places, span=10)
    on_front = [name for name in on_front if name not in outside]
    for number, (name, row) in enumerate((name, row) for name, row in rows.items() if name not in outside):
        color, marker = colors[number % len(colors)], MARKERS[number % len(MARKERS)]
        drawn = [place for value, place in curves[name].items() if f"{name} with {value}" not in outside]
        axes.plot(
            [x for x, _ in drawn], [y for _, y in drawn], "-", marker=marker, ms=3.5, lw=1, alpha=0.55, color=color
        )
        spread = [row["test"]["tokens"][1] or 0, 100 * (row["test"]["pass@1"][1] or 0)]
        axes.errorbar(
            *places[name],
            xerr=spread[0],
            yerr=spread[1],
            marker=marker,
            ls="none",
            ms=9,
            mec="black" if name in on_front else "white",
            mew=1.2 if name in on_front else 0.6,
            elinewidth=0.8,
            color=color,
            label=f"{name} {row['label']}".strip(),
            zorder=3,
        )
    steps = [places[name] for name in on_front]
    axes.step(
        [tokens for tokens, _ in steps],
        [accuracy for _, accuracy in steps],
        where="post",
        ls="--",
        lw=1,
        color="black",
        label="Pareto front",
        zorder=1,
    )
    for number, name in enumerate(on_front):  # on one side and the other, as neighbours may be close
        offset, side = ((-8, 6), "right") if number % 2 else ((8, -11), "left")
        axes.annotate(name, places[name], xytext=offset, textcoords="offset points", ha=side, fontsize=9, zorder=4)
    lines = ["outside: {}, {:.1f} tokens, {:.1f}%".format(name, *places[name]) for name in outside]
    axes.set_xlabel("\n".join(["mean response tokens (fewer is better)", *lines]))
    axes.set_title("large: the chosen value, mean over seeds; small: each value, first seed", fontsize=9)
    axes.set_ylabel("Pass@1 on the test split [%]")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
