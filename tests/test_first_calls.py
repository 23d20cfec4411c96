"""What new users write first, and what they are told: first the names of things, then what to write instead."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import flaxbn
from flaxbn import diagnostics

X = np.float32(np.random.default_rng(0).normal(3, 2, (64, 4)))
Y = np.int32(X[:, 0] > 3)
SITES = np.array(["north", "south"] * 32)
LINES = 12


class Net(nn.Module):
    norm: object = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = self.norm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(2)(nn.relu(x))


class NeedsTrain(Net):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))


class Critic(Net):
    @nn.compact
    def __call__(self, s, a):
        return nn.BatchNorm(use_running_average=True)(jnp.concatenate([s, a], -1))


class Loader:
    """Batches, as loaders of other libraries give them: to be iterated over, and nothing else."""

    def __iter__(self):
        return iter([X[:32], X[32:]])


class StateWithStats(TrainState):
    batch_stats: object


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class NnxNeedsTrain(NnxNet):
    def __call__(self, x, *, train):
        return self.norm(self.linear(x), use_running_average=not train)


MODEL = Net()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
ESTIMATED = {**VARIABLES, "batch_stats": jax.tree.map(lambda a: a + 0.5, VARIABLES["batch_stats"])}
NEEDS = jax.jit(NeedsTrain().init, static_argnums=2)(jax.random.key(0), X, True)
OURS = Net(flaxbn.BatchNorm)
OUR_VARIABLES = jax.jit(OURS.init)(jax.random.key(0), X)
BOTH = {"image": X, "label": Y}
ESTIMATE = flaxbn.estimate_population_stats
LAYER = flaxbn.BatchNorm(use_running_average=False)
DOMAINS = flaxbn.BatchNorm(use_running_average=False, num_domains=2)
KEY = jax.random.key(0)


def by_image(module, batch):
    return module(batch["image"])


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def state(variables=VARIABLES):
    return TrainState.create(apply_fn=MODEL.apply, params=variables["params"], tx=optax.sgd(1.0))


def run(arguments=(MODEL, VARIABLES, X), function=ESTIMATE, **options):
    return lambda: function(*arguments, **options)


def diagnosed(loss_fn, **options):
    return lambda: diagnostics.diagnose(
        MODEL, VARIABLES, BOTH, loss_fn, **{"call": by_image, "batch_size": 32, **options}
    )


MISTAKES = {
    "arrays without batch_size": (run(), r"`batches` must be an iterable.*pass `batch_size`"),
    "a loader of (x, y)": (
        run((MODEL, VARIABLES, [(X[:32], Y[:32])])),
        r"`call` must run the model on a batch; the default, `module\(batch\)`, raised\n  \w+: .*\nThe batch is\n"
        r"  batch\[0\]: float32 \(32, 4\)\n  batch\[1\]: int32 \(32,\)\n"
        r"Say how the model evaluates one:\n  call=lambda module, batch: module\(batch\[0\]\)$",
    ),
    "a dict": (run((MODEL, VARIABLES, BOTH), batch_size=32), r'call=lambda module, batch: module\(batch\["image"\]\)$'),
    "train without default": (
        run((NeedsTrain(), NEEDS, X), batch_size=32),
        r"missing 1 required positional argument: 'train'\n(.*\n)*  call=lambda module, batch: module\(batch, train=",
    ),
    "two inputs in a tuple": (
        run((Critic(), VARIABLES, (X, X[:, :2], Y)), batch_size=32),
        r"argument: 'a'\n(.*\n)*  call=lambda module, batch: module\(batch\[0\], a=batch\[1\]\)$",
    ),
    "two inputs in a dict": (
        run((Critic(), VARIABLES, {"obs": X, "act": X, "reward": Y}), batch_size=32),
        r"  call=lambda module, batch: module\(batch\[\"obs\"\], a=batch\[\"act\"\]\)$",
    ),
    "params alone": (
        run((MODEL, {"params": VARIABLES["params"]}, X), batch_size=32),
        r"must hold the collection 'batch_stats': got \['params'\]\. Pass what `model.init` returned",
    ),
    "the bound apply": (
        run((MODEL.apply, VARIABLES, X), batch_size=32),
        r"must be a flax.linen.Module: got method\. It is a method of Net: drop `\.apply`",
    ),
    "nothing mutable": (lambda: OURS.apply(OUR_VARIABLES, X, train=True), r'- pass `mutable=\["batch_stats"\]`'),
    "no mode": (lambda: flaxbn.BatchNorm().init(KEY, X), "use_running_average.* must be passed"),
    "two modes": (
        lambda: flaxbn.BatchNorm(use_running_average=True).init(KEY, X, use_running_average=False),
        "Should be passed just once",
    ),
    "a batch of one": (
        lambda: OURS.apply(OUR_VARIABLES, X[:1], train=True, mutable=["batch_stats"]),
        r"more than one value per channel: got an input of shape \(1, 8\)",
    ),
    "a number of features": (lambda: flaxbn.BatchNorm(8).init(KEY, X), "number of features is no argument here"),
    "words of torch": (lambda: flaxbn.BatchNorm(num_features=8), "unexpected keyword argument 'num_features'"),
    "momentum": (lambda: flaxbn.BatchNorm(momentum=1.5).init(KEY, X), r"weight of the old value: 0.9 where PyTorch"),
    "other statistics": (
        run(function=flaxbn.apply, statistics="population"),
        r'must be "running" or "batch": got .*`flaxbn.est',
    ),
    "a method misspelled": (run(method="presice", batch_size=32), r'must be "precise" or "exact": got \'presice\''),
    "jit": (
        lambda: jax.jit(lambda v: ESTIMATE(MODEL, v, X, batch_size=32))(VARIABLES),
        r"Call it outside of `jax.jit`",
    ),
    "nothing": (
        run((MODEL, VARIABLES, iter([]))),
        r"must hold at least one sample: saw none\. A generator that was read once .*: make a new one for each call",
    ),
    "a function that makes batches": (
        run((MODEL, VARIABLES, lambda: [X])),
        r"`batches` must be an iterable.*: got function\. A function that makes batches must be called",
    ),
    "a loader with batch_size": (
        run((MODEL, VARIABLES, Loader()), batch_size=32),
        r"`batches` must be a pytree of arrays where .*: got Loader\. Leave `batch_size` out for a loader",
    ),
    "a name for a whole batch": (
        lambda: diagnostics.diagnose(MODEL, VARIABLES, [(X, Y, "north")] * 2, cross_entropy),
        r"got \(64, 4\), \(64,\), \(\)\. .*a name say, repeat for each sample: `numpy\.full\(n, name\)`",
    ),
    "the model from outside": (
        run(batch_size=32, call=lambda module, batch: MODEL.apply(VARIABLES, batch)),
        r"'BatchNorm_0' saw none\. Run it in `call`, as part of the module that `call` is given",
    ),
    "batch_size 0": (run(batch_size=0), "`batch_size` must be a positive integer: got 0"),
    "batch_size 1": (run(batch_size=1), r"more than one value per channel: got .* shape \(1, 8\).*`method=.exact"),
    "NaN": (
        run((MODEL, VARIABLES, np.where(X > 8, np.nan, X)), batch_size=32),
        "must be finite: those of 'BatchNorm_0'",
    ),
    "a train state": (
        run((MODEL, state(), X), batch_size=32),
        r"got TrainState\. Of a train state pass `\{\"params\": state.params, \"batch_stats\": state.batch_stats\}`\. "
        r"This TrainState has no statistics.*field `batch_stats: Any`.*`state.replace\(batch_stats=",
    ),
    "a train state with statistics": (
        run((MODEL, StateWithStats.create(apply_fn=None, tx=optax.sgd(1.0), **VARIABLES), X), batch_size=32),
        r'got StateWithStats\. Of a train state pass `\{"params": state.params, "batch_stats": state.batch_stats\}`\.$',
    ),
    "a train state for both": (run((state(), X), batch_size=32), r"got TrainState. Of a train state pass the module"),
    "an nnx model": (run((NnxNet(nnx.Rngs(0)), VARIABLES, X), batch_size=32), r"Pass `\*nnx.split\(model\)`"),
    "other features": (
        run((MODEL, VARIABLES, X[:, :3]), batch_size=32),
        r"  ScopeParamShapeError: .*\nThe batch is\n  batch: float32 \(32, 3\)\nAll axes but the first must be as in",
    ),
    "lists": (run((MODEL, VARIABLES, X.tolist()), batch_size=32), "must be a pytree of arrays .*: got list"),
    "no batch norm": (run((nn.Dense(2), {"params": {}}, X), batch_size=32), "a model without batch normalization has"),
    "one loss": (diagnosed(lambda *args: cross_entropy(*args).mean()), r"got \(\)\. Leave out its mean"),
    "losses of an ensemble": (
        diagnosed(lambda *args: jnp.stack([cross_entropy(*args)] * 2)),
        r"`loss_fn` must give one value for each example, shape \(32,\): got \(2, 32\)\. Reduce all axes but",
    ),
    "no loss": (run(function=diagnostics.diagnose, batch_size=32), "missing 1 required positional argument: 'loss_fn'"),
    "a loss with its arguments exchanged": (
        diagnosed(lambda batch, logits: cross_entropy(logits, batch)),
        r"`loss_fn` must be `\(output, batch\) -> losses`, one for each example; it raised\n  TypeError: .*\n"
        r'It was given\n  output: float32 \(32, 2\)\n  batch\["image"\]',
    ),
    "one example to export": (
        run((MODEL, ESTIMATED, X[0], "unwritten.zip"), flaxbn.export_inference),
        r"batch: float32 \(2,\)\nAll axes but the first must be as in .*; one example is `x\[None\]`",
    ),
    "never estimated": (
        run((MODEL, VARIABLES, X[:8], "unwritten.zip"), flaxbn.export_inference),
        "were never estimated",
    ),
    "domain out of range": (lambda: DOMAINS.init(KEY, X, domain=2), r"must lie in \[0, 2\): got 2"),
    "no domain": (lambda: DOMAINS.init(KEY, X), "`domain` must be given to a layer with `num_domains=2`"),
    "domains by name": (
        lambda: DOMAINS.init(KEY, X, domain=SITES.tolist()),
        r"must be of integers: got <U5\. Number names by one list.*`number = \{name: i for i, name in enumerate\(names",
    ),
    "a domain by name": (lambda: DOMAINS.init(KEY, X, domain="north"), r"got <U5\. .*and pass `number\[domain\]`"),
    "a domain without domains": (lambda: LAYER.init(KEY, X, domain=0), r"got one without\. Give it their number"),
    "data of domains without names": (
        lambda: flaxbn.domains.estimate(MODEL, VARIABLES, [X, X], batch_size=32),
        r"`batches_by_domain` must be data by the name of their domain: got list\. Write `\{\"one\": one,",
    ),
    "a number of domains for their names": (
        lambda: flaxbn.domains.replicate(VARIABLES["batch_stats"], 2),
        r"`names` must be names of domains, .*: got int",
    ),
    "variables for statistics": (
        lambda: flaxbn.domains.replicate(VARIABLES, ["a", "b"]),
        r"of the collections \['batch_stats', 'params'\]\. Pass `variables\[\"batch_stats\"\]`",
    ),
    "statistics for moments": (
        lambda: diagnostics.compare(VARIABLES["batch_stats"], VARIABLES["batch_stats"]),
        r"`population` must be moments from `flaxbn\.population_moments`.*`compare\(batch_stats, population\)`",
    ),
    "an unknown domain": (
        lambda: flaxbn.domains.select(VARIABLES, {"a": VARIABLES["batch_stats"]}, "c"),
        r"got 'c'\. Known are \['a'\]",
    ),
    "a mask of other axes": (
        lambda: LAYER.init_with_output(KEY, np.ones((8, 8, 3), np.float32), mask=np.ones(8)),
        r"pass `mask\[:, None, None\]`",
    ),
    "arguments exchanged": (
        lambda: flaxbn.to_batch_stats(VARIABLES["batch_stats"], VARIABLES["batch_stats"]),
        r"`moments` must be a tree of Moments.*The moments come first: `to_batch_stats\(moments, batch_stats\)`",
    ),
    "only nothing": (run(batch_size=32, only=lambda path: False), "it accepts none of 'BatchNorm_0'"),
    "names to be cut": (
        run((MODEL, VARIABLES, {**BOTH, "site": SITES}), batch_size=32, call=by_image),
        r"got <U5 at batches\['site'\]\. Leave that array out, or number .*return_inverse=True\)`; or give an iterable",
    ),
    "memory_limit": (run(batch_size=32, memory_limit=10), '`memory_limit` is for `method="exact"`'),
    "model and variables exchanged": (
        run((VARIABLES, MODEL, X), batch_size=32),
        "The model comes first, then its varia",
    ),
    "the class": (run((Net, VARIABLES, X), batch_size=32), r"It is the class: make a model of it, `Net\(\.\.\.\)`"),
    "a model of Hugging Face": (
        run((types.SimpleNamespace(module=MODEL, params=VARIABLES), VARIABLES, X), batch_size=32),
        "got SimpleNamespace. It holds a module: pass `model.module, model.params`",
    ),
    "an optimizer": (
        run((nnx.Optimizer(NnxNet(nnx.Rngs(0)), optax.sgd(1.0), wrt=nnx.Param), X), flaxbn.apply),
        "`model` must be the model: got its Optimizer",
    ),
    "params without collection": (
        run((MODEL, VARIABLES["params"], X), flaxbn.apply),
        r"`variables` hold 'BatchNorm_0', 'Dense_0', 'Dense_1': they must be what `model.init` returned",
    ),
    "a key misspelled": (
        run((MODEL, VARIABLES, BOTH), batch_size=32, call=lambda m, b: m(b["imgae"])),
        r"`call` must run the model on a batch, `\(module, batch\) -> output`; it raised\n  KeyError: 'imgae'\n(.*\n)*"
        r'  call=lambda module, batch: module\(batch\["image"\]\)$',
    ),
    "weights that do not fit": (
        run((MODEL, VARIABLES, X), batch_size=32, sample_weight=lambda b: b["weight"]),
        r"`sample_weight` must be `batch -> weights`, one for each sample; it raised\n(.*\n)*  batch: float32 \(32,",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_new_users_are_told(name):
    """Ours first, on one screen, and what a framework raised is behind it."""
    function, message = MISTAKES[name]
    with pytest.raises((TypeError, ValueError, KeyError), match=message) as raised:
        function()
    assert len(str(raised.value).splitlines()) <= LINES
    if "raised\n" in message or "call=lambda" in message:
        assert type(raised.value) is flaxbn.CallError
        assert raised.value.__cause__ is not None


FUNCTIONS = {
    "apply": flaxbn.apply,
    "estimate_population_stats": lambda *args: ESTIMATE(*args, batch_size=32),
    "exact": lambda *args: ESTIMATE(*args, batch_size=32, method="exact"),
    "population_moments": lambda *args: flaxbn.population_moments(*args, batch_size=32),
    "plan": lambda *args: flaxbn.plan(*args, batch_size=32),
    "diagnose": lambda *args: diagnostics.diagnose(*args, cross_entropy, batch_size=32),
    "gap": lambda *args: diagnostics.gap(*args, cross_entropy, batch_size=32),
    "batch_noise": lambda *args: diagnostics.batch_noise(*args, batch_size=32),
    "rows_of": diagnostics.rows_of,
    "domains.estimate": lambda m, v, b: flaxbn.domains.estimate(m, v, {"a": b}, batch_size=32),
    "assert_batch_independent": flaxbn.assert_batch_independent,
    "export_inference": lambda *args: flaxbn.export_inference(*args, "unwritten.zip"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_that_runs_a_model_says_how(name):
    with pytest.raises(
        flaxbn.CallError, match=r'  call=lambda module, batch: module\(batch\["image"\], train=False\)$'
    ):
        FUNCTIONS[name](NeedsTrain(), NEEDS, BOTH)
    parts = nnx.split(NnxNeedsTrain(nnx.Rngs(0)))
    with pytest.raises(flaxbn.CallError, match=r'  call=lambda model, batch: model\(batch\["image"\], train=False\)$'):
        FUNCTIONS[name](*parts, BOTH)
    with pytest.raises(TypeError, match="got TrainState"):
        FUNCTIONS[name](MODEL, state(), X)


def test_what_is_proposed_runs():
    """Not only does it look right."""
    with pytest.raises(flaxbn.CallError) as raised:
        flaxbn.apply(NeedsTrain(), NEEDS, BOTH)
    call = eval(str(raised.value).splitlines()[-1].removeprefix("  call="))
    np.testing.assert_allclose(
        flaxbn.apply(NeedsTrain(), NEEDS, BOTH, call=call), NeedsTrain().apply(NEEDS, X, False), rtol=1e-6
    )


class Signature(nn.Module):
    """For models with arguments of every kind."""

    @nn.compact
    def __call__(self, image, mask, deterministic, scale=1.0, *, is_training=True, prompt):
        return nn.Dense(2)(image)


def test_arguments_are_found_by_their_names():
    batch = {"aux": X[:, None, None], "mask": X > 0, "image": X}
    with pytest.raises(flaxbn.CallError) as raised:
        flaxbn.apply(Signature(), {}, batch)
    assert str(raised.value).endswith(
        'module(batch["image"], mask=batch["mask"], deterministic=True, is_training=False, prompt=...)'
    )


@pytest.mark.parametrize(
    ("batch", "code"),
    [
        ((Y, X), "batch[1]"),
        ({"pixels": np.zeros((4, 8, 8, 1), np.uint8), "weight": np.ones(4, np.float32)}, 'batch["pixels"]'),
        ({"a": {"b": [X, X[:, 0]]}, "names": ["x"] * 64}, 'batch["a"]["b"][0]'),
        ({0: X, 1: Y}, "batch[0]"),
    ],
)
def test_the_main_input_of_a_batch(batch, code):
    with pytest.raises(flaxbn.CallError) as raised:
        flaxbn.apply(MODEL, VARIABLES, batch)
    assert str(raised.value).endswith(f"module({code})")


def test_what_a_batch_holds_is_not_printed():
    batch = {"image": X, "names": ["secret"] * 64, "kind": "secret", "more": np.array(["secret"] * 64)}
    many = {f"part{i}": X for i in range(9)}
    with pytest.raises(
        flaxbn.CallError, match=r'  batch\["kind"\]: str\n.*<U6 \(64,\)\n.*: list of 64 str\n'
    ) as raised:
        flaxbn.apply(MODEL, VARIABLES, batch)
    assert "secret" not in str(raised.value)
    with pytest.raises(flaxbn.CallError, match=r'batch\["part4"\]: float32 \(64, 4\)\n  and 4 more\n'):
        flaxbn.apply(MODEL, VARIABLES, many)


class MineError(Exception):
    pass


@pytest.mark.parametrize("function", [flaxbn.apply, FUNCTIONS["gap"], FUNCTIONS["estimate_population_stats"]])
@pytest.mark.parametrize(
    "error", [MineError("mine"), ValueError("mine"), KeyError("mine")], ids=lambda e: type(e).__name__
)
def test_what_users_raise_is_theirs(function, error):
    """So that `except` finds it; a note tells what the batch is."""

    class Raises(nn.Module):
        @nn.compact
        def __call__(self, batch):
            nn.BatchNorm(use_running_average=True)(batch["image"])
            raise error

    variables = {"params": {}, "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}
    variables["params"] = {"BatchNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    with pytest.raises(type(error), match="mine") as raised:
        function(Raises(), variables, BOTH)
    assert raised.value is error
    assert any('The batch is\n  batch["image"]: float32' in note for note in raised.value.__notes__)


def test_one_image_taken_for_a_batch():
    """Convolutions run on a single image without a word."""

    class Images(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Conv(2, (1, 1))(x)).mean((-3, -2))

    images = X.reshape(64, 2, 2, 1)
    variables = jax.jit(Images().init)(KEY, images)
    found = diagnostics.diagnose(Images(), variables, images, cross_entropy, call=lambda m, b: m(b[0]), batch_size=16)
    assert [finding.trap for finding in found.findings] == ["training mode at inference"]
    assert "no output has an axis of examples, so that `call` may have taken one example" in str(found)


def test_names_that_are_in_a_module():
    with pytest.raises(AttributeError, match=r"no attribute 'diagnose'; .* may be in `flaxbn\.diagnostics`"):
        _ = flaxbn.diagnose


def test_assertions_of_the_model_are_its_own():
    def call(module, batch):
        assert batch.ndim == 4, "images have four axes"
        return module(batch)

    with pytest.raises(AssertionError, match="images have four axes"):
        flaxbn.apply(MODEL, VARIABLES, X, call=call)


def test_errors_of_this_package_stay_as_they_are():
    with pytest.raises(ValueError, match=r"^`domain` belongs to a layer with `num_domains`: got one without") as raised:
        flaxbn.apply(
            flaxbn.BatchNorm(use_running_average=True),
            {
                "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
                "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
            },
            X,
            call=lambda m, b: m(b, domain=0),
        )
    assert type(raised.value) is ValueError


def stream(names):
    for start in range(0, 64, 8):
        rows = slice(start, start + 8)
        site = np.repeat("north" if start < 32 else "south", 8)
        yield {
            "image": X[rows],
            "label": Y[rows],
            "site": names(site),
            "file": [f"{i}.png" for i in range(start, start + 8)],
        }


@pytest.mark.parametrize("names", [list, np.asarray, lambda a: a.astype(object)], ids=["list", "array", "objects"])
def test_sites_may_be_names(names):
    """As they come out of loaders; what is found is what numbers give."""
    numbered = [{**batch, "site": batch["site"] == "south"} for batch in stream(np.asarray)]
    for batch in numbered:
        del batch["file"]
    expected = diagnostics.diagnose(
        MODEL, VARIABLES, numbered, cross_entropy, call=by_image, domain=lambda b: b["site"]
    )
    for given in (stream(names), [*stream(names)]):
        found = diagnostics.diagnose(MODEL, VARIABLES, given, cross_entropy, call=by_image, domain=lambda b: b["site"])
        assert [*found.noise] == ["north", "south"]
        assert found.noise["south"] == expected.noise[True]
        assert found.gap["south"] == expected.gap[True]
        assert str(found) == str(expected)


def test_sites_may_be_names_in_arrays():
    given = {"image": X, "label": Y, "site": np.repeat(["north", "south"], 32)}
    options = {"call": by_image, "batch_size": 8}
    found = diagnostics.diagnose(MODEL, VARIABLES, given, cross_entropy, domain=lambda b: b["site"], **options)
    assert [*found.noise] == ["north", "south"]
    noise = diagnostics.batch_noise(MODEL, VARIABLES, given, **options)
    assert noise == diagnostics.batch_noise(MODEL, VARIABLES, BOTH, **options)
    flaxbn.assert_batch_independent(MODEL, VARIABLES, given, call=by_image)


def test_domain_that_does_not_fit():
    with pytest.raises(flaxbn.CallError, match=r"`domain` must be `batch -> labels`.*\n  KeyError: 'site'\n"):
        diagnosed(cross_entropy, domain=lambda batch: batch["site"])()
    with pytest.raises(ValueError, match=r"`domain` must give one value for each example, shape \(32,\): got \(\)"):
        diagnosed(cross_entropy, domain=lambda batch: "north")()


def test_losses_of_batches_with_names_are_those_without():
    losses = diagnostics.gap(MODEL, VARIABLES, stream(list), cross_entropy, call=by_image)[None]
    plain = diagnostics.gap(MODEL, VARIABLES, BOTH, cross_entropy, call=by_image, batch_size=8)[None]
    assert losses == plain


def test_names_cannot_be_exported():
    with pytest.raises(TypeError, match=r"`example` must hold arrays of numbers: got <U5 at example\['site'\]"):
        flaxbn.export_inference(MODEL, VARIABLES, {"image": X, "site": SITES}, "unwritten.zip", call=by_image)
