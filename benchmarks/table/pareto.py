"""The picture of the table: accuracy against tokens, one curve per method over its knob, and the Pareto front."""

from pathlib import Path

MARKERS = [*"osD^v<>PX*phHd8", (4, 1, 0), (5, 1, 0), (6, 1, 0), (3, 0, 30), (3, 0, 90)]


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of the (tokens, accuracy) that no other beats: with fewer tokens at no lower accuracy, or with higher
    accuracy at no more tokens. From the fewest tokens on; equal points are all in or all out."""

    def beaten(tokens: float, accuracy: float) -> bool:
        return any(t <= tokens and a >= accuracy and (t, a) != (tokens, accuracy) for t, a in points.values())

    return sorted((name for name, point in points.items() if not beaten(*point)), key=lambda name: points[name])


def place(figures: dict) -> tuple[float, float]:
    """(tokens, accuracy in percent) of the figures of a run, or of a row, which are [mean, deviation]."""
    tokens, accuracy = (f[0] if isinstance(f := figures[key], list) else f for key in ("tokens", "pass@1"))
    return tokens, 100 * accuracy


def curve(row: dict) -> dict[str, tuple[float, float]]:
    """The place of each value of a row's knob, with the first seed, in the order of the values, by its label."""
    knob = row["label"].rpartition("=")[0]
    grid = sorted(row["grid"], key=lambda entry: entry["value"] if isinstance(entry["value"], int | float) else 0)
    return {f"{knob}={entry['value']}": place(entry["figures"]["test"]) for entry in grid}


def below(rows: dict[str, dict], floor: float) -> dict[str, tuple[float, float]]:
    """What is less accurate than `floor` and would squeeze the others' picture: rows, and single values of others."""
    found = {}
    for name, row in rows.items():
        if place(row["test"])[1] < floor:
            found[name] = place(row["test"])
        else:
            values = {f"{name} {label}, first seed": at for label, at in curve(row).items()}
            found |= {value: at for value, at in values.items() if at[1] < floor}
    return found


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
    places = {name: place(row["test"]) for name, row in rows.items()}
    floor = max(accuracy for _, accuracy in places.values()) - 10
    outside = below(rows, floor)
    on_front = [name for name in on_front if name not in outside]
    for number, (name, row) in enumerate((name, row) for name, row in rows.items() if name not in outside):
        color, marker = colors[number % len(colors)], MARKERS[number % len(MARKERS)]
        drawn = [at for at in curve(row).values() if at[1] >= floor]
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
    lines = [f"outside: {name}, {tokens:.1f} tokens, {accuracy:.1f}%" for name, (tokens, accuracy) in outside.items()]
    axes.set_xlabel("\n".join(["mean response tokens (fewer is better)", *lines]))
    axes.set_title("large: the chosen value, mean over seeds; small: each value, first seed", fontsize=9)
    axes.set_ylabel("Pass@1 on the test split [%]")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
