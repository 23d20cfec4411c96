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
# # Several hospitals: whose statistics for the next one?
#
# A network learns from three hospitals whether a patient has heart disease, and is used at a fourth, where nobody has
# labels. Hospitals measure in their own ways, and have their own patients. Statistics of each hospital take away both:
# how it measures, and who comes there. The first is wanted. The second tells about the disease.
#
# | name | normalized in training by | at the fourth hospital by |
# |---|---|---|
# | MLP, no normalization | nothing | nothing |
# | shared | the batch of all three | the population of the three |
# | shared, own | the batch of all three | its own population, without labels |
# | by hospital, pooled | each hospital's part of the batch | the population of the three, pooled |
# | by hospital, own | each hospital's part of the batch | its own population, without labels |
# | by hospital, blended | each hospital's part of the batch | its own, with the three's as a prior of 100 patients |
# | affine by hospital, own | each part, with a scale and bias for each | its own; the three's mean scale and bias |
#
# Three ways without batch normalization are beside them: logistic regression, with attributes standardized by the
# numbers of the three hospitals, or by those of each hospital for itself; and as a mark of what can be reached at all,
# logistic regression on labelled patients of the fourth hospital, each fifth of them predicted from the other four.
#
# The command that repeats a full run: `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k 6_four"`. It reads
# `DIR/heart/heart.csv`: the four `processed.*.data` files of the heart disease data of UCI (Janosi, Steinbrunn,
# Pfisterer and Detrano 1988; CC BY 4.0) end to end, with a row of names, a column `site`, and an empty cell where a
# value is missing. Without FULL=1 the notebook shows the mechanics only, on other data: scikit-learn's breast tumours,
# dealt to four made-up sites, which differ in how they measure and not in whom they see. From them nothing follows for
# hospitals.

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import lab
import matplotlib.pyplot as plt
import numpy as np
import optax
from lab import data, training
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import flaxbn

EPOCHS, BATCH_SIZE, PRIOR, RESAMPLES = (40 if lab.FULL else 10), 128, 100, 1_000
HEART = ["age", "sex", "cp", "trestbps", "restecg", "thalach", "exang", "oldpeak"]  # what all hospitals record


def hospitals():
    """Attributes, NaN where missing, labels, and the names of the attributes; a blood pressure of 0 is missing, too."""
    tables = data.load_sites(lab.data_folder("heart") / "heart.csv", HEART, label="num")
    unknown = [(np.arange(len(HEART)) == HEART.index("trestbps")) & (table.values == 0) for table in tables.values()]
    values = [np.where(gone, np.nan, table.values) for gone, table in zip(unknown, tables.values())]
    return {site: data.Table(x, np.int32(table.labels > 0)) for x, (site, table) in zip(values, tables.items())}, HEART


def stand_in():
    """Not hospitals: tumours dealt in turn to four sites. Site k measures 1 + k / 4 times what it should, plus k / 2
    standard deviations; the last one lacks each of the first four attributes of a quarter of its rows."""
    tumours = load_breast_cancer()
    values, labels = np.float32(tumours.data[:, :8]), np.int32(tumours.target == 0)
    missing = np.random.default_rng(0).random(values.shape) < np.where(np.arange(8) < 4, 0.25, 0)
    sites = {}
    for k in range(4):
        x = values[k::4] * (1 + k / 4) + k / 2 * values.std(0)
        sites[f"site {k}"] = data.Table(np.where(missing[k::4] & (k == 3), np.nan, x), labels[k::4])
    return sites, [str(name) for name in tumours.feature_names[:8]]


by_site, attributes = hospitals() if lab.FULL else stand_in()
names = [*by_site]
values, labels = (np.concatenate(parts) for parts in zip(*by_site.values()))
site = np.repeat(np.arange(len(names), dtype=np.int32), [len(table.labels) for table in by_site.values()])
lab.say(
    f"This run: {'four hospitals' if lab.FULL else 'tumours at four made-up sites, for the mechanics only'}; "
    f"{len(lab.SEEDS)} seeds; on {jax.devices()[0].device_kind}.",
    *(
        f"{name}: {len(table.labels)} patients, {table.labels.sum()} with the disease, "
        f"{100 * np.isnan(table.values).mean():.1f} % of the values missing"
        for name, table in by_site.items()
    ),
)

# %% [markdown]
# ## The network
#
# Two hidden layers of 16 units. The first layer is a batch normalization of the attributes, which a mask tells what was
# recorded: a missing value counts for no mean and no variance, and is 0 afterwards, the mean of its hospital (or of
# all, with shared statistics). Where only some rows of an attribute are missing no row is lost.
#
# The layers have four domains, one for each hospital; that of the fourth sees nothing in training. Categories (`cp`,
# `restecg`) are numbers as they were recorded, for the network and for logistic regression. Epochs, rate and size were
# chosen beforehand, and no fourth hospital had a say in them.


# %%
class Network(nn.Module):
    """Two hidden layers with `norm`, and one before them, for attributes of which some are missing."""

    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, values, domain=None, *, train=False, update=None):
        def normalized(x, **options):
            if self.norm is None:
                return x
            norm = self.norm(use_running_average=not train)
            return norm(x, update_running_average=update, **({} if domain is None else {"domain": domain}), **options)

        recorded = ~jnp.isnan(values)
        x = jnp.where(recorded, normalized(jnp.where(recorded, values, 0), mask=recorded), 0)
        for _ in range(2):
            x = nn.relu(normalized(nn.Dense(16)(x)))
        return nn.Dense(2)(x)


domains = functools.partial(flaxbn.BatchNorm, num_domains=len(names))
without, shared = Network(None), Network(flaxbn.BatchNorm)
apart = {affine: Network(functools.partial(domains, domain_affine=affine)) for affine in (False, True)}
# A scale for each domain has two axes, and is no kernel for all that.
optimizer = optax.adamw(3e-3, weight_decay=1e-2, mask=flaxbn.weight_decay_mask)


def standardized(of):
    """The attributes in units of the rows `of`, NaN where missing."""
    return np.float32((values - np.nanmean(values[of], 0)) / np.nanstd(values[of], 0))


def train(model, table, rows, seed):
    """The variables after training on some rows; a network with domains is told where each is from."""
    told = model in apart.values()
    network = {"model": model, "optimizer": optimizer}
    split = data.Split(table, labels)
    state = training.initial_state(jax.random.key(seed), table[:2], site[:2] if told else None, **network)
    for index in lab.epochs(EPOCHS, len(rows), BATCH_SIZE, seed):
        index = rows[index]
        state, _, _ = training.train_step(state, split, index, site[index] if told else None, **network, update=True)
    return state.variables


# %% [markdown]
# ## Statistics for the fourth hospital
#
# After training the statistics are estimated with frozen weights, from all patients at once. `site_moments` has those
# of all four hospitals from one pass of the network with domains, and no label is read. What predicts is the plain
# network with the parameters that were trained. Own statistics come from the same patients who are predicted.


# %%
def call(module, batch):
    return module(batch["values"], batch.get("domain"))


def weight(batch):
    return batch["weight"]


EVERYONE = {"values": values, "domain": site}


def population(variables, rows):
    """Shared statistics, from the patients of `rows` alone."""
    batch = {"values": values, "weight": np.float32(rows)}
    options = {"call": call, "batch_size": len(values), "sample_weight": weight}
    return flaxbn.estimate_population_stats(shared, variables, batch, **options)


def site_moments(model, variables):
    """The moments of each hospital, each normalized by itself."""
    moments = flaxbn.population_moments(model, variables, EVERYONE, call=call, batch_size=len(values))
    return flaxbn.domains.unstack(moments, names)


def of_nobody(params, rows):
    """The parameters of a plain network: of scales and biases with domains the mean over those that were trained."""
    mean = functools.partial(np.mean, axis=0)
    return jax.tree.map_with_path(
        lambda path, leaf: mean(leaf[rows]) if leaf.ndim == 2 and path[-1].key in ("scale", "bias") else leaf, params
    )


@functools.partial(jax.jit, static_argnames="model")
def predict(variables, table, *, model=shared):
    """The probability of the disease for everyone."""
    return jax.nn.softmax(model.apply(variables, table))[:, 1]


def networks_for(fourth, seed):
    """By name the probabilities at the fourth hospital, of networks that were trained on the other three."""
    number = names.index(fourth)
    inside, others = site == number, [i for i in range(len(names)) if i != number]
    rows, table = np.flatnonzero(~inside), standardized(~inside)
    found = {"MLP, no normalization": predict(train(without, table, rows, seed), table, model=without)}

    variables = train(shared, values, rows, seed)
    for name, of in (("shared", ~inside), ("shared, own", inside)):
        found[name] = predict({**variables, "batch_stats": population(variables, of)}, values)
    template = variables["batch_stats"]

    variables = train(apart[False], values, rows, seed)
    moments = site_moments(apart[False], variables)
    three = flaxbn.to_batch_stats(flaxbn.domains.pool({names[i]: moments[names[i]] for i in others}), template)
    own = flaxbn.to_batch_stats(moments[fourth], template)
    blended = flaxbn.blend(three, moments[fourth], prior=PRIOR, samples=int(inside.sum()))
    for name, stats in (("pooled", three), ("own", own), ("blended", blended)):
        found[f"by hospital, {name}"] = predict({"params": variables["params"], "batch_stats": stats}, values)

    variables = train(apart[True], values, rows, seed)
    params = of_nobody(jax.device_get(variables["params"]), others)
    own = flaxbn.to_batch_stats(site_moments(apart[False], {**variables, "params": params})[fourth], template)
    found["affine by hospital, own"] = predict({"params": params, "batch_stats": own}, values)
    return {name: np.asarray(probability)[inside] for name, probability in found.items()}


# %%
def logistic(fourth):
    """The same for the ways without batch normalization, which no seed decides. A missing value is the mean."""
    inside = site == names.index(fourth)
    model = LogisticRegression(max_iter=1_000)

    def fitted(table):
        return model.fit(table[~inside], labels[~inside]).predict_proba(table[inside])[:, 1]

    each = np.concatenate([standardized(site == number)[site == number] for number in range(len(names))])
    found = {
        "logistic regression": fitted(np.nan_to_num(standardized(~inside))),
        "logistic regression, by hospital": fitted(np.nan_to_num(each)),
        "learned there, with labels": cross_val_predict(
            model, np.nan_to_num(each)[inside], labels[inside], cv=5, method="predict_proba"
        )[:, 1],
    }
    return {name: probability[None] for name, probability in found.items()}


predicted = {}  # [hospital][way] the probabilities, [seeds, patients]
for fourth in names:
    seeds = [networks_for(fourth, seed) for seed in lab.SEEDS]
    predicted[fourth] = logistic(fourth) | {way: np.stack([found[way] for found in seeds]) for way in seeds[0]}
ways = [*predicted[names[0]]]

# %% [markdown]
# ## How good, and how sure?
#
# - **AUC**: how often a patient with the disease gets a higher probability than one without. It asks for the order
#   only.
# - **Brier score**: the mean squared distance of the probability from what was so; lower is better.
# - **Bias**: the mean probability minus the share of the patients who have the disease (calibration in the large).
# - **Calibration error**: in ten bins of the probability, the mean distance of these two (expected calibration error).
#   With few patients it is above 0 for a perfect model, too.
# - **Brier score, share known**: that after all log odds were moved alike, so that the bias is 0. It takes one number
#   from the fourth hospital, how many of its patients have the disease.
#
# An interval holds the middle 95 % of 1 000 resamples of the patients, each predicted by one of the seeds at random.
# Two ways are compared on the same resamples.


# %%
def auc(probabilities, truth, counts):
    """[seeds, resamples]; NaN where a resample has no patient of one kind."""
    ill, well = probabilities[:, truth == 1, None], probabilities[:, None, truth == 0]
    order = (ill > well) + 0.5 * (ill == well)
    ill, well = counts[:, truth == 1], counts[:, truth == 0]
    pairs = ill.sum(1) * well.sum(1)
    return np.einsum("ri,siw,rw->sr", ill, order, well, optimize=True) / np.where(pairs == 0, np.nan, pairs)


def brier(probabilities, truth, counts):
    return (probabilities - truth) ** 2 @ counts.T / counts.sum(1)


def bias(probabilities, truth, counts):
    return (probabilities - truth) @ counts.T / counts.sum(1)


def calibration_error(probabilities, truth, counts):
    bins = np.minimum((10 * probabilities).astype(int), 9)
    parts = [np.abs(np.where(bins == k, probabilities - truth, 0) @ counts.T) for k in range(10)]
    return sum(parts) / counts.sum(1)


def share_known(probabilities, truth):
    """The probabilities, with one shift of all log odds for each seed, so that their mean is the share of the ill."""
    odds = np.log(probabilities) - np.log1p(-probabilities)
    low, high = np.full((len(odds), 1), -20.0), np.full((len(odds), 1), 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        above = (1 / (1 + np.exp(-odds - middle))).mean(1, keepdims=True) > truth.mean()
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return 1 / (1 + np.exp(-odds - middle))


def brier_share_known(probabilities, truth, counts):
    return brier(share_known(probabilities, truth), truth, counts)


MEASURES = {"AUC": auc, "Brier score": brier, "bias": bias, "calibration error": calibration_error}
MEASURES["Brier score, share known"] = brier_share_known
rng = np.random.default_rng(0)
at_seeds = {}  # [measure][hospital][way], [seeds]
resampled = {}  # the same, [resamples]
for fourth in names:
    truth = by_site[fourth].labels
    size = len(truth)
    counts = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float)
    drawn = rng.integers(len(lab.SEEDS), size=RESAMPLES)
    for measure, of in MEASURES.items():
        for way, probabilities in predicted[fourth].items():
            probabilities = probabilities.astype(float)
            whole = of(probabilities, truth, np.ones((1, size)))[:, 0]
            many = of(probabilities, truth, counts)[drawn % len(probabilities), np.arange(RESAMPLES)]
            at_seeds.setdefault(measure, {}).setdefault(fourth, {})[way] = whole
            resampled.setdefault(measure, {}).setdefault(fourth, {})[way] = many


def interval(values):
    """The middle 95 %."""
    return np.nanpercentile(values, (2.5, 97.5))


# %% [markdown]
# ## The answer in one figure

# %%
COLORS = [lab.ORANGE if "shared" in way else lab.BLUE if way.startswith(("by", "affine")) else lab.GREY for way in ways]
LABELS = {
    "learned there, with labels": "logistic regression, learned there",
    "shared": "MLP: all three → all three",
    "shared, own": "MLP: all three → its own",
    "by hospital, pooled": "MLP: each its own → all three",
    "by hospital, own": "MLP: each its own → its own",
    "by hospital, blended": "MLP: each its own → blended",
    "affine by hospital, own": "MLP, affine: each its own → its own",
}
XLABELS = {"AUC": "AUC (higher is better)", "Brier score": "Brier score (lower is better)"}
XLABELS["bias"] = "bias: mean probability\nminus share of the ill"
figure, axes = plt.subplots(3, 4, figsize=(13, 10), sharey=True, sharex="row")
for row, (measure, xlabel) in zip(axes, XLABELS.items()):
    for ax, fourth in zip(row, names):
        for y, (way, color) in enumerate(zip(ways, COLORS)):
            low, high = interval(resampled[measure][fourth][way])
            ax.plot((low, high), (y, y), color=color, linewidth=2)
            ax.plot(at_seeds[measure][fourth][way].mean(), y, "o", color=color)
        ax.set_xlabel(xlabel)
        if measure != "Brier score":
            ax.axvline(0 if measure == "bias" else 0.5, color="black", linewidth=0.8, linestyle=":")
    row[0].set_yticks(range(len(ways)), [LABELS.get(way, way) for way in ways])
    row[0].set_ylabel("statistics in training → at the test")
    row[0].set_ylim(len(ways) - 0.5, -0.5)
for ax, fourth in zip(axes[0], names):
    truth = by_site[fourth].labels
    ax.set_title(f"tested at {fourth}\n({len(truth)} patients, {truth.sum()} ill)")
figure.suptitle(
    f"Learned at the other three. Point: mean over {len(lab.SEEDS)} seeds. "
    f"Line: 95 % of {RESAMPLES} resamples of patients and seeds",
    fontsize="medium",
)
plt.show()

# %% [markdown]
# ## In numbers


# %%
def table(measure):
    """A row for each way, a column for each hospital."""
    lines = [f"| {measure} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for way in ways:
        cells = [
            "{:.2f} ({:.2f} to {:.2f})".format(
                at_seeds[measure][fourth][way].mean(), *interval(resampled[measure][fourth][way])
            )
            for fourth in names
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


lab.Markdown("\n\n".join(map(table, MEASURES)))


# %% [markdown]
# ### One way against another
#
# Differences on the same resamples, with the interval of 95 %; **bold** where it does not hold 0. There are many of
# them, so that one or two in bold are no wonder.


# %%
def difference(measure, end, start, fourth):
    """What `end` has over `start`, and its interval."""
    mean = at_seeds[measure][fourth][end].mean() - at_seeds[measure][fourth][start].mean()
    return mean, *interval(resampled[measure][fourth][end] - resampled[measure][fourth][start])


def differences(measure, end, start):
    """A row: the difference at each hospital."""
    cells = []
    for fourth in names:
        mean, low, high = difference(measure, end, start, fourth)
        text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        cells.append(f"**{text}**" if low > 0 or high < 0 else text)
    return f"| {measure} | {end} minus {start} | {' | '.join(cells)} |"


PAIRS = {
    "its own statistics, by hospital": ("by hospital, own", "by hospital, pooled"),
    "its own statistics, shared": ("shared, own", "shared"),
    "blended": ("by hospital, blended", "by hospital, own"),
    "by hospital in training": ("by hospital, pooled", "shared"),
    "affine": ("affine by hospital, own", "by hospital, own"),
    "no normalization": ("MLP, no normalization", "shared"),
    "no network": ("logistic regression", "by hospital, pooled"),
    "a logistic regression by hospital": ("logistic regression, by hospital", "logistic regression"),
}
COMPARED = ("AUC", "Brier score", "Brier score, share known")
lab.Markdown(
    "\n".join(
        [f"| measure | difference | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
        + [differences(measure, *pair) for measure in COMPARED for pair in PAIRS.values()]
    )
)

# %% [markdown]
# ### How the hospitals differ

# %%
everyone = np.nanmean(values, 0), np.nanstd(values, 0)
shift = np.array([(np.nanmean(table.values, 0) - everyone[0]) / everyone[1] for table in by_site.values()])
missing = 100 * np.array([np.isnan(table.values).mean(0) for table in by_site.values()])
_, ax = plt.subplots(figsize=(9, 2.6))
image = ax.imshow(shift, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
for (row, column), share in np.ndenumerate(missing):
    text = f"{shift[row, column]:+.1f}" + (f"\n{share:.0f} % missing" if share >= 1 else "")
    ax.text(column, row, text, ha="center", va="center", fontsize="small")
ax.set_xticks(range(len(attributes)), [name.replace("mean ", "") for name in attributes])
ax.set_yticks(range(len(names)), names)
ax.set_title("How the sites differ: mean of each attribute, from that of all patients")
ax.grid(visible=False)
plt.colorbar(image, ax=ax, label="standard deviations")
plt.show()

# %% [markdown]
# ## What a practitioner should conclude


# %%
def verdict(measure, pair, *, lower_is_better):
    """Where the first of a pair is clearly worse, and where clearly better."""
    found = {"worse": [], "better": []}
    for fourth in names:
        mean, low, high = difference(measure, *pair, fourth)
        if low > 0 or high < 0:
            found["worse" if (mean > 0) == lower_is_better else "better"].append(fourth)
    return " and ".join(f"clearly {word} at {', '.join(at) or 'none'}" for word, at in found.items())


def extremes(measure, pair):
    """The least and the largest difference."""
    means = [difference(measure, *pair, fourth)[0] for fourth in names]
    return f"{min(means):+.2f} to {max(means):+.2f}"


networks = [way for way in ways if "logistic" not in way and "labels" not in way]
shares = [table.labels.mean() for table in by_site.values()]
few = min(names, key=lambda name: (by_site[name].labels == 0).sum())
own, affine, regression = (PAIRS[name] for name in ("its own statistics, by hospital", "affine", "no network"))
blended = "by hospital, blended", "by hospital, pooled"
spread = {
    measure: max(np.ptp([at_seeds[measure][fourth][way].mean() for way in networks]) for fourth in names)
    for measure in COMPARED
}
lowest, highest = interval(resampled["AUC"][few]["by hospital, own"])
conclusions = [
    "**Do not expect a better order of the patients from the new hospital's own statistics**: against the pooled ones "
    f"the AUC is {verdict('AUC', own, lower_is_better=False)} ({extremes('AUC', own)}).",
    "**Do not trust the probabilities after re-estimating without labels where the share of the ill may differ** (here "
    f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %): what tells the hospitals' patients apart is normalized "
    f"away, and the Brier score is {verdict('Brier score', own, lower_is_better=True)} "
    f"({extremes('Brier score', own)}); blending is between the two ({extremes('Brier score', blended)}), and a scale "
    "and bias for each hospital, averaged for a new one, is, compared with shared ones, "
    f"{verdict('Brier score', affine, lower_is_better=True)}.",
    "**Find out the share of the ill, from some labelled patients, before any probability is used**: with the three "
    "hospitals' statistics the bias is "
    + ", ".join(f"{at_seeds['bias'][fourth]['by hospital, pooled'].mean():+.2f} at {fourth}" for fourth in names)
    + "; once the log odds are moved to the known share, the networks' Brier scores at a hospital are within "
    f"{spread['Brier score, share known']:.2f} of each other, instead of {spread['Brier score']:.2f}.",
    "**Begin with logistic regression**: with attributes standardized by the three hospitals its Brier score is "
    f"{verdict('Brier score', regression, lower_is_better=True)}, and its AUC "
    f"{verdict('AUC', regression, lower_is_better=False)}, compared with the network by hospital, pooled.",
    f"**What cannot be told**: which way is the best at {few}, where {(by_site[few].labels == 0).sum()} patients are "
    f"without the disease (AUC {lowest:.2f} to {highest:.2f}); what holds at a fifth hospital, of which four are four "
    "examples; what becomes of hospitals that differ in how they measure only, for which own statistics are meant; and "
    "whether a value is missing for a reason that tells about the disease.",
]
made_up = "The sites of this run are made up: it shows the mechanics, and nothing follows for hospitals."
lab.say(*(conclusions if lab.FULL else [made_up]))

# %%
lab.keep(
    "6_four_hospitals",
    hospitals={
        name: {"patients": len(table.labels), "ill": int(table.labels.sum())} for name, table in by_site.items()
    },
    at_seeds=at_seeds,
    interval=jax.tree.map(interval, resampled),
    differences={
        measure: {
            " - ".join(pair): {fourth: difference(measure, *pair, fourth) for fourth in names}
            for pair in PAIRS.values()
        }
        for measure in COMPARED
    },
)
