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
# # What is a diagnosis worth?
#
# `flaxbn.diagnostics.diagnose` names the trap that a model is in. Here seven traps are planted on purpose, each at
# three strengths, and it is counted what it names; also where nothing was planted. Beside each stands the harm, the
# points of test error that the trap costs: where one goes unnamed that costs nothing, nothing is lost.
#
# | planted | how | strength | test error is compared with that of |
# |---|---|---|---|
# | lagging average | a running average kept from the first step on | its momentum | the same weights, estimated |
# | never estimated | statistics as `init` leaves them | in how many layers | the same weights, estimated |
# | training mode | `call` runs the model in training mode | the batch at the test | the same weights, in inference |
# | batches too small | trained in groups (ghost batches) | examples in a group | the same training, batches of 64 |
# | sorted batches | a part of each batch is of one class | that part | the same training, random batches |
# | mixed domains | images and paler ones in turn, one average | how pale | the same weights, statistics of each |
# | inert ramp | `BatchRenorm`, whose ramp begins later | the batches | the same training, a ramp that opens |
#
# A full run takes a narrow ResNet-20 on CIFAR-10, by the command `make notebooks FULL=1 DATA_DIR=DIR ARGS="-k
# 7_diagnosis"`; the small one two convolutions on digits, and of each trap the last strength only.

# %%
# Runs in a copy of the repository, in this folder or the one above, after: pip install '.[scripts,notebooks]'
import sys

sys.path.append("notebooks")  # where lab.py is, seen from above

# %%
import functools
import os
import tempfile
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # many programs, each of which runs for a short time

import jax
import jax.numpy as jnp
import lab
import matplotlib.pyplot as plt
import numpy as np
import optax
import training

import flaxbn
from flaxbn import diagnostics

if not jax.config.jax_compilation_cache_dir:  # a diagnosis compiles anew: the same programs in each
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

data = lab.load("cifar10")
BATCH, LOOKED_AT = 64, 48 if lab.FULL else 16  # examples in a batch, batches that a diagnosis looks at
COMMON, LAST = (60, 30) if lab.TRIAL else (400, 100) if lab.FULL else (60, 20)  # steps before a trap, and with it
BEGIN = 5_000  # the step at which the ramp begins, as in the paper
STRENGTHS = slice(None) if lab.FULL else slice(2, 3)
PARTS = (0.25, 0.5, 1)  # of a sorted batch
RAMPS = ((0, "batches at random"), (0.5, "half of one class"), (1, "all of one class"))
RATE = 3e-3 if lab.FULL else 1e-2
lab.scale("cifar10")


# %% [markdown]
# ## The networks
#
# For each seed one network is trained for some steps with batches of 64 and a constant learning rate of Adam. From
# there it goes on in several ways, while the learning rate decays to 0: with random batches, with small groups, with
# sorted batches, with two domains, with batch renormalization. Batch normalization does not read the running average in
# training, so that one training serves every momentum.


# %%
def network(norm):
    return lab.resnet(norm) if lab.FULL else lab.networks.CNN(10, norm, lab.LAYERS[:2])


def ramp(start, end):
    """A bound that goes from that of batch normalization to `end` in half of the last steps, from step 5 000 on."""
    return optax.linear_schedule(start, end, LAST // 2, BEGIN)


MODEL = network(flaxbn.BatchNorm)
OF_EACH_BATCH = network(functools.partial(flaxbn.BatchNorm, momentum=0.0))  # its statistics are those of the last batch
OF_EACH_DOMAIN = network(functools.partial(flaxbn.BatchNorm, num_domains=2))
RENORM = network(functools.partial(flaxbn.BatchRenorm, momentum=0.9, r_max=ramp(1, 3), d_max=ramp(0, 5)))
GROUPS = {
    n: network(functools.partial(flaxbn.BatchNorm, momentum=0.0, virtual_batch_size=n)) for n in (16, 4, 2)[STRENGTHS]
}
SCHEDULE = optax.join_schedules([optax.constant_schedule(RATE), optax.cosine_decay_schedule(RATE, LAST)], [COMMON])
OPTIMIZER = optax.adam(SCHEDULE)
MOMENTA = (0.9, 0.95, 0.99, 0.999)


@jax.jit
def averaged(averages, batch_stats):
    """The running average of each momentum after a further batch."""

    def step(momentum):
        return jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * b, averages[momentum], batch_stats)

    return {momentum: step(momentum) for momentum in MOMENTA}


def common(seed):
    """The state from which all go on, and the running averages so far."""
    averages = dict.fromkeys(MOMENTA, MODEL.init(jax.random.key(seed), data.train.images[:2])["batch_stats"])
    batches = random_batches(COMMON, (seed, 0))
    for state in lab.train(OF_EACH_BATCH, batches, seed=seed, optimizer=OPTIMIZER, split=data.train):
        averages = averaged(averages, state.batch_stats)
    return state, averages


def steps_from(model, state, batches, split=data.train):
    """The states after each further step."""
    for index in batches:
        network = {"model": model, "optimizer": OPTIMIZER}
        state, _, _ = training.train_step(state, split, index, None, None, **network, update=True)
        yield state


def renamed(tree, old="BatchNorm", new="BatchRenorm"):
    """Weights, statistics or the state of an optimizer with the layers' names in another model."""

    def rename(node):
        return {k.replace(old, new): v for k, v in node.items()} if isinstance(node, dict) else node

    return jax.tree.map(rename, tree, is_leaf=lambda node: isinstance(node, dict))


def counted(batch_stats, steps):
    """Statistics of batch normalization as those of batch renormalization after so many updates."""
    return {k: {**stats, "steps": jnp.float32(steps)} for k, stats in renamed(batch_stats).items()}


# %% [markdown]
# ## The batches
#
# All are indices of the training set. Of the two domains one is the images with even numbers, as they are, and the
# other those with odd numbers, which are made paler: a part of the way to white.

# %%
LABELS = np.asarray(data.train.labels)
SIZE = len(LABELS)


def random_batches(number, seed, members=SIZE):
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(members, BATCH, replace=False) for _ in range(number)])


def sorted_batches(part, number, seed):
    """Batches of which a part is of one class, another one in each, and the rest drawn at random."""
    rng, batches = np.random.default_rng(seed), random_batches(number, seed)
    same = round(part * BATCH)
    for batch in batches:
        label = rng.integers(10)
        batch[:same] = rng.choice(np.flatnonzero(label == LABELS), same)
    return batches


def in_turn(number, seed):
    """Batches of one domain each."""
    of_each = [random_batches(number, (seed, domain), np.arange(domain, SIZE, 2)) for domain in (0, 1)]
    return np.stack(of_each, 1).reshape(-1, BATCH)[:number]


@functools.cache
def with_paler(part, pale):
    """A part of the data, every second image paler."""
    split = getattr(data, part)
    images = np.array(split.images, np.float32)
    images[1::2] += pale * (255 - images[1::2])
    return split._replace(images=jax.device_put(np.round(images).astype(np.uint8)))


# %% [markdown]
# ## Planting
#
# But for the trap that is planted, the stored statistics are well estimated: from 4 096 images, in batches like those
# of training.

# %%
NOTHING = "nothing"


def inference(module, batch):
    return module(batch["images"])


def by_domain(module, batch):
    return module(batch["images"], batch["domain"])


def in_training(module, batch):
    return module(batch["images"], train=True, update=False)


def of_domain(batch):
    return batch["domain"]


def losses(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])


class Planted(NamedTuple):
    """A network with a trap, or with none, and what `diagnose` is given with it."""

    trap: str
    strength: str
    model: Any
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    batches: np.ndarray
    """Of training, as indices of `split`."""
    harm: float = 0.0
    """Points of test error lost."""
    size: int = BATCH
    """Examples that are normalized together."""
    split: Any = data.train
    call: Any = inference
    """How it is run."""
    domain: Any = None


SAMPLE = min(SIZE // BATCH * BATCH, 4096)


def estimated(state, split=data.train, model=MODEL, **sizes):
    images = split.images[:SAMPLE]
    return flaxbn.estimate_population_stats(model, state.variables, images, **{"batch_size": BATCH, **sizes})


def error(params, batch_stats, split=data.test):
    return lab.error(MODEL, {"params": params, "batch_stats": batch_stats}, split)


# %% [markdown]
# Traps of the stored statistics, and of the mode: the weights stay what they are.


# %%
def lagging(state, averages, right):
    for momentum in MOMENTA[1:][STRENGTHS]:
        harm = error(state.params, averages[momentum]) - error(state.params, right)
        yield "lagging average", f"momentum {momentum}", MODEL, state.params, averages[momentum], harm


def never_estimated(state, right):
    layers = sorted(right, key=lambda name: int(name.split("_")[-1]))
    initial = {k: {"mean": jnp.zeros_like(s["mean"]), "var": jnp.ones_like(s["var"])} for k, s in right.items()}
    for number in (1, len(layers) // 2, len(layers))[STRENGTHS]:
        stats = right | {name: initial[name] for name in layers[-number:]}
        harm = error(state.params, stats) - error(state.params, right)
        yield "never estimated", f"last {number} of {len(layers)} layers", MODEL, state.params, stats, harm


@functools.partial(jax.jit, static_argnames="size")
def error_in_batches(variables, split, *, size):
    """The error in percent where batches of a size are predicted in training mode."""
    groups = split.images[: len(split.labels) // size * size].reshape(-1, size, *split.images.shape[1:])
    predicted = jax.lax.map(lambda batch: MODEL.apply(variables, batch, train=True, update=False).argmax(-1), groups)
    return 100 * jnp.mean(predicted.ravel() != split.labels[: predicted.size])


def training_mode(state, right):
    for size in (BATCH, 16, 4)[STRENGTHS]:
        variables = {"params": state.params, "batch_stats": right}
        harm = float(error_in_batches(variables, data.test, size=size)) - error(state.params, right)
        yield "training mode", f"batches of {size}", MODEL, state.params, right, harm


# %% [markdown]
# Traps of the batches and of the ramp: these are trained in, for the last steps.


# %%
def small_groups(start, order, without):
    for size, model in GROUPS.items():
        state = lab.last(steps_from(model, start, order))
        stats = estimated(state, model=model, normalization_batch=size)
        yield "batches too small", f"groups of {size}", MODEL, state.params, stats, error(state.params, stats) - without


def domains(start, seed, order):
    """Two domains in turn, with the best statistics that they can share; then what is right for them."""
    looked = in_turn(LOOKED_AT, (seed, 2))
    halves = slice(0, None, 2), slice(1, None, 2)
    for pale in (0.1, 0.4, 0.8)[STRENGTHS]:
        split, test = (with_paler(part, pale) for part in ("train", "test"))
        state = lab.last(steps_from(OF_EACH_BATCH, start, in_turn(LAST, (seed, 3)), split))
        parts = [split.images[:SAMPLE][half] for half in halves]
        found = [flaxbn.population_moments(MODEL, state.variables, part, batch_size=BATCH) for part in parts]
        shared = flaxbn.to_batch_stats(flaxbn.merge(*found), state.batch_stats)
        each = [flaxbn.to_batch_stats(moments, state.batch_stats) for moments in found]
        tests = [type(test)(*(values[half] for values in test)) for half in halves]
        lost = [error(state.params, shared, one) - error(state.params, own, one) for own, one in zip(each, tests)]
        known = {"split": split, "domain": of_domain}
        strength = f"{100 * pale:.0f} % paler"
        yield Planted("mixed domains", strength, MODEL, state.params, shared, looked, np.mean(lost), **known)
    known |= {"call": by_domain}
    both = jax.tree.map(lambda *stats: jnp.stack(stats), *each)
    yield Planted(NOTHING, "statistics of each domain", OF_EACH_DOMAIN, state.params, both, looked, **known)
    state = lab.last(steps_from(OF_EACH_BATCH, start, order, split))
    known |= {"call": inference}
    mixed = random_batches(LOOKED_AT, (seed, 4))
    yield Planted(NOTHING, "both domains in a batch", MODEL, state.params, estimated(state, split), mixed, **known)


def ramps(start, orders, plain):
    """With a ramp that lies beyond the training, which is batch normalization; and with one that opens: steps count."""
    first = training.State(*map(renamed, start))
    first = first._replace(batch_stats=counted(estimated(start), BEGIN))
    for part, words in RAMPS[STRENGTHS]:
        order, looked = orders[part]
        state, right = plain[part]
        opened = lab.last(steps_from(RENORM, first, order))
        stats = estimated(opened, model=RENORM)
        params, as_plain = (renamed(tree, "BatchRenorm", "BatchNorm") for tree in (opened.params, stats))
        as_plain = {name: {"mean": s["mean"], "var": s["var"]} for name, s in as_plain.items()}
        harm = error(state.params, right) - error(params, as_plain)
        inert = counted(right, COMMON + LAST)
        yield Planted("inert ramp", words, RENORM, renamed(state.params), inert, looked, harm)
        if part == 0:
            yield Planted(NOTHING, "ramp that opens", RENORM, opened.params, stats, looked)


# %%
def plant(seed):
    """Every network of a seed."""
    start, averages = common(seed)
    orders = {
        part: [sorted_batches(part, number, (seed, kind)) for number, kind in ((LAST, 5), (LOOKED_AT, 6))]
        for part in (0, *PARTS[STRENGTHS])
    }
    plain = {}
    for part, (order, _) in orders.items():
        for state in steps_from(OF_EACH_BATCH, start, order):
            averages = averaged(averages, state.batch_stats) if part == 0 else averages
        plain[part] = state, estimated(state)
    (order, looked), (state, right) = orders[0], plain[0]
    without = error(state.params, right)
    yield Planted(NOTHING, "estimated", MODEL, state.params, right, looked)
    harm = error(state.params, averages[0.9]) - without
    yield Planted(NOTHING, "running average, momentum 0.9", MODEL, state.params, averages[0.9], looked, harm)
    for *planted, harm in (*lagging(state, averages, right), *never_estimated(state, right)):
        yield Planted(*planted, looked, harm)
    for *planted, harm in training_mode(state, right):
        yield Planted(*planted, looked, harm, call=in_training)
    for *planted, harm in small_groups(start, order, without):
        yield Planted(*planted, looked, harm, int(planted[1].split()[-1]))
    for part in PARTS[STRENGTHS]:
        wrong = error(plain[part][0].params, plain[part][1]) - without
        words = f"{100 * part:.0f} % of one class"
        yield Planted("sorted batches", words, MODEL, plain[part][0].params, plain[part][1], orders[part][1], wrong)
    yield from domains(start, seed, order)
    yield from ramps(start, orders, plain)


# %% [markdown]
# ## Diagnosing
#
# `diagnose` is given what its page asks for: the network, the training data in the order of training, the batch size of
# training, and the domains where there are two. It is not told what was planted.

# %%
NAMES = {  # what diagnose calls each trap
    "lagging average": "lagging average",
    "never estimated": "never estimated",
    "training mode": "training mode at inference",
    "batches too small": "batches too small",
    "sorted batches": "non-i.i.d. batches",
    "mixed domains": "mixed domains",
    "inert ramp": "renormalization not begun",
}


def named(planted):
    """The traps that a diagnosis names."""
    index = planted.batches.ravel()
    examples = {"images": planted.split.images[index], "labels": planted.split.labels[index], "domain": index % 2}
    found = diagnostics.diagnose(
        planted.model,
        {"params": planted.params, "batch_stats": planted.batch_stats},
        examples,
        losses,
        batch_size=planted.size,
        call=planted.call,
        domain=planted.domain,
        num_batches=LOOKED_AT,
    )
    return [finding.trap for finding in found.findings]


harms, names = {}, {}  # by trap and strength: [seed]
for seed in lab.SEEDS:
    for planted in plant(seed):
        case = planted.trap, planted.strength
        harms.setdefault(case, []).append(float(planted.harm))
        names.setdefault(case, []).append(named(planted))

# %% [markdown]
# ## The answer in one figure

# %%
ORDER = [*NAMES, NOTHING]
cases = sorted(names, key=lambda case: ORDER.index(case[0]))  # the order of strengths is kept
others = sorted({name for seeds in names.values() for found in seeds for name in found} - {*NAMES.values()})
columns = [*NAMES.values(), *others]
share = np.array([[np.mean([column in found for found in names[case]]) for column in columns] for case in cases])

figure, (ax, cost) = plt.subplots(1, 2, figsize=(12, 9), width_ratios=(3, 1), sharey=True)
ax.imshow(share, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
for (row, column), value in np.ndenumerate(share):
    if value:
        ax.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.7 else "black")
for row, (trap, _) in enumerate(cases):
    if trap in NAMES:
        ax.add_patch(
            plt.Rectangle((ORDER.index(trap) - 0.5, row - 0.5), 1, 1, fill=False, color=lab.ORANGE, linewidth=2)
        )
    cost.plot(harms[cases[row]], [row] * len(lab.SEEDS), ".", color=lab.ORANGE, alpha=0.6)
    cost.plot(np.mean(harms[cases[row]]), row, "|", color="black", markersize=12)
ax.set_xticks(range(len(columns)), [name.replace(" ", "\n", 1) for name in columns], fontsize="small")
ax.set_yticks(range(len(cases)), [f"{trap}: {strength}" for trap, strength in cases])
ax.set(xlabel="named by diagnose", ylabel="planted", title=f"Share of {len(lab.SEEDS)} seeds; framed: the trap planted")
ax.grid(visible=False)
cost.set_xscale("symlog", linthresh=1)
cost.set_xticks((0, 1, 10), ("0", "1", "10"))
cost.set(xlabel="points of test error lost", title="Harm (dots: seeds, bar: mean)")
plt.show()

# %% [markdown]
# ## In numbers
#
# A *hit* is a planted trap that is named. A *false alarm* is a trap that is named where another or none was planted. A
# sorted batch is a small one, too, and a network may be in two traps; what else is named is counted all the same.


# %%
def hits(trap):
    """Whether it was named, by seed and strength."""
    return np.array([[NAMES[trap] in found for found in names[case]] for case in cases if case[0] == trap]).T


def alarms(trap):
    """Whether it was named where it was not planted, by seed and case."""
    return np.array([[NAMES[trap] in found for found in names[case]] for case in cases if case[0] != trap]).T


def harm(trap):
    """By seed and strength."""
    return np.array([harms[case] for case in cases if case[0] == trap]).T


HARMFUL = 1.0  # point of test error
rows = [
    f"| {trap} | "
    + " | ".join(
        [f"{hit:.0%} ({lab.over_seeds(lost, '.1f')})" for hit, lost in zip(hits(trap).mean(0), harm(trap).T)]
        + ["-"] * (3 - hits(trap).shape[1])
    )
    + f" | {np.mean(hits(trap)):.0%} | {np.mean(alarms(trap)):.1%} |"
    for trap in NAMES
]
table = ["| trap | first strength | second | third | hits | false alarms |", "|---|---|---|---|---|---|", *rows]
lab.Markdown("Share of seeds that name the trap (points of test error lost):\n\n" + "\n".join(table))

# %%
hit = np.concatenate([hits(trap) for trap in NAMES], 1)  # [seed, planted]
bad = np.concatenate([harm(trap) for trap in NAMES], 1) >= HARMFUL
healthy = [found for case in cases if case[0] == NOTHING for found in names[case]]
missed = [
    f"{trap}, {strength} (named by {np.mean([NAMES[trap] in found for found in names[trap, strength]]):.0%} of seeds, "
    f"{lab.over_seeds(harms[trap, strength], '.1f')} points)"
    for trap, strength in cases
    if trap in NAMES
    and np.mean(harms[trap, strength]) >= HARMFUL
    and not all(NAMES[trap] in found for found in names[trap, strength])
]
idle = [
    f"{trap}, {strength} ({lab.over_seeds(harms[trap, strength], '.1f')})"
    for trap, strength in cases
    if trap in NAMES
    and np.mean(harms[trap, strength]) < HARMFUL
    and any(NAMES[trap] in found for found in names[trap, strength])
]
beside = [
    f"{name} where {trap if trap != NOTHING else 'nothing'} was planted ({strength}; {value:.0%} of seeds)"
    for (trap, strength), values in zip(cases, share)
    for name, value in zip(columns, values)
    if value and name != NAMES.get(trap)
]


def listed(things):
    return "; ".join(things) if things else "none"


lab.say(
    f"Of the {bad.sum()} networks in which a planted trap costs {HARMFUL:.0f} point or more, it is named in "
    f"{np.mean(hit[bad]):.0%}; of the {(~bad).sum()} in which it costs less, in {np.mean(hit[~bad]):.0%}.",
    f"Of {len(healthy)} networks in which nothing was planted, {sum(map(bool, healthy))} are told of a trap.",
    f"Missed, at a point or more in the mean: {listed(missed)}.",
    f"Named, though it costs less than a point: {listed(idle)}.",
    f"Named beside what was planted, or instead: {listed(beside)}.",
)
lab.keep(
    "7_diagnosis",
    cases=[f"{trap}: {strength}" for trap, strength in cases],
    columns=columns,
    share=share,
    harm=np.array([harms[case] for case in cases]).T,
    hits={trap: hits(trap).mean(1) for trap in NAMES},
    hits_where_harmful=[np.mean(of_seed[hurts]) for of_seed, hurts in zip(hit, bad)],
    hits_where_harmless=[np.mean(of_seed[~hurts]) for of_seed, hurts in zip(hit, bad)],
    false_alarms={trap: alarms(trap).mean(1) for trap in NAMES},
    healthy_with_a_finding=np.mean(np.reshape([*map(bool, healthy)], (-1, len(lab.SEEDS))), 0),
)

# %% [markdown]
# ## What follows
#
# - A finding says which trap a network is in, and not what that costs. The last line of a printed diagnosis says what
#   the stored statistics cost in training loss; what small or sorted batches have cost, only another training tells.
# - Statistics that were never estimated and a model in training mode are seen for certain, harmful or not: they are no
#   matter of degree. A lagging average, small batches and mixed domains are measured against the noise of a batch,
#   which is a convention; "missed" and "named, though" above say where it is too lax or too strict for these networks.
# - Give the batches in the order of training, and `domain` where there are domains: without them sorted batches and
#   mixed domains cannot be seen.
#
# ## Against the literature
#
# Three of the traps are those of Irpan 2017, "On The Perils of Batch Norm": a policy that ran in training mode, a model
# restored in training mode, and two datasets with one moving average. He tells of at least six hours for the second,
# and of luck for the third.
