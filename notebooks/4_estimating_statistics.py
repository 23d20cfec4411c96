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
# # How should statistics be estimated?
#
# By one pass over some thousand examples with the weights frozen: *precise* statistics. They do not depend on the last
# steps of training, as a running average does; and *exact* ones do not depend on the batch size of the estimate either.
#
# | statistics | from | weights |
# |---|---|---|
# | running average | the batches of training, the last ones most | those of each step |
# | precise | batches, each layer normalized by its own batch, merged | frozen |
# | exact | all examples as one batch, in parts of any size | frozen |
#
# A full run trains a narrow ResNet-20 on a quarter of CIFAR-10, halved to 16x16, with SGD batches of 128 that are
# normalized in groups of 32 or of 4 (`virtual_batch_size`), as Wu & Johnson 2021 do. Each network is trained once for
# each seed; every estimate below is made for the same weights. Without `FULL=1` it is three convolutions on digits,
# which only shows that all of it runs. To repeat the full run:
#
#     make notebooks FULL=1 DATA_DIR=DIR ARGS="-k 4_estimating_statistics"

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lab
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

import flaxbn

GROUPS = (32, 4)  # examples that are normalized together
BATCH_SIZE, EPOCHS = (128, 6) if lab.FULL else (64, 6)
LARGE, LARGE_EPOCHS = (2048 if lab.FULL and not lab.TRIAL else 256), 4
MOMENTA = (0.9, 0.99)  # of the running averages

data = lab.load_halved("cifar10")
size = len(data.train.labels)
warnings.filterwarnings("ignore", "For one call of")  # the five batch sizes compared here are five programs
SAMPLE = min(2000, size)
sample = data.train.images[:SAMPLE]  # what most estimates are made from, the same for all networks
lab.scale("cifar10")

# %% [markdown]
# ## Training
#
# Adam, a learning rate that decays to 0. The layers have momentum 0, so what they store are the statistics of the last
# batch, merged over its groups; from these a running average is kept for each momentum. It does not touch the weights.
#
# In the first two epochs the same weights are judged with each running average and with precise statistics.


# %%
class Trained(NamedTuple):
    """The weights, and for each momentum the running average that was kept in training."""

    params: Any
    running: dict[float, Any]


@functools.cache
def network(group=None):
    """The network whose layers normalize groups of a batch; where None, the whole: the one that is evaluated."""
    norm = functools.partial(flaxbn.BatchNorm, momentum=0.0, virtual_batch_size=group)
    return lab.resnet(norm) if lab.FULL else lab.network(norm)


@functools.cache
def adam(steps):
    return optax.adam(optax.cosine_decay_schedule(0.003 if lab.FULL else 0.01, steps))


@jax.jit
def follow(running, latest):
    """The running averages, one for each momentum, after one more batch."""
    return {momentum: moved(stats, latest, momentum) for momentum, stats in running.items()}


def moved(stats, latest, momentum):
    return jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, stats, latest)


def untouched(batch_stats):
    """What layers begin with."""
    return {
        name: {"mean": jnp.zeros_like(s["mean"]), "var": jnp.ones_like(s["var"])} for name, s in batch_stats.items()
    }


def train(group, seed, batch_size=BATCH_SIZE, epochs=EPOCHS, *, augmented=False):
    """What is there after each step."""
    batches, optimizer = lab.epochs(epochs, size, batch_size, seed), adam(epochs * (size // batch_size))
    running = None
    setting = {"optimizer": optimizer, "split": data.train, "augmented": augmented}
    for state in lab.train(network(group), batches, seed=seed, **setting):
        running = follow(running or dict.fromkeys(MOMENTA, untouched(state.batch_stats)), state.batch_stats)
        yield Trained(state.params, running)


def estimate(trained, images, batch_size=None, method="precise"):
    """Population statistics from an array of images, or from batches."""
    variables = {"params": trained.params, "batch_stats": trained.running[MOMENTA[0]]}
    return flaxbn.estimate_population_stats(network(), variables, images, batch_size=batch_size, method=method)


def error(trained, batch_stats):
    """Test error in percent."""
    return lab.error(network(), {"params": trained.params, "batch_stats": batch_stats}, data.test)


def judge(trained):
    """Test errors with both running averages and with precise statistics."""
    precise = estimate(trained, sample, 100)
    return [error(trained, stats) for stats in (*trained.running.values(), precise)]


def trained_with_curve(group, seed):
    """The trained network, and for the first size of groups its test errors on the way."""
    curve = []
    for step, trained in enumerate(train(group, seed), 1):
        if group == GROUPS[0] and step in moments:
            curve.append(judge(trained))
    return trained, curve


steps = size // BATCH_SIZE
moments = sorted({max(1, round(part * steps)) for part in (1 / 8, 1 / 4, 1 / 2, 1, 2)})
runs = {(group, seed): trained_with_curve(group, seed) for group in GROUPS for seed in lab.SEEDS}
found = {key: trained for key, (trained, _) in runs.items()}
early = np.array([curve for _, curve in runs.values() if curve])  # [seed, moment, statistics]

# %% [markdown]
# ## Against the batch size of the estimate
#
# From one sample of training images. The reference is the whole sample as one batch ("all"). Exact statistics are asked
# for with batches of 2. The running averages are those kept in training.

# %%
SIZES = (2, 4, 10, 100, SAMPLE)
COLUMNS = ("2", "4", "10", "100", "all", "exact, 2", *(f"running {m}" for m in MOMENTA))


def layers(batch_stats):
    """The names of the layers in the order of the network."""
    return sorted(batch_stats, key=lambda name: int(name.rpartition("_")[2]))


def variances(batch_stats, reference):
    """Of each layer the variance in parts of that of the reference, the mean over the channels."""
    return [float(np.mean(batch_stats[name]["var"] / reference[name]["var"])) for name in layers(reference)]


errors = {group: [] for group in GROUPS}  # [seed][column]
ratios = {group: [] for group in GROUPS}  # [seed][column][layer]
for (group, _), trained in found.items():
    stats = [estimate(trained, sample, batch_size) for batch_size in SIZES]
    exact = estimate(trained, sample, 2, "exact")
    stats += [exact, *trained.running.values()]
    errors[group].append([error(trained, one) for one in stats])
    ratios[group].append([variances(one, exact) for one in stats])
errors, ratios = ({group: np.array(values) for group, values in of.items()} for of in (errors, ratios))
costs = {group: values - values[:, [COLUMNS.index("all")]] for group, values in errors.items()}

# %% [markdown]
# ## Large batches
#
# Batches of 2 048, each normalized as a whole: 6 steps an epoch.

# %%
large = []  # [seed][epoch][statistics]
for seed in lab.SEEDS:
    states = enumerate(train(None, seed, LARGE, LARGE_EPOCHS), 1)
    large.append([judge(trained) for step, trained in states if step % (size // LARGE) == 0])
large = np.array(large)

# %% [markdown]
# ## The number of samples
#
# Precise statistics in batches of 100, from images that each seed draws for itself.

# %%
BATCHES = size // 100
counts = [n for n in (1, 3, 10, 30) if n < BATCHES] + [BATCHES]  # batches of 100
by_count = []  # [seed][count]
for seed in lab.SEEDS:
    order = np.random.default_rng(seed).permutation(size)[: 100 * BATCHES].reshape(-1, 100)
    batches = [data.train.images[index] for index in order]
    trained = found[GROUPS[0], seed]
    by_count.append([error(trained, estimate(trained, batches[:count])) for count in counts])
by_count = np.array(by_count)

# %% [markdown]
# ## Augmentation
#
# Groups of 32 once more, trained on images that are shifted and mirrored at random. Exact statistics from the same
# sample of images, augmented and plain.

# %%
augmented_sample = lab.training.augment(jax.random.key(0), sample)
augmentation = {"augmented": [], "plain": [], "running": []}  # [seed]
for seed in lab.SEEDS:
    trained = lab.last(train(GROUPS[0], seed, augmented=True))
    for name, images in (("augmented", augmented_sample), ("plain", sample)):
        augmentation[name].append(error(trained, estimate(trained, images, 2, "exact")))
    augmentation["running"].append(error(trained, trained.running[MOMENTA[0]]))
augmentation = {name: np.array(values) for name, values in augmentation.items()}

# %% [markdown]
# ## The answer in one figure

# %%
_, ((against_size, depth), (start, with_large)) = plt.subplots(2, 2, figsize=(11, 8))
BAND = f"mean ± standard deviation of {len(lab.SEEDS)} seeds"


def draw_costs(ax):
    """The columns of table 2 of the paper: a line for the precise ones, points for the others."""
    number = len(SIZES)
    for shift, color, group in zip((-0.08, 0.08), (lab.BLUE, lab.ORANGE), GROUPS):
        values = costs[group]
        lab.draw(ax, range(number), values[:, :number], color=color, label=f"trained in groups of {group}", marker="s")
        others = np.arange(number, len(COLUMNS))
        mean, spread = values[:, others].mean(0), values[:, others].std(0)
        ax.errorbar(others + shift, mean, spread, color=color, fmt="D", markersize=5, capsize=3)
    ax.axhline(0, color=lab.GREY, linewidth=1)
    ax.set_xticks(range(len(COLUMNS)), [name.replace(" ", "\n") for name in COLUMNS])
    ax.set(
        title=f"Batch size of the estimate: test error\n(lines: precise; {BAND})",
        xlabel="images in a batch of the estimate, and other statistics",
        ylabel="points above all images as one batch",
    )
    ax.legend()


def draw_depth(ax, group):
    """The variance of each layer, a line for each batch size."""
    number = np.arange(1, 1 + ratios[group].shape[-1])
    for name, color, label in (
        ("2", lab.ORANGE, "precise, batches of 2"),
        ("4", lab.BLUE, "precise, batches of 4"),
        ("10", lab.GREEN, "precise, batches of 10"),
        (f"running {MOMENTA[0]}", lab.GREY, f"running average, momentum {MOMENTA[0]}"),
    ):
        lab.draw(ax, number, ratios[group][:, COLUMNS.index(name)], color=color, label=label, marker=".")
    ax.axhline(1, color="black", linewidth=1, label="exact, by definition")
    ax.set_xticks(number[:: 1 + len(number) // 12])
    ax.set(
        title=f"Trained in groups of {group}: variance of each layer\n({BAND})",
        xlabel="normalization layer, from the input to the output",
        ylabel="variance / variance of exact statistics",
    )
    ax.legend()


def draw_curves(ax, x, values, **settings):
    """Running averages and precise statistics while a network trains."""
    for i, (label, color, marker) in enumerate(
        (
            (f"running average, momentum {MOMENTA[0]}", lab.ORANGE, "o"),
            (f"running average, momentum {MOMENTA[1]}", lab.GREY, "^"),
            ("precise, batches of 100", lab.BLUE, "s"),
        )
    ):
        lab.draw(ax, x, values[..., i], color=color, label=label, marker=marker)
    ax.set(ylabel="test error (%)", ylim=(0, 100), **settings)
    ax.legend()


draw_costs(against_size)
draw_depth(depth, GROUPS[0])
parts = np.array(moments) / steps
draw_curves(
    start,
    parts,
    early,
    title=f"Early training, SGD batches of {BATCH_SIZE}\n({BAND})",
    xlabel="epochs so far",
    xscale="log",
)
start.set_xticks(parts, [f"{part:.2g}" for part in parts])
start.minorticks_off()
draw_curves(
    with_large,
    range(1, 1 + LARGE_EPOCHS),
    large,
    title=f"SGD batches of {LARGE}, {size // LARGE} steps an epoch\n({BAND})",
    xlabel="epochs so far",
    xticks=range(1, 1 + LARGE_EPOCHS),
)
plt.show()

# %% [markdown]
# ## In numbers
#
# Test error in percent, in the shape of table 2 of Wu & Johnson; mean ± standard deviation over the seeds. The number
# beside `precise` and `exact` is that of images in a batch of the estimate, beside `running` the momentum.

# %%
rows = [
    f"| groups of {group} | " + " | ".join(lab.over_seeds(column) for column in errors[group].T) + " |"
    for group in GROUPS
]
header = [f"precise, {name}" for name in COLUMNS[: len(SIZES)]] + [*COLUMNS[len(SIZES) :]]
Markdown(f"| trained in | {' | '.join(header)} |\n|---|{'---:|' * len(header)}\n" + "\n".join(rows))


# %%
def judged(points):
    """What a change of the error amounts to, beside the spread of the seeds."""
    mean, spread = np.mean(points), np.std(points)
    if not np.any(points):
        return "costs nothing (0 for every seed)"
    if abs(mean) <= spread:
        return f"costs nothing beyond the spread of the seeds ({lab.over_seeds(points, '+.2f')} points)"
    return f"{'costs' if mean > 0 else 'gains'} {abs(mean):.2f} ± {spread:.2f} points"


def cost(group, column):
    return judged(costs[group][:, COLUMNS.index(column)])


def last_variance(group, column):
    return lab.over_seeds(ratios[group][:, COLUMNS.index(column), -1], ".3f")


def curve_at(values, position):
    *running, precise = (lab.over_seeds(values[:, position, i]) for i in range(len(MOMENTA) + 1))
    names = [f"{value} % with the running average of momentum {m}" for m, value in zip(MOMENTA, running)]
    return ", ".join(names) + f", {precise} % with precise statistics"


lab.say(
    *(
        f"Trained in groups of {group}, against the whole sample as one batch: precise with batches of 2 "
        f"{cost(group, '2')}, of 4 {cost(group, '4')}, of 10 {cost(group, '10')}, of 100 {cost(group, '100')}; exact, "
        f"asked for with batches of 2, {cost(group, 'exact, 2')}; the running average of training "
        + ", ".join(f"with momentum {m} {cost(group, f'running {m}')}" for m in MOMENTA)
        + "."
        for group in GROUPS
    ),
    *(
        f"Trained in groups of {group}, the variance of the last layer is "
        + ", ".join(f"{last_variance(group, name)} with batches of {name}" for name in ("2", "4", "10", "100"))
        + f" of the exact one, and {last_variance(group, f'running {MOMENTA[0]}')} in the running average of momentum "
        f"{MOMENTA[0]}; the lowest of any layer with batches of 2 is "
        f"{ratios[group][:, 0].mean(0).min():.3f}, in layer {1 + ratios[group][:, 0].mean(0).argmin()} of "
        f"{ratios[group].shape[-1]}."
        for group in GROUPS
    ),
    *(f"After {parts[i]:.2g} epochs: {curve_at(early, i)}." for i in (0, -2, -1)),
    f"Trained with batches of {LARGE} for {LARGE_EPOCHS} epochs: {curve_at(large, -1)}.",
)

# %% [markdown]
# ## Depth once more, the number of samples, and augmentation

# %%
_, (depth, samples) = plt.subplots(1, 2, figsize=(11, 4))
draw_depth(depth, GROUPS[-1])
images = 100 * np.array(counts)
fewer = by_count - by_count[:, -1:]
lab.draw(samples, images, fewer, color=lab.BLUE, label="precise, batches of 100")
samples.axhline(0, color=lab.GREY, linewidth=1)
samples.set(
    title=f"Trained in groups of {GROUPS[0]}: number of images in the estimate\n({BAND})",
    xlabel="images in the estimate",
    ylabel=f"points of test error above {images[-1]} images",
    xscale="log",
)
samples.set_xticks(images, images)
samples.minorticks_off()
samples.legend()
plt.show()

# %%
lab.say(
    f"From {images[-1]} images the error is {lab.over_seeds(by_count[:, -1])} %. Against that, "
    + ", ".join(f"an estimate from {count} {judged(fewer[:, i])}" for i, count in enumerate(images[:-1]))
    + ".",
    "Trained on augmented images, the error is "
    f"{lab.over_seeds(augmentation['augmented'])} % with statistics of augmented images, "
    f"{lab.over_seeds(augmentation['plain'])} % with those of plain ones, and "
    f"{lab.over_seeds(augmentation['running'])} % with the running average of momentum {MOMENTA[0]}; to leave "
    f"augmentation out of the estimate {judged(augmentation['plain'] - augmentation['augmented'])}.",
)

# %%
lab.keep(
    "4_estimating_statistics",
    columns=COLUMNS,
    sample=SAMPLE,
    errors={str(group): values for group, values in errors.items()},
    variance_ratios={str(group): np.round(values, 4) for group, values in ratios.items()},
    early={"epochs": parts, "statistics": (*map(str, MOMENTA), "precise"), "errors": early},
    large={"batch_size": LARGE, "statistics": (*map(str, MOMENTA), "precise"), "errors": large},
    number_of_images={"images": images, "errors": by_count},
    trained_on_augmented=augmentation,
)

# %% [markdown]
# A change is one of the same weights, and is called a cost or a gain where its mean over the seeds is more than one
# standard deviation. A layer on a shortcut is counted after the branch beside it: in the ResNet-20 these are the layers
# 10 and 17, above which are fewer others.
#
# ## What follows
#
# - Estimate with the weights frozen. Early in training, and with large batches, a running average belongs to weights
#   that are gone, or still to what it began with. Where the learning rate has decayed and steps were many, it is as
#   good.
# - Estimate in batches of 100, or with `method="exact"`, whose result is the same for every batch size: that is for
#   whoever has memory for two images only.
# - A running average that was kept in training has the variance of the groups of training in it, since the layers above
#   normalized by them.
#
# ## Against the literature
#
# Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3: ResNet-50 on ImageNet. Their table 2 has, for a
# training in groups of 32 and estimates in batches of 2, 10, 100 and all, errors of 28.8, 24.0, 23.5 and 23.5 %, and
# 23.7 % with the running average; for a training in groups of 2 it has 34.4, 32.3, 32.0 and 32.0 %, and 35.5 %. To keep
# the augmentation of training in the estimate gives 23.4 % error there, and to leave it out 23.8 % (table 4); 10^3 to
# 10^4 samples suffice. That exact statistics gain no accuracy over precise ones of larger batches, they say, too (end
# of section 3.2 and appendix A.3). Their comparison during training has batches of 8192, where the running average is
# erratic early on.
#
# The network here has 21 layers to normalize instead of 53, an eighth of the width, six epochs and images that are
# fourteen times smaller: look for the shape of their tables here, not for their size.
