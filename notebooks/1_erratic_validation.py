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
# The setting is one where weights move fast and steps are few: Adam with a constant learning rate of 0.1, batches of
# 256, and five epochs. It is `--preset article` of `scripts/train_mnist.py`, with a smaller network.

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import jax
import lab
import matplotlib.pyplot as plt
import numpy as np
import optax

import flaxbn

BATCH_SIZE, EPOCHS = (256, 5) if lab.FULL else (64, 8)
data = lab.load()
size = len(data.train.labels)
every = size // BATCH_SIZE // 4 or 1  # steps between two validations
optimizer = optax.adam(0.1)
model, without = lab.network(flaxbn.BatchNorm), lab.network(None)
lab.scale()

# %% [markdown]
# ## Training
#
# At each validation the same weights are judged twice: with the running average, and with the statistics of the batches
# that are validated, by `flaxbn.apply(..., statistics="batch")` in `lab.accuracy`.

# %%
validations = {"running": [], "batch": []}  # [seed][validation]
tests = {"none": [], "running": [], "unestimated": [], "population": []}  # [seed]
drifts = []
for seed in lab.SEEDS:
    curves = {statistics: [] for statistics in validations}
    states = lab.train(model, lab.epochs(EPOCHS, size, BATCH_SIZE, seed), seed=seed, optimizer=optimizer)
    for step, state in enumerate(states, 1):
        if step % every == 0:
            for statistics, curve in curves.items():
                curve.append(lab.accuracy(model, state.variables, data.validation, statistics=statistics))
    for statistics, curve in curves.items():
        validations[statistics].append(curve)

    running = state.batch_stats
    unestimated = model.init(jax.random.key(seed), data.train.images[:1])["batch_stats"]
    moments = flaxbn.population_moments(model, state.variables, data.train.images, batch_size=BATCH_SIZE)
    population = flaxbn.to_batch_stats(moments, running)
    for mode, batch_stats in {"running": running, "unestimated": unestimated, "population": population}.items():
        tests[mode].append(lab.accuracy(model, {**state.variables, "batch_stats": batch_stats}, data.test))
    drifts.append(flaxbn.diagnostics.compare(running, moments))

    state = lab.last(lab.train(without, lab.epochs(EPOCHS, size, BATCH_SIZE, seed), seed=seed, optimizer=optimizer))
    tests["none"].append(lab.accuracy(without, state.variables, data.test))

# %% [markdown]
# ## The answer in one figure

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 1))
steps = every * np.arange(1, 1 + len(validations["batch"][0]))
for statistics, color, label in (
    ("running", lab.ORANGE, "running average"),
    ("batch", lab.BLUE, "batch statistics"),
):
    left.plot(steps, np.transpose(validations[statistics]), color=color, alpha=0.5, linewidth=1)
    left.plot(steps, np.mean(validations[statistics], 0), color=color, linewidth=2.5, label=label)
left.set(
    title="The same weights, validated with two kinds of statistics\n(thin: seeds, thick: mean)",
    xlabel="training step",
    ylabel="validation accuracy (%)",
    ylim=(0, 101),
)
left.legend(loc="lower right")
for position, (mode, color) in enumerate(zip(tests, (lab.GREY, lab.ORANGE, lab.ORANGE, lab.BLUE))):
    right.bar(position, np.mean(tests[mode]), color=color, alpha=0.35)
    right.plot([position] * len(lab.SEEDS), tests[mode], ".", color=color)
    right.annotate(f"{np.mean(tests[mode]):.1f}", (position, 1), ha="center", va="bottom")
right.set(title="Test at the end, by mode\n(dots: seeds)", ylabel="test accuracy (%)", ylim=(0, 101))
right.grid(visible=False, axis="x")
right.set_xticks(range(len(tests)), [*tests], rotation=20)
plt.show()
# %% [markdown]
# ## In numbers

# %%
second_half = {name: np.array(validations[name])[:, len(steps) // 2 :] for name in validations}
change = {name: np.sqrt(np.mean(np.diff(curves) ** 2, 1)) for name, curves in second_half.items()}
worst = {name: np.min(curves, 1) for name, curves in second_half.items()}
last = [records[-1].rms_shift for records in drifts]
lab.say(
    "In the second half of the training the accuracy changes from one validation to the next by "
    f"{lab.over_seeds(change['running'])} points with the running average, and by {lab.over_seeds(change['batch'])} "
    "with batch statistics (root mean square).",
    f"The worst validation there: {lab.over_seeds(worst['running'])} % against {lab.over_seeds(worst['batch'])} %.",
    f"At the end the running mean of the last layer is {lab.over_seeds(last)} standard deviations away from the "
    "population's.",
    "Test accuracy: " + ", ".join(f"{mode} {lab.over_seeds(tests[mode])} %" for mode in tests) + ".",
)

# %% [markdown]
# ## What follows
#
# - Validate with batch statistics while training: `flaxbn.apply(model, variables, batch, statistics="batch")`. The
#   curve then tells about the weights. It is no estimate of what a deployed model does: its predictions depend on the
#   batch.
# - Before the test, estimate once: `estimate_population_stats`. Statistics that were never estimated are far worse than
#   a running average that lags.
# - A smaller learning rate, a decaying one, or more steps let the running average catch up: with `--preset settled` the
#   four modes of `scripts/train_mnist.py` end alike, but for `unestimated`.
#
# ## Against the literature
#
# Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, find the same with ResNet-50 on ImageNet and batches
# of 8192: the validation error with a running average is erratic in the first part of training, and that with precise
# statistics is not; at the end of their long training with a decaying learning rate the two agree. Here the learning
# rate does not decay, and the running average is behind to the end. Where `none` does not learn, 0.1 is far too large a
# rate without normalization; it says nothing about smaller ones.
