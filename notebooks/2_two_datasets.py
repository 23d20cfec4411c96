# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: "1.3"
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One network, two datasets: what goes wrong?
#
# A network is trained on SVHN, house numbers in colour, and on MNIST, white digits on black: the same ten classes, one
# size, three channels, shared weights. In training it is normalized by batches; at the test by stored statistics. It
# goes wrong where the two do not match: above all where one average serves two datasets that were normalized apart, and
# fits neither.
#
# | training | a batch holds | normalized | running average | scale and bias |
# |---|---|---|---|---|
# | `mixed-shared` | half of each | together | one | shared |
# | `mixed-domain` | half of each | each dataset by itself | one each | shared |
# | `mixed-domain-affine` | half of each | each dataset by itself | one each | one each |
# | `turn-shared` | one dataset, in turn | each dataset by itself | one | shared |
# | `turn-domain` | one dataset, in turn | each dataset by itself | one each | shared |
# | `turn-domain-affine` | one dataset, in turn | each dataset by itself | one each | one each |
#
# `turn-shared` and `turn-domain` train the same weights; only what they store for the test differs.
#
# The training is that of `scripts/train_domains.py`: three convolutions, Adam, a learning rate that falls to zero. The
# command that repeats a full run: `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k 2_two"`, where `DIR` holds the folders
# `svhn` and `mnist`. Without FULL=1 the datasets are scikit-learn's digits, and the same blended into photographs.

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import pathlib
import tempfile

import lab
import matplotlib.pyplot as plt
import numpy as np
import train_domains
import training
from rich.console import Console
from scipy import stats

config = train_domains.Config(
    datasets=("svhn", "mnist") if lab.FULL else ("digits", "digits-blended"),
    data_dir=lab.data_folder("svhn").parent if lab.FULL else None,
    epochs=2 if lab.TRIAL else 15 if lab.FULL else 3,
    batch_size=128 if lab.FULL else 64,
    learning_rate=5e-3 if lab.FULL else 3e-3,
    seeds=len(lab.SEEDS),
    variants=tuple(train_domains.VARIANTS)
    if lab.FULL
    else tuple(v for v in train_domains.VARIANTS if "affine" not in v),
    out=pathlib.Path(tempfile.mkdtemp()),
)
prepared = train_domains.prepare(config, train_domains.load(config))
tested = {variant: [] for variant in config.variants}  # [variant][seed]
with train_domains.keep_journal(config.out, [], Console(quiet=True), total=0) as journal:
    for run in training.repetitions(config, "variant", config.variants, config.variants):
        state = train_domains.train(config, prepared, run, journal)
        tested[run.name].append(train_domains.test(config, prepared, run, state))
sizes = " and ".join(f"{name} ({len(domain.train.labels)} images)" for name, domain in prepared.domains.items())
lab.say(
    f"This run: {sizes}; {config.epochs} epochs, each once through the smaller one and as many images of the larger; "
    f"batches of {config.batch_size}; {config.seeds} seeds; on {lab.jax.devices()[0].device_kind}."
)

# %% [markdown]
# ## The answer in one figure

# %%
SHOWN = {
    "turn-shared": "one dataset in turn,\none average for both",
    "turn-domain": "one dataset in turn,\nan average for each",
    "mixed-shared": "half of each in a batch,\none average for both",
}
RANKS = {0: ("top", lab.GREEN), config.seeds // 2: ("median", lab.BLUE), config.seeds - 1: ("worst", lab.ORANGE)}


def by_epoch(variant, measure):
    """Percent, [seeds, epochs]."""
    lines = [line for line in journal.lines if line["variant"] == variant]
    return 100 * np.reshape([measure(line) for line in lines], (config.seeds, config.epochs))


validated = {
    variant: {
        name: by_epoch(variant, lambda line, name=name: line["validation_accuracy"][name]) for name in prepared.domains
    }
    for variant in config.variants
}
trained = {variant: by_epoch(variant, lambda line: line["train_accuracy"]) for variant in config.variants}
epochs = 1 + np.arange(config.epochs)
figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey=True)
for row, name in zip(axes, prepared.domains):
    for ax, (variant, title) in zip(row, SHOWN.items()):
        curves = validated[variant][name]
        ranked = curves[np.argsort(-curves.mean(1))]
        for place, (label, color) in RANKS.items():
            ax.plot(epochs, ranked[place], color=color, label=f"{label} of {len(ranked)} seeds", marker=".")
        ax.plot(
            epochs,
            trained[variant].mean(0),
            "--",
            color=lab.GREY,
            label="in training, both datasets, mean of the seeds",
        )
        ax.set_title(f"{name}: {title}")
        ax.set_ylim(0, 101)
        ax.xaxis.get_major_locator().set_params(integer=True)
for ax in axes[:, 0]:
    ax.set_ylabel("accuracy in validation (%)")
for ax in axes[1]:
    ax.set_xlabel("epoch")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
figure.suptitle(
    "Validated with the running average. Seeds ranked in each panel by the mean over the epochs", fontsize="medium"
)
plt.show()

# %% [markdown]
# ## Shared or separate, in training and at the test
#
# Each network is tested with the running average that it kept, with the population statistics of both datasets
# together, and with those of each. Blank: scale and bias are apart, which the population of both cannot serve.

# %%
STATISTICS = {"running": "running\naverage", "shared": "population\nof both", "domain": "population\nof each"}


def test_accuracy(variant, kind, name):
    """Percent, [seeds]; NaN where scale and bias are apart, which both together cannot share."""
    return 100 * np.array([test["test_accuracy"].get(kind, {name: np.nan})[name] for test in tested[variant]])


figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
grids = {
    name: np.array([[test_accuracy(variant, kind, name) for kind in STATISTICS] for variant in tested])
    for name in prepared.domains
}  # [variant, statistics, seed]
lost = {name: np.nanmax(grid.mean(-1)) - grid.mean(-1) for name, grid in grids.items()}
most = max(np.nanmax(points) for points in lost.values())
for ax, (name, grid) in zip(axes, grids.items()):
    image = ax.imshow(lost[name], cmap="Oranges", vmin=0, vmax=most, aspect="auto")
    for row, variant in enumerate(tested):
        for column, kind in enumerate(STATISTICS):
            if np.isfinite(lost[name][row, column]):
                ax.text(
                    column,
                    row,
                    lab.over_seeds(grid[row, column], ".1f"),
                    ha="center",
                    va="center",
                    color="white" if lost[name][row, column] > 0.6 * most else "black",
                    weight="bold" if tested[variant][0]["consistent"][kind] else "normal",
                )
    ax.set(title=f"test accuracy on {name} (%)", xlabel="statistics at the test")
    ax.set_xticks(range(len(STATISTICS)), [*STATISTICS.values()])
    ax.set_yticks(range(len(tested)), [*tested])
    ax.grid(visible=False)
axes[0].set_ylabel("training")
figure.colorbar(image, ax=axes, label="points below the best")
figure.suptitle(
    f"Bold: normalized at the test as in training. Mean ± standard deviation over {len(lab.SEEDS)} seeds",
    fontsize="medium",
)
plt.show()

# %% [markdown]
# ## In numbers


# %%
def both(variant, kind):
    """The accuracy on both datasets, with its spread over the seeds."""
    return " / ".join(lab.over_seeds(test_accuracy(variant, kind, name), ".1f") for name in prepared.domains)


def change(start, end):
    """What (variant, statistics) `end` has over `start`, the same seeds compared, and whether chance explains it."""
    points = {name: test_accuracy(*end, name) - test_accuracy(*start, name) for name in prepared.domains}
    width = {
        name: stats.t.ppf(0.975, len(gained) - 1) * np.std(gained, ddof=1) / np.sqrt(len(gained))
        if len(gained) > 1
        else np.inf
        for name, gained in points.items()
    }
    return " and ".join(
        f"{lab.over_seeds(gained, '+.1f')} points on {name}"
        + (" (may be 0)" if abs(gained.mean()) <= width[name] else "")
        for name, gained in points.items()
    )


first, second = prepared.domains
layers = [test["layers"] for test in tested["turn-domain"]]
distances = {
    part: [lab.over_seeds([of[layer][part] for of in layers]) for layer in layers[0]]
    for part in ("mean_shift", "var_factor")
}
early = config.epochs // 3
lowest = {variant: [curves[:, early:].min() for curves in validated[variant].values()] for variant in SHOWN}
affine = (
    [
        "A scale and bias for each dataset, instead of shared ones, changes that by "
        f"{change(('mixed-domain', 'domain'), ('mixed-domain-affine', 'domain'))}."
    ]
    if "mixed-domain-affine" in tested
    else []
)
lab.say(
    f"Accuracy on {first} / {second}. One dataset in turn, one running average: {both('turn-shared', 'running')} %. "
    f"The same weights with the population of each: {both('turn-shared', 'domain')} %, "
    f"{change(('turn-shared', 'running'), ('turn-shared', 'domain'))}.",
    f"The same weights with the population of both: {both('turn-shared', 'shared')} %, "
    f"{change(('turn-shared', 'running'), ('turn-shared', 'shared'))}.",
    f"An average for each, `turn-domain`: {both('turn-domain', 'running')} %; the population of each instead changes "
    f"that by {change(('turn-domain', 'running'), ('turn-domain', 'domain'))}.",
    f"The lowest validation of any seed after epoch {early}: "
    + "; ".join(f"`{variant}` {lowest[variant][0]:.1f} / {lowest[variant][1]:.1f} %" for variant in SHOWN)
    + ".",
    f"Both normalized together, the population of both at the test: {both('mixed-shared', 'shared')} %. The population "
    f"of each instead: {both('mixed-shared', 'domain')} %, "
    f"{change(('mixed-shared', 'shared'), ('mixed-shared', 'domain'))}.",
    f"Each normalized by itself in a mixed batch, the population of each at the test: "
    f"{both('mixed-domain', 'domain')} %, against shared statistics all through "
    f"{change(('mixed-shared', 'shared'), ('mixed-domain', 'domain'))}. The population of both instead: "
    f"{both('mixed-domain', 'shared')} %, {change(('mixed-domain', 'domain'), ('mixed-domain', 'shared'))}.",
    *affine,
    f"The two datasets differ by {', '.join(distances['mean_shift'])} standard deviations in the mean of layers 0, 1 "
    f"and 2, and by factors of {', '.join(distances['var_factor'])} in the variance (`turn-domain`).",
    "A change that may be 0 is one whose 95 % interval over the seeds (Student's t) holds 0.",
)

# %% [markdown]
# ## What follows
#
# - Normalize at the test as in training: the cells in bold, with population statistics. Where batches hold one dataset
#   each, that is the population of each: `flaxbn.domains.estimate` for any model, `num_domains` in the layer.
# - Or let every batch hold both, in the shares of the test, and one average serves both.
# - With batches in turn, a running average for each dataset has half of the updates, and lags: the numbers above say
#   what the population of each gains over it, though the learning rate fell to zero. Estimate.
#
# ## Against the literature
#
# The first figure is drawn as in Irpan's article "On the perils of batch norm": batches of each dataset in turn, the
# top, the median and the worst of five seeds. His plots are of two datasets of his own; MNIST and SVHN are his example.
# There, too, one average for both loses accuracy, and one for each mends it; there, one for each is better than mixed
# batches, which the last column and the first row of the tables let compare here.
#
# All spreads are those of seeds, with one test set: 1 450 images of SVHN by themselves leave a standard error of 1.1
# points. Below, a catastrophe is a loss of more than 20 points, a clear loss one of more than 2.
#
# Table 5 of Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", has the combinations of the second figure for the
# five pyramid levels of an object detector that share a head. There, shared statistics in training and those of each
# level at the test destroy the detector (2.1 instead of 39.1 AP), statistics of each in both are as good as shared ones
# in both, and a scale and bias of each add nothing.

# %%
CELLS = {
    "Shared in training, of each at the test": (("mixed-shared", "shared"), ("mixed-shared", "domain")),
    "Of each in training, shared at the test": (("mixed-domain", "domain"), ("mixed-domain", "shared")),
}


def verdict(start, end):
    """How bad a mismatch is, on the dataset that loses more."""
    losses = {name: test_accuracy(*start, name) - test_accuracy(*end, name) for name in prepared.domains}
    name, loss = max(losses.items(), key=lambda item: item[1].mean())
    word = "a catastrophe" if loss.mean() > 20 else "a clear loss" if loss.mean() > 2 else "little or no loss"
    return f"{word}: {lab.over_seeds(loss, '.1f')} points on {name}, which loses more"


lab.say(*(f"{mismatch} is here {verdict(*cells)}." for mismatch, cells in CELLS.items()))

# %%
lab.keep(
    "2_two_datasets",
    validated=validated,
    trained=trained,
    test={
        variant: {
            kind: {name: test_accuracy(variant, kind, name) for name in prepared.domains}
            for kind in tested[variant][0]["test_accuracy"]
        }
        for variant in tested
    },
    layers={variant: [test["layers"] for test in tests] for variant, tests in tested.items()},
)
