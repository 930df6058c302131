"""How much one row differs from another on the same problems and seeds, with bootstrap intervals.

Shapes: S seeds, P problems, N counts, R resamples. The counts are those of `benchmarks.table.kept.counts`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.table.kept import KEEPING, RATIO

Counts = Mapping[str, Sequence[float]]
# Each figure as a ratio of two counts. Those of a task have no counts in another.
RATIOS = {"pass@1": ("right", "samples"), "tokens": ("tokens", "samples")}
RATIOS |= {name: pair for keeping in KEEPING.values() for name, pair in keeping.figures.items()}


def differences(
    row: Sequence[Counts], reference: Sequence[Counts], resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float, float]]:
    """(difference, low, high) of each figure: the mean over seeds of the row's minus the reference's.

    Problems and seeds are drawn with replacement, the same for both, so what a problem or a seed adds to both cancels.
    With few seeds the intervals are too narrow for what another seed would give. A figure that is undefined in a
    resample, such as a share of no addition, is left out.

    Args:
        row: the counts of each seed.
        reference: those of the same seeds, of the same problems.

    Raises:
        ValueError: other numbers of seeds, problems or counts.
    """
    ours_SPN, theirs_SPN = as_array(row), as_array(reference)
    if ours_SPN.shape != theirs_SPN.shape:
        raise ValueError(f"reference: {theirs_SPN.shape} seeds, problems and counts, not {ours_SPN.shape}.")
    S, P, _ = ours_SPN.shape
    rng, tail = np.random.default_rng(seed), (1 - level) / 2
    # How often each problem and seed is drawn. First no resample, but all of them once.
    times_RP = np.vstack([np.ones(P), rng.multinomial(P, np.full(P, 1 / P), size=resamples)])
    times_RS = np.vstack([np.ones(S), rng.multinomial(S, np.full(S, 1 / S), size=resamples)])
    ours, theirs = (
        figures(dict(zip(row[0], np.einsum("rp,spn->nrs", times_RP, counts_SPN), strict=True)))
        for counts_SPN in (ours_SPN, theirs_SPN)
    )
    found = {}
    for name, figure_RS in ours.items():
        with np.errstate(invalid="ignore"):
            mean_R = ((figure_RS - theirs[name]) * times_RS).sum(1) / S
        if np.isfinite(mean_R).all():
            low, high = np.quantile(mean_R[1:], [tail, 1 - tail])
            found[name] = (float(mean_R[0]), float(low), float(high))
    return found


def as_array(side: Sequence[Counts]) -> np.ndarray:
    """(S, P, N), the counts in the order of the first seed's."""
    return np.array([[counts[name] for name in side[0]] for counts in side]).swapaxes(1, 2)


def figures(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The figures of `RATIOS` that counts give, and `RATIO`; not finite where nothing is counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {name: counts[a] / counts[b] for name, (a, b) in RATIOS.items() if a in counts}
        for needed, unneeded in (keeping.ratio for keeping in KEEPING.values()):
            if needed in found:
                found[RATIO] = found[needed] / found[unneeded]
    return found
