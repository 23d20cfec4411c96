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
# # Why is my validation curve erratic?
#
# Because the running average lags behind the weights. The network is fine: it is judged with statistics that belong to
# weights which it no longer has.
#
# Four ways to use batch normalization, which differ in the statistics only. `running`, `unestimated` and `population`
# train with batch statistics, so their weights are the same to the bit; one training serves all three.
#
# | mode | training | validation | test |
# |---|---|---|---|
# | `none` | no normalization | same | same |
# | `running` | batch statistics | running average | running average |
# | `unestimated` | batch statistics | batch statistics | what `init` stored |
# | `population` | batch statistics | batch statistics | `estimate_population_stats` |
#
# The setting is one where weights move fast and steps are few: Adam with a constant learning rate of 0.1 and batches of
# 256, `--preset article` of `scripts/train_mnist.py`. In a full run the images are 12 500 of CIFAR-10, halved to 16x16,
# the networks that script's three convolutions and a narrow ResNet-20, and the three convolutions are trained for 20
# epochs: as many steps as in five epochs of all 50 000 images. The small run has digits and three convolutions.
#
# To repeat the full run: `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k 1_erratic_validation"`.

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import functools

import jax
import lab
import matplotlib.pyplot as plt
import networks
import numpy as np
import optax
import training
from IPython.display import Markdown

import flaxbn

BATCH_SIZE = 256 if lab.FULL else 64
EPOCHS = {"three convolutions": 20, "ResNet-20": 8} if lab.FULL else {"three convolutions": 8}
data = lab.load_halved("cifar10")
size = len(data.train.labels)
steps = size // BATCH_SIZE  # of an epoch
constant = optax.adam(0.1)
decaying = optax.adam(optax.cosine_decay_schedule(0.1, EPOCHS["three convolutions"] * steps))
norm = functools.partial(flaxbn.BatchNorm, momentum=0.9)
convolutions = functools.partial(networks.CNN, 10) if lab.FULL else lab.network
normalized = {"three convolutions": convolutions(norm), "ResNet-20": lab.resnet(norm)}
without = {"three convolutions": convolutions(None), "ResNet-20": lab.resnet(None)}
lab.scale("cifar10")

# %% [markdown]
# ## Training
#
# After each epoch the same weights are judged with three kinds of statistics: the running average with the momentum
# that Flax has, 0.99; one with 0.9, which is PyTorch's and forgets ten times as fast; and the statistics of the batches
# that are validated, by `flaxbn.apply(..., statistics="batch")` in `lab.accuracy`.
#
# Both averages are of the same training: the layers keep that with 0.9, from which the statistics of each batch, and
# with these the other average, follow.


# %%
@jax.jit
def longer(average, before, after):
    """The average with momentum 0.99 a step on, while that with 0.9 goes from `before` to `after`."""
    return jax.tree.map(lambda old, a, b: 0.99 * old + 0.01 * (b - 0.9 * a) / 0.1, average, before, after)


def train_normalized(name, optimizer, seed):
    """Validation by epoch for each kind of statistics, the test of each mode, and the lag of the average at the end."""
    model, order = normalized[name], lab.epochs(EPOCHS[name], size, BATCH_SIZE, seed)
    start = training.initial_state(jax.random.key(seed), data.train.images[:2], model=model, optimizer=optimizer)
    average = before = start.batch_stats

    def accuracy(batch_stats, split, statistics="running"):
        return lab.accuracy(model, {"params": state.params, "batch_stats": batch_stats}, split, statistics=statistics)

    validation = {"running": [], "running, 0.9": [], "batch": []}
    for step, state in enumerate(lab.train(model, order, seed=seed, optimizer=optimizer, split=data.train), 1):
        average, before = longer(average, before, state.batch_stats), state.batch_stats
        if step % steps == 0:
            validation["running"].append(accuracy(average, data.validation))
            validation["running, 0.9"].append(accuracy(before, data.validation))
            validation["batch"].append(accuracy(before, data.validation, "batch"))

    moments = flaxbn.population_moments(model, state.variables, data.train.images, batch_size=BATCH_SIZE)
    tested = {
        "running": average,
        "running, 0.9": before,
        "unestimated": start.batch_stats,
        "population": flaxbn.to_batch_stats(moments, before),
    }
    test = {mode: accuracy(batch_stats, data.test) for mode, batch_stats in tested.items()}
    lag = np.median([layer.rms_shift for layer in flaxbn.diagnostics.compare(average, moments)])
    return validation, test, lag


def train_without(name, seed):
    """Validation by epoch and the test of a network without normalization."""
    model, order = without[name], lab.epochs(EPOCHS[name], size, BATCH_SIZE, seed)
    validation = []
    for step, state in enumerate(lab.train(model, order, seed=seed, optimizer=constant, split=data.train), 1):
        if step % steps == 0:
            validation.append(lab.accuracy(model, state.variables, data.validation))
    return validation, lab.accuracy(model, state.variables, data.test)


def stacked(runs):
    """One dictionary of arrays, the seeds first, of a dictionary for each seed."""
    return {key: np.array([run[key] for run in runs]) for key in runs[0]}


# %%
validations, tests, lags = {}, {}, {}  # [network][statistics or mode] -> [seed, ...]
for name in EPOCHS:
    curves, at_end, lags[name] = zip(*(train_normalized(name, constant, seed) for seed in lab.SEEDS))
    plain, plain_at_end = zip(*(train_without(name, seed) for seed in lab.SEEDS))
    validations[name] = {"none": np.array(plain), **stacked(curves)}
    tests[name] = {"none": np.array(plain_at_end), **stacked(at_end)}

# %% [markdown]
# ## The answer in one figure

# %%
KINDS = {
    "none": (lab.GREY, "no normalization"),
    "running": (lab.ORANGE, "running average"),
    "running, 0.9": (lab.GREEN, "running average, momentum 0.9"),
    "batch": (lab.BLUE, "batch statistics"),
}
MODES = {
    "none": lab.GREY,
    "running": lab.ORANGE,
    "running, 0.9": lab.GREEN,
    "unestimated": lab.ORANGE,
    "population": lab.BLUE,
}

_, rows = plt.subplots(len(EPOCHS), 2, figsize=(10, 3.8 * len(EPOCHS)), width_ratios=(2, 1), squeeze=False)
for (left, right), name in zip(rows, EPOCHS):
    epochs = range(1, 1 + EPOCHS[name])
    for kind, (color, label) in KINDS.items():
        left.plot(epochs, validations[name][kind].T, color=color, alpha=0.45, linewidth=1)
        left.plot(epochs, validations[name][kind].mean(0), color=color, linewidth=2.5, label=label)
    scale = f"thin: {len(lab.SEEDS)} seeds, thick: mean"
    left.set_title(f"{name}: the same weights, validated with\nseveral kinds of statistics ({scale})")
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, None), xticks=epochs[:: 1 + len(epochs) // 11])
    for position, (mode, color) in enumerate(MODES.items()):
        right.bar(position, tests[name][mode].mean(), color=color, alpha=0.35)
        right.plot([position] * len(lab.SEEDS), tests[name][mode], ".", color=color)
        top = position, tests[name][mode].max()
        right.annotate(f"{tests[name][mode].mean():.1f}", top, (0, 5), textcoords="offset points", ha="center")
    right.set(title="Test at the end, by mode\n(bars: mean, dots: seeds)", ylabel="test accuracy (%)")
    right.margins(y=0.12)
    right.grid(visible=False, axis="x")
    right.set_xticks(range(len(MODES)), [*MODES], rotation=20)
rows[0, 0].legend(loc="lower right", fontsize="small", frameon=True, framealpha=0.9)
plt.show()

# %% [markdown]
# ## In numbers
#
# Mean ± standard deviation over the seeds. Validation is that of the second half of the training: its mean, its worst
# epoch in each seed, and the root mean square of the change from one epoch to the next. `running, 0.9` is `running`
# with a momentum of 0.9.

# %%
VALIDATED = {"unestimated": "batch", "population": "batch"}  # the others by their own name
second_half = {
    name: {kind: curve[:, EPOCHS[name] // 2 :] for kind, curve in curves.items()}
    for name, curves in validations.items()
}
change = {
    name: {kind: np.sqrt(np.mean(np.diff(curve) ** 2, 1)) for kind, curve in curves.items()}
    for name, curves in second_half.items()
}


def row(name, mode):
    """A mode's line of the table."""
    kind = VALIDATED.get(mode, mode)
    curve = second_half[name][kind]
    cells = curve.mean(1), curve.min(1), change[name][kind], tests[name][mode]
    return f"| {name} | `{mode}` | " + " | ".join(lab.over_seeds(cell, ".1f") for cell in cells) + " |"


Markdown(
    "| network | mode | validation (%) | worst epoch (%) | change (points) | test (%) |\n|---|---|---|---|---|---|\n"
    + "\n".join(row(name, mode) for name in EPOCHS for mode in MODES)
)


# %%
def compared(gains):
    """A difference in points, and whether it is more than seeds differ by."""
    mean, spread = np.mean(gains), np.std(gains)
    verdict = "no more than seeds differ by" if abs(mean) <= spread else "more" if mean > 0 else "less"
    return f"{lab.over_seeds(gains, '+.1f')} points ({verdict})"


lab.say(
    "In the first epoch of the second half what `init` stored still has a weight in the running average of "
    + ", ".join(f"{100 * 0.99 ** (steps * (1 + EPOCHS[name] // 2)):.1f} % ({name})" for name in EPOCHS)
    + "; with a momentum of 0.9 none.",
    *(
        f"{name}, worst epoch of the second half with batch statistics less that with the running average: "
        f"{compared(second_half[name]['batch'].min(1) - second_half[name]['running'].min(1))}; less that with a "
        f"momentum of 0.9: {compared(second_half[name]['batch'].min(1) - second_half[name]['running, 0.9'].min(1))}."
        for name in EPOCHS
    ),
    *(
        f"{name}, test with estimated statistics less that with the running average: "
        f"{compared(tests[name]['population'] - tests[name]['running'])}; less that with a momentum of 0.9: "
        f"{compared(tests[name]['population'] - tests[name]['running, 0.9'])}. At the end the running mean of the "
        f"median layer is {lab.over_seeds(lags[name])} standard deviations away from the population's."
        for name in EPOCHS
    ),
)

# %% [markdown]
# ## With a learning rate that decays
#
# The same three convolutions, the same epochs, and the learning rate falls from 0.1 to 0 as a cosine.

# %%
settled_curves, settled, settled_lags = zip(
    *(train_normalized("three convolutions", decaying, seed) for seed in lab.SEEDS)
)
settled_curves, settled = stacked(settled_curves), stacked(settled)
settled_middle = settled_curves["batch"] - settled_curves["running"]
lab.keep(
    "1_erratic_validation",
    validation=validations,
    test=tests,
    worst={name: {kind: curve.min(1) for kind, curve in curves.items()} for name, curves in second_half.items()},
    change=change,
    lag=lags,
    decaying={"validation": settled_curves, "test": settled, "lag": settled_lags},
)
lab.say(
    "Validation with batch statistics less that with the running average, half way: "
    f"{compared(settled_middle[:, EPOCHS['three convolutions'] // 2 - 1])}; after the last epoch: "
    f"{compared(settled_middle[:, -1])}.",
    f"Test: {', '.join(f'{mode} {lab.over_seeds(settled[mode])} %' for mode in settled)}.",
    f"At the end the running mean of the median layer is {lab.over_seeds(settled_lags)} standard deviations away from "
    "the population's.",
)

# %% [markdown]
# ## What follows
#
# - Validate with batch statistics while training: `flaxbn.apply(model, variables, batch, statistics="batch")`. The
#   curve then tells about the weights. It is no estimate of what a deployed model does: its predictions depend on the
#   batch.
# - Before the test, estimate once: `estimate_population_stats`. Statistics that were never estimated are far worse than
#   a running average that lags.
# - A smaller momentum shortens the lag and does not end it: the table has by how much.
# - A decaying learning rate lets the running average catch up at the end. Until then the curve is as misleading.
#
# ## Against the literature
#
# Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, find the same with ResNet-50 on ImageNet and batches
# of 8192: the validation error with a running average is erratic in the first part of training, and that with precise
# statistics is not; at the end of their long training with a decaying learning rate the two agree. Where `none` does
# not learn, 0.1 is far too large a rate without normalization; it says nothing about smaller ones. The curves are of
# short trainings on a quarter of CIFAR-10, halved to 16x16: what they say is about the statistics, not about how well
# such networks can do.
