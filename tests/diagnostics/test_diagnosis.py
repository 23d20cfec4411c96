"""Each trap planted in a model that was trained on real digits, and named; a healthy one comes out clean."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

import flaxbn
from flaxbn.diagnostics.diagnosis import diagnose

DIGITS = datasets.load_digits()
ORDER = np.random.default_rng(0).permutation(1792)
IMAGES = (DIGITS.images[ORDER, :, :, None] / 16).astype(np.float32)
LABELS = DIGITS.target[ORDER].astype(np.int32)
DATA = {"image": IMAGES, "label": LABELS, "domain": np.zeros(1792, np.int32)}


class CNN(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        for features, stride in ((8, 1), (16, 2), (16, 2)):
            x = nn.Conv(features, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def call(module, batch):
    return module(batch["image"])


def losses(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


@functools.partial(jax.jit, static_argnames=("model", "batch_size", "epochs"))
def train(data, rate, *, model, batch_size, epochs):
    """Adam with a rate that falls to zero; each epoch in the order of the data."""
    variables = model.init(jax.random.key(0), data["image"][:2])
    batches = jax.tree.map(lambda a: a.reshape(-1, batch_size, *a.shape[1:]), data)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, epochs * len(data["label"]) // batch_size))

    def step(state, batch):
        params, batch_stats, opt_state = state

        def loss(params):
            given = {"params": params, "batch_stats": batch_stats}
            logits, new = model.apply(given, batch["image"], train=True, mutable=["batch_stats"])
            return losses(logits, batch).mean(), new["batch_stats"]

        gradient, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), None

    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    state, _ = jax.lax.scan(lambda state, _: jax.lax.scan(step, state, batches), state, None, length=epochs)
    return {"params": state[0], "batch_stats": state[1]}, variables["batch_stats"]


@pytest.fixture(scope="module")
def healthy():
    """Trained with batches of 64; the variables, and the statistics as they were before."""
    return train(DATA, 0.01, model=CNN(), batch_size=64, epochs=4)


def in_turn(data, size):
    """Two domains, the digits and their negatives, brighter; each batch is of one."""
    shown = np.arange(len(data["label"])) // size % 2
    image = np.where(shown[:, None, None, None] == 1, 3 - 2 * data["image"], data["image"])
    return {"image": image, "label": data["label"], "domain": shown.astype(np.int32)}


def named(variables, data=DATA, model=None, batch_size=64, **options):
    found = diagnose(
        model or CNN(), variables, data, losses, call=options.pop("call", call), batch_size=batch_size, **options
    )
    return [finding.trap for finding in found.findings], found


def test_a_healthy_model(healthy):
    """By the running average at the end of a training whose learning rate went to zero, and by the population."""
    variables, _ = healthy
    traps, found = named(variables)
    assert traps == [], str(found)
    assert "Nothing is wrong with batch normalization." in str(found)
    batch_stats = flaxbn.estimate_population_stats(CNN(), variables, DATA, call=call, batch_size=64)
    traps, found = named({**variables, "batch_stats": batch_stats})
    assert traps == [], str(found)
    assert abs(found.gap[None].normalization) < 0.05


def test_never_estimated(healthy):
    variables, before = healthy
    traps, found = named({**variables, "batch_stats": before})
    assert traps == ["never estimated"]
    assert "3 of 3 layers" in found.findings[0].evidence
    assert found.gap[None].normalization > 1
    some = {**variables["batch_stats"], "BatchNorm_1": before["BatchNorm_1"]}
    traps, found = named({**variables, "batch_stats": some})
    assert traps == ["never estimated"]
    assert (found.findings[0].where, found.findings[0].number) == ("BatchNorm_1", 1)


def test_lagging_average():
    variables, _ = train(DATA, 0.01, model=CNN(momentum=0.99), batch_size=64, epochs=2)
    traps, found = named(variables)
    assert traps == ["lagging average"]
    finding = found.findings[0]
    assert finding.number > finding.threshold >= 1e-3
    assert "estimate_population_stats" in str(found)


def test_batches_too_small():
    variables, _ = train(DATA, 0.003, model=CNN(momentum=0.99), batch_size=2, epochs=2)
    batch_stats = flaxbn.estimate_population_stats(CNN(), variables, DATA, call=call, batch_size=2)
    traps, found = named({**variables, "batch_stats": batch_stats}, batch_size=2)
    assert traps == ["batches too small"], str(found)
    assert found.findings[0].number > 0.1


def by_class(data):
    order = np.argsort(data["label"], kind="stable")
    return {name: values[order] for name, values in data.items()}


def test_batches_of_one_class_each():
    """The network never meets a batch like the set: larger batches of the same kind would not help, shuffling does."""
    data = by_class(DATA)
    variables, _ = train(data, 0.01, model=CNN(), batch_size=64, epochs=4)
    batch_stats = flaxbn.estimate_population_stats(CNN(), variables, data, call=call, batch_size=64)
    variables = {**variables, "batch_stats": batch_stats}
    traps, found = named(variables, data)
    assert traps == ["non-i.i.d. batches"], str(found)
    finding = found.findings[0]
    assert finding.number > finding.threshold
    assert "Shuffle the examples" in str(found)
    given, shuffled = ({r.layer: r.typical_share for r in noise[None]} for noise in (found.noise, found.shuffled))
    assert min(given[layer] / shuffled[layer] for layer in given) > 5
    assert "non-i.i.d. batches" not in named(variables, DATA)[0]


@pytest.mark.parametrize("batch_size", [2, 16, 64])
@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_batches_are_not_found_to_be_alike(healthy, seed, batch_size):
    """Small ones neither: at two samples they are too small, and that is all."""
    order = np.random.default_rng(seed).permutation(1792)
    traps, found = named(healthy[0], {name: values[order] for name, values in DATA.items()}, batch_size=batch_size)
    assert traps == (["batches too small"] if batch_size == 2 else []), str(found)


def test_small_batches_of_one_class_each_are_too_small_as_well(healthy):
    """Two examples that are alike are worth one, at least: the rest of the noise is that of any two."""
    assert "batches too small" in named(healthy[0], by_class(DATA), batch_size=2)[0]


def test_batches_of_one_domain_each_are_told_apart_from_small_ones(healthy):
    """Without their labels they are alike; with them, those of a domain are drawn from it."""
    data = in_turn(DATA, 64)
    assert "non-i.i.d. batches" in named(healthy[0], data)[0]
    traps = named(healthy[0], data, domain=lambda batch: batch["domain"])[0]
    assert "mixed domains" in traps
    assert "non-i.i.d. batches" not in traps


def test_mixed_domains():
    data = in_turn(DATA, 64)
    variables, _ = train(data, 0.01, model=CNN(momentum=0.95), batch_size=64, epochs=4)
    traps, found = named(variables, data, domain=lambda batch: batch["domain"])
    assert traps == ["mixed domains"], str(found)
    assert "domain" in found.findings[0].where
    assert found.gap[0].normalization + found.gap[1].normalization > 0.1
    # The same network with the statistics of one domain, on that domain, has nothing wrong with it.
    one = jax.tree.map(lambda a: a[data["domain"] == 1], data)
    batch_stats = flaxbn.estimate_population_stats(CNN(), variables, one, call=call, batch_size=64)
    traps, found = named({**variables, "batch_stats": batch_stats}, one, domain=lambda batch: batch["domain"])
    assert traps == [], str(found)


@pytest.mark.parametrize(
    ("dtype", "mean", "std"), [(jnp.bfloat16, 100.2, 1), (jnp.float16, 0, 400)], ids=["rounded", "overflow"]
)
def test_domains_are_compared_in_float32_whatever_is_stored(dtype, mean, std):
    """Two domains of one distribution; bfloat16 rounds 100.2 to 100, float16 ends at 65504."""
    x = np.random.default_rng(0).normal(mean, std, (2048, 4)).astype(np.float32)
    data = {"image": x, "domain": np.arange(2048) // 64 % 2}
    model = nn.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), x)
    lagging = {"mean": jnp.full(4, mean, dtype), "var": jnp.full(4, min(2 * std**2, 60000), dtype)}
    found = diagnose(
        model,
        {**variables, "batch_stats": lagging},
        data,
        lambda output, batch: output.sum(-1),
        call=call,
        domain=lambda batch: batch["domain"],
        batch_size=64,
    )
    assert set(found.noise) == {0, 1}
    assert [finding.trap for finding in found.findings] == ["lagging average"], str(found)


def test_domains_in_mixed_batches_are_no_trap():
    """Trained with both domains in every batch, tested with the population of both."""
    data = in_turn(DATA, 1)
    variables, _ = train(data, 0.01, model=CNN(), batch_size=64, epochs=4)
    traps, found = named(variables, data, domain=lambda batch: batch["domain"])
    assert traps == [], str(found)


def test_training_mode_at_inference(healthy):
    traps, found = named(healthy[0], call=lambda module, batch: module(batch["image"], train=True))
    assert traps == ["training mode at inference"]
    assert found.findings[0].number > 0.01
    assert "use_running_average=True" in str(found)
    assert found.gap is None


def test_a_statistic_that_is_not_finite(healthy):
    variables, _ = healthy
    layer = variables["batch_stats"]["BatchNorm_2"]
    broken = {"mean": layer["mean"].at[0].set(jnp.nan), "var": layer["var"].at[1].set(-1)}
    batch_stats = {**variables["batch_stats"], "BatchNorm_2": broken}
    traps, found = named({**variables, "batch_stats": batch_stats})
    assert traps == ["not finite"]
    assert found.findings[0].number == 2
    assert "['batch_stats']['BatchNorm_2']['mean'], stored BatchNorm_2/var" in str(found)


@pytest.mark.parametrize("where", [3, 1700, "weights"])
def test_values_that_are_not_finite_are_not_taken_for_another_trap(healthy, where):
    """In the weights, or in an early or a late example."""
    variables, data = healthy[0], DATA
    if where != "weights":
        data = {**DATA, "image": np.where(np.arange(1792)[:, None, None, None] == where, np.nan, IMAGES)}
    else:
        bias = variables["params"]["Dense_0"]["bias"].at[0].set(jnp.inf)
        params = {**variables["params"], "Dense_0": {**variables["params"]["Dense_0"], "bias": bias}}
        variables = {**variables, "params": params}
    traps, found = named(variables, data)
    assert traps == ["not finite"]
    assert ("['Dense_0']['bias']" if where == "weights" else "['data']['image']") in str(found)


def test_a_late_batch_whose_statistics_overflow(healthy):
    """Its data are finite, their squares are not."""
    data = {**DATA, "image": np.where(np.arange(1792)[:, None, None, None] == 1700, np.float32(1e30), IMAGES)}
    traps, found = named(healthy[0], data)
    assert traps == ["not finite"]
    assert found.findings[0].where == "BatchNorm_0"
    assert "those of 'BatchNorm_0' are not in batch 26 (counted from 0)" in str(found)


@pytest.mark.parametrize("late", [np.nan, np.inf])
def test_a_late_loss_that_is_not_finite(healthy, late):
    data = {**DATA, "factor": np.where(np.arange(1792) == 1700, late, 1).astype(np.float32)}
    found = diagnose(CNN(), healthy[0], data, lambda z, b: b["factor"] * losses(z, b), call=call, batch_size=64)
    assert "['data']['factor']" in str(found)
    data["factor"] = (np.arange(1792) != 1700).astype(np.float32)
    found = diagnose(CNN(), healthy[0], data, lambda z, b: losses(z, b) + late_of(b, late), call=call, batch_size=64)
    assert [(finding.trap, finding.where) for finding in found.findings] == [("not finite", "loss")]
    assert f"by the stored ones {late}" in str(found)


def late_of(batch, late):
    return jnp.where(batch["factor"] == 0, late, 0)


class Bottleneck(nn.Module):
    """Linear between two normalizations: the mean of a batch is the same in each, and has no noise."""

    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)  # six pixels are black in every digit
        for i, features in enumerate((32, 16, 16)):
            x = self.norm(use_running_average=not train, momentum=0.95)(x)
            x = nn.Dense(features)(nn.relu(x) if i == 1 else x)
        return nn.Dense(10)(nn.relu(x))


def test_a_healthy_model_whose_batches_have_no_noise():
    """Nor is it a trap that the running variance of a pixel that is always black has not come down to 0."""
    model = Bottleneck()
    variables, _ = train(DATA, 0.01, model=model, batch_size=64, epochs=8)
    traps, found = named(variables, model=model)
    assert traps == [], str(found)
    assert found.drift[0].dead > 0


def test_renormalization_is_not_found_to_have_small_batches():
    model = Bottleneck(functools.partial(flaxbn.BatchRenorm, r_max=3.0, d_max=5.0))
    variables, _ = train(DATA, 0.003, model=model, batch_size=4, epochs=2)
    traps, found = named(variables, model=model, batch_size=4)
    assert max(record.typical_share for record in found.noise[None]) > 0.1
    assert "batches too small" not in traps
    assert "non-i.i.d. batches" not in named(variables, by_class(DATA), model=model, batch_size=64)[0]


class Halves(nn.Module):
    """A layer for each half of the channels, their statistics stacked."""

    norm: type

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            lambda module, x: self.norm(use_running_average=True, name="norm", parent=module)(x),
            in_axes=1,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
        )
        return mapped(self, x.reshape(len(x), 2, -1))


@pytest.mark.parametrize("model", [Halves, lambda norm: norm(use_running_average=True)])
@pytest.mark.parametrize("norm", [nn.BatchNorm, flaxbn.BatchNorm, flaxbn.BatchRenorm])
def test_renormalization_is_known_where_its_steps_are_not_stored(model, norm):
    """As in a checkpoint of `BatchNorm`, from which it goes on."""
    x = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
    variables = jax.jit(model(norm).init)(jax.random.key(0), x)
    variables = {**variables, "batch_stats": without_steps(variables["batch_stats"])}
    found = diagnose(model(norm), variables, x, lambda output, batch: jnp.zeros(len(batch)), batch_size=4)
    assert ("batches too small" in str(found)) == (norm is not flaxbn.BatchRenorm), str(found)


def without_steps(batch_stats):
    leaves = {k: without_steps(v) if isinstance(v, dict) else v for k, v in batch_stats.items()}
    return {name: leaf for name, leaf in leaves.items() if name != "steps"}


def test_layers_left_out(healthy):
    """A layer whose statistics are frozen is not found to lag."""
    variables, before = healthy
    frozen = {**variables["batch_stats"], "BatchNorm_2": jax.tree.map(lambda a: 1.5 * a, before["BatchNorm_2"])}
    variables = {**variables, "batch_stats": frozen}
    assert named(variables)[0] == ["lagging average"]
    traps, found = named(variables, only=lambda path: path != "BatchNorm_2")
    assert traps == []
    assert [record.layer for record in found.drift] == ["BatchNorm_0", "BatchNorm_1"]


def test_one_batch_at_the_border_of_two_domains_does_not_hide_them():
    data = in_turn(DATA, 896)
    data = {name: np.roll(values, 20, axis=0) for name, values in data.items()}
    variables, _ = train(data, 0.01, model=CNN(momentum=0.95), batch_size=64, epochs=2)
    traps, found = named(variables, data, domain=lambda batch: np.array(["dark", "bright"])[batch["domain"]])
    assert "mixed domains" in traps, str(found)
    assert "domain bright" in str(found) or "domain dark" in str(found)


def test_batches_of_one(healthy):
    """The least there is: convolutions normalize over positions."""
    traps, _ = named(healthy[0], batch_size=1)
    assert "batches too small" in traps


def test_nothing_is_changed(healthy):
    variables, _ = healthy
    before = jax.tree.map(np.array, variables)
    named(variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1024}, "Two batches are needed at least: got 1792 samples, `batch_size=1024`"),
        ({"num_batches": 1}, "`num_batches=1`"),
        (
            {"num_batches": 3, "data": in_turn(DATA, 64), "domain": lambda batch: batch["domain"]},
            "two batches at least",
        ),
    ],
)
def test_errors(healthy, options, message):
    with pytest.raises(ValueError, match=message):
        named(healthy[0], **options)
