"""What the results of a full run say to a claim: the figures in words, and a verdict.

Results are the JSON that `lab.keep` writes for a notebook, with the seeds as the first axis of every array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

HOLDS, WEAKER, FAILS = "holds", "holds weaker", "does not hold here"


class Found(NamedTuple):
    """What a full run says to a claim."""

    text: str
    """The figures, in words."""
    verdict: str


def spread(values: Any, form: str = ".1f") -> str:
    """Mean and standard deviation over the seeds, as `lab.over_seeds`."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form.lstrip('+')}}"


def effect(gain: Any, text: str, reported: float | None = None) -> Found:
    """A claim that something is better or worse, `gain` being so many points of it for each seed.

    It holds if the mean exceeds two standard deviations of the seeds and half of what the source reports, if it gives a
    figure; weaker, if it exceeds one standard deviation and a quarter of that.
    """
    mean, deviation = np.mean(gain), np.std(gain)
    if mean > 2 * deviation and mean > (reported or 0) / 2:
        return Found(text, HOLDS)
    return Found(text, WEAKER if mean > deviation and mean > (reported or 0) / 4 else FAILS)


def no_effect(difference: Any, text: str, within: float = 0.5) -> Found:
    """A claim that nothing changes, `difference` being the points for each seed.

    It holds if the mean is at most two standard deviations and `within` points; weaker, if it is at most one standard
    deviation, or so many points.
    """
    mean, deviation = abs(np.mean(difference)), np.std(difference)
    if mean <= min(2 * deviation, within):
        return Found(text, HOLDS)
    return Found(text, WEAKER if mean <= max(deviation, within) else FAILS)


def change(old: Any, new: Any, unit: str = "% error", form: str = ".1f") -> str:
    """Two figures, and their difference over the seeds."""
    difference = np.subtract(new, old)
    return f"{spread(old, form)} → {spread(new, form)} {unit} ({spread(difference, '+' + form)})"


# Notebook 1: [network][statistics or mode], the seeds first.
CONVOLUTIONS = "three convolutions"


def erratic(found: dict[str, Any]) -> Found:
    running, batch = (np.array(found["change"][CONVOLUTIONS][kind]) for kind in ("running", "batch"))
    text = (
        f"From epoch to epoch, in the second half of training, validation changes by {spread(running)} points with the "
        f"running average and by {spread(batch)} with batch statistics, for the same weights"
    )
    return effect(running - batch, text)


def tested(network: str, worse: str) -> Callable[[dict[str, Any]], Found]:
    def answer(found: dict[str, Any]) -> Found:
        old, new = (np.array(found["test"][network][mode]) for mode in (worse, "population"))
        return effect(new - old, f"{network}, {change(old, new, '% accuracy')}")

    return answer


# Notebook 2: ["test"][training][statistics at the test][dataset], the seeds first.
def cell(found: dict[str, Any], training: str, statistics: str) -> np.ndarray:
    """Percent by seed, the mean of both datasets."""
    return np.mean([*found["test"][training][statistics].values()], 0)


Cell = tuple[str, str]
_STATISTICS = {"running": "running average", "shared": "population of both", "domain": "population of each"}


def between(old: Cell, new: Cell, values: Any) -> str:
    """Both cells by name, and what changes."""
    names = " → ".join(f"{training}, {_STATISTICS[statistics]}" for training, statistics in (old, new))
    return f"Mean of SVHN and MNIST, {names}: {change(*values, '% accuracy')}"


def from_to(old: Cell, new: Cell, reported: float | None = None) -> Callable[[dict[str, Any]], Found]:
    """That the second cell is the better one."""

    def answer(found: dict[str, Any]) -> Found:
        values = cell(found, *old), cell(found, *new)
        return effect(values[1] - values[0], between(old, new, values), reported)

    return answer


def as_good(one: Cell, other: Cell) -> Callable[[dict[str, Any]], Found]:
    """That the second cell is no worse than the first."""

    def answer(found: dict[str, Any]) -> Found:
        values = cell(found, *one), cell(found, *other)
        loss = values[0] - values[1]
        return no_effect(loss if np.mean(loss) > 0 else 0.0, between(one, other, values))

    return answer


def same_cell(one: Cell, other: Cell) -> Callable[[dict[str, Any]], Found]:
    def answer(found: dict[str, Any]) -> Found:
        values = cell(found, *one), cell(found, *other)
        return no_effect(values[1] - values[0], between(one, other, values))

    return answer


def unequal_seeds(found: dict[str, Any]) -> Found:
    """Whether seeds differ more with one average: a ratio of ranges has no spread; twice as much holds."""
    one, mixed = (np.ptp(cell(found, variant, "running")) for variant in ("turn-shared", "mixed-shared"))
    text = f"From the top to the worst seed: {mixed:.1f} points with mixed batches, {one:.1f} with batches in turn"
    return Found(text, HOLDS if one > 2 * mixed else WEAKER if one > mixed else FAILS)


# Notebook 3: ["errors"]["groups / normalization / statistics"], the seeds first, then the sizes.
def in_groups(found: dict[str, Any], kind: str, size: int) -> list[np.ndarray]:
    """The errors with batch normalization and with batch renormalization, by seed."""
    norms = ("batch normalization", "batch renormalization")
    errors = (found["errors"][f"{kind} / {norm} / running"] for norm in norms)
    return [np.array(values)[:, found["sizes"][kind].index(size)] for values in errors]


def won_back(kind: str, size: int, share: float) -> Callable[[dict[str, Any]], Found]:
    """That renormalization wins back a share of what batch normalization loses in groups."""

    def answer(found: dict[str, Any]) -> Found:
        old, new = in_groups(found, kind, size)
        whole = np.array(found["whole_batch"])
        text = (
            f"ResNet-20, {kind}, {size} images each: {change(old, new)}; {spread(whole)} % without groups, so that "
            f"{spread(old - whole)} points could be won back"
        )
        return effect(old - new, text, share * np.mean(old - whole))

    return answer


def nothing_lost(found: dict[str, Any]) -> Found:
    kind = "random groups"
    size = max(found["sizes"][kind])
    old, new = in_groups(found, kind, size)
    return no_effect(new - old, f"ResNet-20, {kind}, {size} images each: {change(old, new)}")


def dense(kind: str, size: int) -> Callable[[dict[str, Any]], Found]:
    """That renormalization is better in the dense network, batches being small for the gradient, too."""

    def answer(found: dict[str, Any]) -> Found:
        norms = ("batch normalization", "batch renormalization")
        old, new = (np.array(found["dense_errors"][f"{kind} / {size} / {norm}"]) for norm in norms)
        return effect(old - new, f"Dense network on MNIST, batches of {size}: {change(old, new)}")

    return answer


# Notebook 4: errors [seed][column] by the groups of training.
def column(found: dict[str, Any], groups: int, name: str) -> np.ndarray:
    return np.array(found["errors"][str(groups)])[:, found["columns"].index(name)]


def costs(groups: int, name: str, reported: float) -> Callable[[dict[str, Any]], Found]:
    """That statistics cost points against the whole sample as one batch."""

    def answer(found: dict[str, Any]) -> Found:
        whole, values = column(found, groups, "all"), column(found, groups, name)
        return effect(values - whole, f"Trained in groups of {groups}: {change(whole, values)}", reported)

    return answer


def same_column(groups: int, one: str, other: str) -> Callable[[dict[str, Any]], Found]:
    def answer(found: dict[str, Any]) -> Found:
        values = column(found, groups, one), column(found, groups, other)
        return no_effect(values[1] - values[0], f"Trained in groups of {groups}: {change(*values)}")

    return answer


def precise_is_better(part: str, position: int, when: str) -> Callable[[dict[str, Any]], Found]:
    """That precise statistics are better than the running average at a point of the training."""

    def answer(found: dict[str, Any]) -> Found:
        names, values = found[part]["statistics"], np.array(found[part]["errors"])[:, position]
        old, new = values[:, names.index("0.9")], values[:, names.index("precise")]
        epochs = f" after {found[part]['epochs'][position]:.2g} epochs" if "epochs" in found[part] else ""
        return effect(old - new, f"{when}{epochs}, momentum 0.9: {change(old, new)}")

    return answer


def thousand_images(found: dict[str, Any]) -> Found:
    images, errors = found["number_of_images"]["images"], np.array(found["number_of_images"]["errors"])
    values = errors[:, images.index(1000)], errors[:, -1]
    return no_effect(values[1] - values[0], f"1 000 → {images[-1]:,} images: {change(*values)}".replace(",", " ", 1))


def augmented(found: dict[str, Any]) -> Found:
    old, new = (np.array(found["trained_on_augmented"][kind]) for kind in ("plain", "augmented"))
    return effect(old - new, f"Plain → augmented: {change(old, new)}", reported=0.4)


def variance(found: dict[str, Any]) -> Found:
    ratios = 100 * np.array(found["variance_ratios"]["32"])[:, found["columns"].index("2"), -1]
    return effect(100 - ratios, f"The variance of the last layer is {spread(ratios)} % of the exact one")


# Notebook 5: ["error"][statistics], the seeds first, then the conditions.
def corrupted(name: str, reported: float) -> Callable[[dict[str, Any]], Found]:
    """That 1 000 new images mend a corruption, in the mean of all severities."""

    def answer(found: dict[str, Any]) -> Found:
        rows = [number for number, (kind, _) in enumerate(found["conditions"]) if kind == name]
        old, new = (np.array(found["error"][kind])[:, rows].mean(1) for kind in ("training", "1000"))
        return effect(
            old - new,
            f"{name.upper() if name == 'jpeg' else name.capitalize()}, mean of five severities: {change(old, new)}",
            reported,
        )

    return answer


# Notebook 6: ["differences"][measure]["end - start"][hospital], mean and interval over patients and seeds.
def own_statistics(measure: str, sign: int) -> Callable[[dict[str, Any]], Found]:
    """That a hospital's own statistics are better there: at more hospitals than they are worse, and at most of them."""

    def answer(found: dict[str, Any]) -> Found:
        by_hospital = found["differences"][measure]["by hospital, own - by hospital, pooled"]
        better = sum(sign * low > 0 and sign * high > 0 for _, low, high in by_hospital.values())
        worse = sum(sign * low < 0 and sign * high < 0 for _, low, high in by_hospital.values())
        means = ", ".join(
            f"{name} {mean:+.2f} ({low:+.2f} to {high:+.2f})" for name, (mean, low, high) in by_hospital.items()
        )
        verdict = HOLDS if better > len(by_hospital) / 2 else WEAKER if better > worse else FAILS
        return Found(f"{measure}: {means}; better beyond its interval at {better} hospitals, worse at {worse}", verdict)

    return answer


# Notebook 7: harm [seed][case]; hits and false alarms by seed.
def harm(case: str) -> Callable[[dict[str, Any]], Found]:
    def answer(found: dict[str, Any]) -> Found:
        lost = np.array(found["harm"])[:, found["cases"].index(case)]
        return effect(lost, f"{case.partition(': ')[2].capitalize()}: {spread(lost)} points of test error lost")

    return answer


def hits(found: dict[str, Any]) -> Found:
    named, healthy = 100 * np.array(found["hits_where_harmful"]), 100 * np.array(found["healthy_with_a_finding"])
    text = (
        f"Of planted traps that cost a point or more {spread(named, '.0f')} % are named; of networks with none "
        f"{spread(healthy, '.0f')} % are told of one"
    )
    return Found(text, (FAILS, WEAKER, HOLDS)[sum([np.mean(named) > 90, np.mean(healthy) < 10])])
