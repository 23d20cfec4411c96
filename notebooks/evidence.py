"""Writes docs/evidence.md: what articles and papers claim, and what full runs of the notebooks say to that.

    python notebooks/evidence.py

The figures come from notebooks/results, where `lab.keep` puts those of a full run; the claims and the rule by which
each is judged stand here. A notebook that has no results yet leaves its rows open.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "notebooks" / "results", ROOT / "docs" / "evidence.md"
HOLDS, WEAKER, FAILS, OPEN = "holds", "holds weaker", "does not hold here", "not run yet"

MINDEE = "[Mindee, *Danger of Batch Normalization*](https://www.mindee.com/blog/batch-normalization)"
IRPAN = "[Irpan 2017, *On The Perils of Batch Norm*](https://www.alexirpan.com/2017/04/26/perils-batch-norm.html)"
SITES = "an article on Wu & Johnson, of several labs"
WU = "Wu & Johnson 2021, *Rethinking 'Batch' in BatchNorm*"
IOFFE = "Ioffe 2017, *Batch Renormalization*"

NOTEBOOKS = {
    "1_erratic_validation": "Why is my validation curve erratic?",
    "2_two_datasets": "One network, two datasets",
    "3_batch_renormalization": "What does batch renormalization buy?",
    "4_estimating_statistics": "How should statistics be estimated?",
    "5_changed_data": "My data changed",
    "6_four_hospitals": "Several hospitals",
    "7_diagnosis": "What is a diagnosis worth?",
}


class Found(NamedTuple):
    """What a full run says to a claim."""

    text: str
    """The figures, in words."""
    verdict: str


class Claim(NamedTuple):
    """What a source says, and how the results of a notebook answer it."""

    text: str
    source: str
    notebook: str
    answer: Callable[[dict[str, Any]], Found]


def spread(values: Any, form: str = ".1f") -> str:
    """Mean and standard deviation over the seeds, as `lab.over_seeds`."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form.lstrip('+')}}"


def effect(gain: Any, text: str, reported: float | None = None) -> Found:
    """A claim that something is better or worse, `gain` being so many points of it for each seed.

    It holds if the mean exceeds two standard deviations of the seeds and half of what the source reports, if it gives a
    figure; weaker, if it exceeds one.
    """
    mean, deviation = np.mean(gain), np.std(gain)
    if mean > 2 * deviation and mean > (reported or 0) / 2:
        return Found(text, HOLDS)
    return Found(text, WEAKER if mean > deviation else FAILS)


def no_effect(difference: Any, text: str, within: float = 0.5) -> Found:
    """A claim that nothing changes, `difference` being the points for each seed.

    It holds if the mean is at most two standard deviations and `within` points; weaker, if it is either.
    """
    mean, deviation = abs(np.mean(difference)), np.std(difference)
    return Found(text, (FAILS, WEAKER, HOLDS)[sum([mean <= 2 * deviation, mean <= within])])


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


def from_to(old: Cell, new: Cell, reported: float | None = None) -> Callable[[dict[str, Any]], Found]:
    """That the second cell is the better one."""

    def answer(found: dict[str, Any]) -> Found:
        values = cell(found, *old), cell(found, *new)
        return effect(values[1] - values[0], change(*values, "% accuracy"), reported)

    return answer


def as_good(one: Cell, other: Cell) -> Callable[[dict[str, Any]], Found]:
    def answer(found: dict[str, Any]) -> Found:
        values = cell(found, *one), cell(found, *other)
        return no_effect(values[1] - values[0], change(*values, "% accuracy"))

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
    return [np.array(values)[:, found["sizes"].index(size)] for values in errors]


def won_back(kind: str, size: int, share: float) -> Callable[[dict[str, Any]], Found]:
    """That renormalization wins back a share of what batch normalization loses in groups."""

    def answer(found: dict[str, Any]) -> Found:
        old, new = in_groups(found, kind, size)
        whole = np.array(found["whole_batch"])
        text = f"Groups of {size}: {change(old, new)}; {spread(whole)} % without groups"
        return effect(old - new, text, share * np.mean(old - whole))

    return answer


def nothing_lost(found: dict[str, Any]) -> Found:
    size = max(found["sizes"])
    old, new = in_groups(found, "random groups", size)
    return no_effect(new - old, f"Groups of {size}: {change(old, new)}")


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
    return no_effect(values[1] - values[0], f"1 000 → {images[-1]} images: {change(*values)}")


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
        return effect(old - new, f"{name.capitalize()}, mean of five severities: {change(old, new)}", reported)

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


CLAIMS = (
    Claim(
        "With the running average, validation is erratic though the weights are not",
        MINDEE,
        "1_erratic_validation",
        erratic,
    ),
    Claim(
        "A network that is tested with statistics that were never estimated fails",
        MINDEE,
        "1_erratic_validation",
        tested(CONVOLUTIONS, "unestimated"),
    ),
    Claim(
        "Statistics estimated in one pass after training are better than the running average",
        MINDEE,
        "1_erratic_validation",
        tested(CONVOLUTIONS, "running"),
    ),
    Claim("The same in a deeper network", MINDEE, "1_erratic_validation", tested("ResNet-20", "running")),
    Claim(
        "Two datasets in batches of their own with one moving average lose accuracy, 2 points there, against mixed "
        "batches",
        IRPAN,
        "2_two_datasets",
        from_to(("turn-shared", "running"), ("mixed-shared", "running"), reported=2),
    ),
    Claim("Seeds differ more, too", IRPAN, "2_two_datasets", unequal_seeds),
    Claim(
        "Shared weights with statistics of each dataset are best, better than mixed batches",
        IRPAN,
        "2_two_datasets",
        from_to(("mixed-shared", "running"), ("turn-domain", "running")),
    ),
    Claim(
        "A model left in training mode fails at inference on small batches",
        IRPAN,
        "7_diagnosis",
        harm("training mode: batches of 4"),
    ),
    Claim(
        "Batches that do not represent the data do harm: not to shuffle is especially bad",
        IRPAN,
        "7_diagnosis",
        harm("sorted batches: 100 % of one class"),
    ),
    Claim(
        "Early in training the running average is far worse than precise statistics",
        WU + ", section 3",
        "4_estimating_statistics",
        precise_is_better("early", 2, "Batches of 128"),
    ),
    Claim(
        "So it is with large batches, 8 192 there",
        WU + ", section 3",
        "4_estimating_statistics",
        precise_is_better("large", 1, "Batches of 2 048 after 2 epochs"),
    ),
    Claim(
        "At the end of a long training the two agree (23.7 and 23.5 % error)",
        WU + ", table 2",
        "4_estimating_statistics",
        same_column(32, "running 0.9", "100"),
    ),
    Claim(
        "To estimate in batches of 2 costs 5.3 points of error",
        WU + ", table 2",
        "4_estimating_statistics",
        costs(32, "2", reported=5.3),
    ),
    Claim(
        "2.4 points where training, too, had the smallest groups: 2 there, 4 here",
        WU + ", table 2",
        "4_estimating_statistics",
        costs(4, "2", reported=2.4),
    ),
    Claim(
        "From batches of 10 on next to nothing is lost",
        WU + ", table 2",
        "4_estimating_statistics",
        same_column(32, "all", "10"),
    ),
    Claim(
        "Small batches underestimate the variance of deep layers",
        WU + ", section 3.2",
        "4_estimating_statistics",
        variance,
    ),
    Claim(
        "Exact statistics gain nothing over precise ones of large batches",
        WU + ", appendix A.3",
        "4_estimating_statistics",
        same_column(32, "100", "exact, 2"),
    ),
    Claim("A thousand samples are enough", WU + ", section 3", "4_estimating_statistics", thousand_images),
    Claim(
        "Estimate with the augmentation of training: 23.4 instead of 23.8 % error",
        WU + ", table 4",
        "4_estimating_statistics",
        augmented,
    ),
    Claim(
        "New statistics mend a change of contrast: 40.8 → 33.1 % error",
        WU + ", table 4",
        "5_changed_data",
        corrupted("contrast", reported=7.7),
    ),
    Claim("Noise: 64.4 → 52.5 % error", WU + ", table 4", "5_changed_data", corrupted("noise", reported=11.9)),
    Claim("JPEG: 40.4 → 36.7 % error", WU + ", table 4", "5_changed_data", corrupted("jpeg", reported=3.7)),
    Claim(
        "Statistics of each domain, in training and at the test, are as good as shared ones in both",
        WU + ", table 5",
        "2_two_datasets",
        as_good(("mixed-shared", "shared"), ("mixed-domain", "domain")),
    ),
    Claim(
        "Shared in training and of each at the test is a catastrophe: 2.1 instead of 39.1 AP",
        WU + ", table 5",
        "2_two_datasets",
        from_to(("mixed-shared", "domain"), ("mixed-shared", "shared"), reported=37),
    ),
    Claim(
        "Of each in training and shared at the test is bad, too",
        WU + ", table 5",
        "2_two_datasets",
        from_to(("mixed-domain", "shared"), ("mixed-domain", "domain")),
    ),
    Claim(
        "A scale and a bias for each domain add nothing",
        WU + ", table 5",
        "2_two_datasets",
        as_good(("mixed-domain", "domain"), ("mixed-domain-affine", "domain")),
    ),
    Claim(
        "Where data come from several sites, statistics of each serve the predictions for a new one",
        SITES,
        "6_four_hospitals",
        own_statistics("AUC", 1),
    ),
    Claim("The same of the probabilities", SITES, "6_four_hospitals", own_statistics("Brier score", -1)),
    Claim(
        "With groups of four, renormalization wins back about half of what is lost",
        IOFFE + ", section 4.2",
        "3_batch_renormalization",
        won_back("random groups", 4, share=0.5),
    ),
    Claim(
        "With batches that are no random sample, nearly all of it",
        IOFFE + ", section 4.3",
        "3_batch_renormalization",
        won_back("sorted groups", 4, share=1),
    ),
    Claim(
        "With large random batches nothing is lost by it",
        IOFFE + ", section 4.1",
        "3_batch_renormalization",
        nothing_lost,
    ),
    Claim(
        "`diagnose` names the trap that a network is in, and none where there is none",
        "this library",
        "7_diagnosis",
        hits,
    ),
)

HEAD = """# What holds?

<!-- Written by notebooks/evidence.py from notebooks/results; a change by hand is lost. -->

What articles and papers say of batch normalization that this library is an answer to, and what our runs say to that.
Their networks are larger than ours, a ResNet-50 on ImageNet for most; ours are narrow ResNets of 20 layers and small
networks, trained for a few epochs on quarters of CIFAR-10 and SVHN, on MNIST, and on a table of 920 patients. A claim
that does not hold here may hold there.

Figures are mean ± standard deviation over {seeds} seeds. An effect *holds* if its mean exceeds two standard deviations
and, where the source gives a figure, half of that, in its own unit; it *holds weaker* if it exceeds one standard
deviation. That nothing changes *holds* if the difference is within two standard deviations and half a point, and *holds
weaker* within one of the two. For the spread of seeds, hospitals and the diagnosis the rule stands in
`notebooks/evidence.py`.

| claim | source | here | | notebook |
|---|---|---|---|---|
"""

TAIL = """
Of the articles, Mindee's is known here by the code that goes with it,
[mindee/Problem-of-BatchNorm](https://github.com/mindee/Problem-of-BatchNorm), with the four modes of notebook 1. Irpan
tells of two datasets of his own, whose plots he shows, and takes MNIST and SVHN for an example. The text of the article
on several labs, and that of a fourth on batch renormalization, could not be had: to the first belongs the question, and
what the second claims is taken from Ioffe's paper. Those of the papers' figures that are no round numbers are of their
tables.

Each notebook is run again, on the folder DIR of data sets, by:

| notebook | command | the run shown |
|---|---|---|
"""


def row(claim: Claim, results: dict[str, dict[str, Any]]) -> str:
    """A line of the table."""
    known = claim.notebook in results
    text, verdict = claim.answer(results[claim.notebook]) if known else ("", OPEN)
    notebook = f"[{claim.notebook[0]}](../notebooks/{claim.notebook}.ipynb)"
    return f"| {claim.text} | {claim.source} | {text} | {'**' * known}{verdict}{'**' * known} | {notebook} |"


def command(notebook: str, results: dict[str, dict[str, Any]]) -> str:
    """A line of the table of commands."""
    found = results.get(notebook)
    run = f"{found['seeds']} seeds, {found['device']}, jax {found['jax']}" if found else OPEN
    title = f"[{notebook[0]}: {NOTEBOOKS[notebook]}](../notebooks/{notebook}.ipynb)"
    return f'| {title} | `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k {notebook}"` | {run} |'


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page, from the results by notebook."""
    seeds = sorted({found["seeds"] for found in results.values()}) or ["five"]
    rows = [row(claim, results) for claim in CLAIMS]
    commands = [command(notebook, results) for notebook in NOTEBOOKS]
    return "\n".join(
        [HEAD.format(seeds=" or ".join(map(str, seeds))) + "\n".join(rows), TAIL + "\n".join(commands), ""]
    )


def read_results() -> dict[str, dict[str, Any]]:
    """The figures of the full runs that are kept."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


if __name__ == "__main__":
    PAGE.write_text(page(read_results()))
