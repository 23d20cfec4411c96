"""Layers of classes that nobody made known: all that looks at a model names them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import EPSILON, Foreign
from models import Repeated, train

import flaxbn
from flaxbn import diagnostics, domains

X = np.random.default_rng(0).normal(2.0, 3.0, (64, 4)).astype(np.float32)
WAYS = r"flaxbn.mark.*flaxbn.recognize\(cls, \.\.\.\).*flaxbn.recognize\(cls, None\)"


class Own(Foreign):
    names: tuple = ("running_mean", "running_var")

    @nn.compact
    def __call__(self, x, train=False):
        return self.normalize(x, train, self.names)


class Net(nn.Module):
    """A stock layer, and one that nobody knows."""

    names: tuple = ("running_mean", "running_var")
    own: object = Own

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(not train, name="stock")(nn.Dense(8)(x)))
        return nn.Dense(2)(self.own(self.names, name="own")(nn.Dense(8)(x), train))


REMAT = nn.remat(Own, static_argnums=(2,))
JIT = nn.jit(Own, static_argnums=(2,))


MODEL = Net()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)


def with_mean(variables, names=("running_mean", "running_var"), mean=0.5):
    stats = variables["batch_stats"]
    return {**variables, "batch_stats": {**stats, "own": {**stats["own"], names[0]: stats["own"][names[0]] + mean}}}


LOOKS = {
    "apply": lambda m, v, **o: flaxbn.apply(m, v, X, statistics="batch", **o),
    "precise": lambda m, v, **o: flaxbn.estimate_population_stats(m, v, X, batch_size=16, **o),
    "exact": lambda m, v, **o: flaxbn.population_moments(m, v, X, batch_size=16, method="exact", **o),
    "stream": lambda m, v, **o: flaxbn.estimate_population_stats(m, v, [X[:32], X[32:]], **o),
    "plan": lambda m, v, **o: flaxbn.plan(m, v, X, batch_size=16, **o),
    "diagnose": lambda m, v, **o: diagnostics.diagnose(m, v, X, lambda o, b: o.sum(-1), batch_size=16, **o),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_uses_stored_statistics_is_named_once(look):
    with pytest.warns(UserWarning, match=rf"in 'own' \('running_mean', 'running_var'\).*{WAYS}") as caught:
        LOOKS[look](MODEL, VARIABLES)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("own", [REMAT, JIT], ids=["remat", "jit"])
def test_inside_of_transformations_too(own):
    model = Net(own=own)
    for _ in range(2):  # what jax has traced before is not traced again
        with pytest.warns(UserWarning, match="in 'own'"):
            LOOKS["apply"](model, VARIABLES)


def test_estimates_warn_again_where_a_compiled_pass_is_used_again():
    for _ in range(2):
        with pytest.warns(UserWarning, match="in 'own'"):
            LOOKS["precise"](MODEL, VARIABLES)


def test_domains_name_it():
    with pytest.warns(UserWarning, match="in 'own'"):
        domains.estimate(MODEL, VARIABLES, {"a": X[:32]}, batch_size=16)


def test_a_layer_in_training_mode_is_named_though_it_reads_nothing_that_is_stored():
    with pytest.warns(UserWarning, match=r"in 'own' \('running_mean', 'running_var'\)"):
        found = flaxbn.apply(MODEL, VARIABLES, X, call=train)
    assert not np.allclose(found, MODEL.apply(VARIABLES, X), atol=1e-2)


def test_running_statistics_that_are_used_as_they_are_stored_are_what_was_asked_for():
    np.testing.assert_allclose(flaxbn.apply(MODEL, VARIABLES, X), MODEL.apply(VARIABLES, X), atol=1e-6)


def test_names_of_flax_make_it_a_layer_that_saw_no_data():
    model = Net(("mean", "var"))
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"must see data: 'own' saw none.*`flaxbn.recognize`, or `flaxbn.mark`"):
        LOOKS["precise"](model, variables)
    with pytest.warns(UserWarning, match=r"in 'own' \('mean', 'var'\)"):
        LOOKS["precise"](model, variables, keep_unseen=True)
    LOOKS["precise"](model, variables, only=lambda path: path == "stock")  # it is said to stay as it is
    with pytest.warns(UserWarning, match=r"in 'own' \('mean', 'var'\)"):
        LOOKS["diagnose"](model, variables)


@pytest.mark.parametrize("names", [("mean", "var"), ("mu", "sigma2")])
def test_initial_statistics_are_not_exported_whatever_the_class(names, tmp_path):
    model = Net(names)
    variables = model.init(jax.random.key(0), X)
    stock = {"mean": jnp.ones(8), "var": jnp.ones(8)}
    variables = {**variables, "batch_stats": {**variables["batch_stats"], "stock": stock}}
    path = tmp_path / "model.zip"
    with pytest.raises(ValueError, match=rf"those of 'own' were never estimated.*class of 'own' is not known.*{WAYS}"):
        flaxbn.export_inference(model, variables, X[:8], path)
    assert not path.exists()
    flaxbn.export_inference(model, with_mean(variables, names), X[:8], path, platforms=("cpu",))


def test_one_row_that_is_initial_is_enough(tmp_path):
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Step, variable_axes={"batch_stats": 0, "params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Own(name="own")(x), None

    variables = Stacked().init(jax.random.key(0), X)
    held = variables["batch_stats"]["layers"]["own"]
    held["running_mean"] = held["running_mean"].at[0].set(1.0)
    with pytest.raises(ValueError, match="those of 'layers/own' were never estimated"):
        flaxbn.export_inference(Stacked(), variables, X[:8], tmp_path / "model.zip")


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)


JIT_NORMED = nn.jit(Normed, static_argnums=(2,))


class Spectral(nn.Module):
    normed: object = Normed

    @nn.compact
    def __call__(self, x, train=False):
        x = self.normed(name="a")(self.normed(name="b")(x, train), train)
        return nn.BatchNorm(not train, name="stock")(x)


@pytest.mark.parametrize("look", ["apply", "precise", "diagnose"])
def test_spectral_normalization_is_none(look):
    model = Spectral()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    LOOKS[look](model, variables)
    flaxbn.apply(model, variables, X, call=train)


def test_nor_is_it_where_jax_knows_the_traced_function_already():
    model = Spectral(JIT_NORMED)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    for _ in range(2):
        LOOKS["apply"](model, variables)


def test_nor_is_what_is_said_to_be_none(tmp_path):
    class Known(Own):
        @nn.compact
        def __call__(self, x, train=False):
            return self.normalize(x, train, self.names)

    class Simple(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, name="stock")(Known(name="own")(x))

    variables = Simple().init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="'own'"):
        LOOKS["apply"](Simple(), variables)
    flaxbn.recognize(Known, None)
    for look in ("apply", "plan"):
        LOOKS[look](Simple(), variables)
    stats = LOOKS["precise"](Simple(), variables)
    flaxbn.export_inference(
        Simple(), {**variables, "batch_stats": stats}, X[:8], tmp_path / "model.zip", platforms=("cpu",)
    )


def test_a_subclass_of_a_stock_layer_that_is_said_to_be_none_runs_as_it_is():
    class Frozen(nn.BatchNorm):
        """Always evaluates."""

    flaxbn.recognize(Frozen, None)

    class Simple(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Frozen(use_running_average=True, name="frozen")(x)
            return nn.BatchNorm(use_running_average=True, name="stock", epsilon=EPSILON)(x)

    variables = Simple().init(jax.random.key(0), X)
    found = flaxbn.estimate_population_stats(Simple(), variables, X, batch_size=64, keep_unseen=True)
    np.testing.assert_array_equal(found["frozen"]["mean"], np.zeros(4))
    np.testing.assert_allclose(found["stock"]["mean"], X.astype(np.float64).mean(0), rtol=2e-5)


def test_statistics_that_are_changed_on_the_way_are_named():
    class Changed(nn.Module):
        @nn.compact
        def __call__(self, x):
            halved = nn.map_variables(
                nn.BatchNorm,
                "batch_stats",
                trans_in_fn=lambda held: jax.tree.map(lambda a: a / 2, held),
                init=self.is_initializing(),
            )
            x = nn.BatchNorm(use_running_average=True, name="stock")(x)
            return halved(use_running_average=True, name="changed")(x)

    variables = Changed().init(jax.random.key(0), X)
    with pytest.warns(UserWarning, match="in 'changed"):
        flaxbn.apply(Changed(), variables, X, statistics="batch")


def test_statistics_that_loops_hand_through_are_not():
    x = np.tile(X, 2)[:, :6]
    variables = Repeated("broadcast").init(jax.random.key(0), x)
    for how in ("broadcast", "carried"):
        flaxbn.apply(Repeated(how), variables, x, statistics="batch")


def test_nor_is_what_is_handed_through_and_not_used():
    class Spare(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("batch_stats", "spare", jnp.zeros, x.shape[-1:])
            return nn.BatchNorm(use_running_average=True, name="stock")(x)

    model = nn.remat(Spare)()
    variables = model.init(jax.random.key(0), X)
    flaxbn.apply(model, variables, X, statistics="batch")


def test_a_model_without_a_known_layer_says_what_it_holds():
    model = Own()
    variables = model.init(jax.random.key(0), X)
    held = rf"`batch_stats` holds '\(the model itself\)' \('running_mean', 'running_var'\).*{WAYS}"
    with pytest.raises(ValueError, match=rf"Own ran none in `call`\. {held}"):
        flaxbn.apply(model, variables, X, statistics="batch")
    with pytest.raises(ValueError, match=rf"that of Own has none\. {held}"):
        LOOKS["precise"](model, variables)
    with pytest.raises(ValueError, match=rf"Own ran none in `call`\. {held}"):
        LOOKS["diagnose"](model, variables)


def test_diagnose_says_so_before_it_reads_data():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(4))(x, update_stats=False)

    def unread():
        raise AssertionError
        yield

    variables = Plain().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"that of Plain has none.*'SpectralNorm_0' \('Dense_0/kernel/sigma'"):
        diagnostics.diagnose(Plain(), variables, unread(), lambda o, b: o.sum(-1))
    with pytest.raises(ValueError, match=r"must hold the collection 'batch_stats': got \['params'\]"):
        diagnostics.diagnose(nn.Dense(2), {"params": {}}, unread(), lambda o, b: o.sum(-1))
