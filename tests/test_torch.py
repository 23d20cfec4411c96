"""Statistics from torch: evaluation by Flax is evaluation by torch; torch_cases/make.py made the cases."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flaxbn

CASES = np.load(pathlib.Path(__file__).parent / "torch_cases" / "cases.npz")
WIDTH = 4


def case(name):
    """The input, the output and the `state_dict` of a case."""
    begin = f"{name}|state|"
    state_dict = {key.removeprefix(begin): CASES[key] for key in CASES.files if key.startswith(begin)}
    return CASES[f"{name}|x"], CASES[f"{name}|y"] if f"{name}|y" in CASES.files else None, state_dict


def channels_last(x):
    return np.moveaxis(x, 1, -1)


class Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return flaxbn.BatchNorm(use_running_average=True, name=name)

        y = nn.Conv(self.features, (3, 3), self.stride, padding=1, use_bias=False, name="conv1")(x)
        y = nn.relu(norm("bn1")(y))
        y = norm("bn2")(nn.Conv(self.features, (3, 3), padding=1, use_bias=False, name="conv2")(y))
        if self.stride > 1:
            x = nn.Conv(self.features, (1, 1), self.stride, use_bias=False, name="shortcut")(x)
            x = norm("shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (7, 7), 2, padding=3, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i in range(8):
            x = Block(WIDTH * 2 ** (i // 2), 2 if i % 2 == 0 and i else 1, name=f"block{i}")(x)
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


def torch_place(path):
    """Where torch has the layer, or the convolution, at a path of `ResNet18`."""
    *block, name = path.split("/")
    if not block:
        return name
    number = int(block[0].removeprefix("block"))
    name = {"shortcut": "downsample.0", "shortcut_bn": "downsample.1"}.get(name, name)
    return f"layer{number // 2 + 1}.{number % 2}.{name}"


def resnet18(state_dict):
    """The variables with torch's convolutions; the norms are still as they were initialized."""
    variables = jax.jit(ResNet18().init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))

    def leaf(path, old):
        *place, name = (key.key for key in path)
        if name != "kernel":
            return state_dict["fc.bias"].astype(np.float32) if place == ["fc"] else old
        weight = state_dict[f"{torch_place('/'.join(place))}.weight"].astype(np.float32)
        return weight.T if place == ["fc"] else weight.transpose(2, 3, 1, 0)

    return {**variables, "params": jax.tree_util.tree_map_with_path(leaf, variables["params"])}


@pytest.mark.parametrize("name", ["1d", "1d_length", "2d", "3d", "sync", "without_affine"])
@pytest.mark.parametrize("layer", [nn.BatchNorm, flaxbn.BatchNorm])
def test_one_layer(name, layer):
    """1e-6 of values of order 1: both compute in float32."""
    x, y, state_dict = case(name)
    x = channels_last(x)
    model = layer(use_running_average=True)
    variables = flaxbn.torch.load(model.init(jax.random.key(0), x), state_dict, {"": ""})
    np.testing.assert_allclose(model.apply(variables, x), channels_last(y), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("layer", [nnx.BatchNorm, flaxbn.nnx.BatchNorm])
def test_nnx(layer):
    x, y, state_dict = case("2d")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([layer(5, use_running_average=True, rngs=rngs)])

        def __call__(self, x):
            return self.norms[0](x)

    model = Net(nnx.Rngs(0))
    state = nnx.split(model)[1]
    assert flaxbn.torch.propose(*nnx.split(model), channels_last(x), state_dict).confirm() == {"norms/0": ""}
    loaded = flaxbn.torch.load(state, state_dict, {"norms/0": ""})
    nnx.update(model, loaded)
    np.testing.assert_allclose(model(channels_last(x)), channels_last(y), rtol=1e-5, atol=2e-6)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)


@pytest.mark.parametrize("names", [torch_place, "proposed"])
def test_a_resnet(names):
    """20 layers: 1e-5 of the largest logit, since float32 convolutions differ in their order of summation."""
    x, y, state_dict = case("resnet18")
    variables = resnet18(state_dict)
    if names == "proposed":
        names = flaxbn.torch.propose(ResNet18(), variables, channels_last(x), state_dict).confirm()
        assert names == {path: torch_place(path) for path in names}
    loaded = flaxbn.torch.load(variables, state_dict, names)
    logits = jax.jit(ResNet18().apply)(loaded, channels_last(x))
    np.testing.assert_allclose(logits, y, atol=1e-5 * np.abs(y).max())
    assert np.abs(jax.jit(ResNet18().apply)(variables, channels_last(x)) - y).max() > 0.1 * np.abs(y).max()


def test_the_variance_that_flax_would_have_averaged():
    """n is 4 here: torch's variance is a third larger."""
    x, _, state_dict = case("trained")
    model = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = model.init(jax.random.key(0), channels_last(x))
    ours = model.apply(variables, channels_last(x), mutable=["batch_stats"])[1]["batch_stats"]
    for counts in (4, {"": 4}):
        loaded = flaxbn.torch.load(variables, state_dict, {"": ""}, counts=counts)["batch_stats"]
        np.testing.assert_allclose(loaded["var"], ours["var"], rtol=1e-6)
        np.testing.assert_allclose(loaded["mean"], ours["mean"], rtol=1e-6, atol=1e-7)
    plain = flaxbn.torch.load(variables, state_dict, {"": ""})["batch_stats"]
    np.testing.assert_allclose(plain["var"], ours["var"] * 4 / 3, rtol=1e-6)


def state_dict_of(*prefixes, channels=3, **more):
    """Layers with statistics that tell them apart."""
    found = {}
    for i, prefix in enumerate(prefixes, 1):
        found[f"{prefix}.running_mean"] = np.full(channels, i, np.float32)
        found[f"{prefix}.running_var"] = np.full(channels, 10.0 * i, np.float32)
        found[f"{prefix}.num_batches_tracked"] = np.asarray(100 * i)
    return found | more


class Stack(nn.Module):
    layers: int
    features: int = 3
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = flaxbn.BatchNorm(use_running_average=True, use_scale=self.affine, use_bias=self.affine)(x)
        return x


def init(model, channels=3):
    return model.init(jax.random.key(0), np.ones((2, channels), np.float32))


def propose(model, state_dict):
    return flaxbn.torch.propose(model, init(model), jax.ShapeDtypeStruct((2, 3), np.float32), state_dict)


def test_the_order_is_that_in_which_layers_run():
    """Not that of names, in which BatchNorm_10 comes before BatchNorm_2."""
    names = propose(Stack(11), state_dict_of(*(f"bn{i}" for i in range(11)))).confirm()
    assert names == {f"BatchNorm_{i}": f"bn{i}" for i in range(11)}


def test_steps_are_the_batches_that_torch_counted():
    model = flaxbn.BatchRenorm(use_running_average=True)
    loaded = flaxbn.torch.load(init(model), state_dict_of("a", "bn"), {"": "bn"})
    assert loaded["batch_stats"]["steps"] == 200
    assert loaded["batch_stats"]["steps"].dtype == jnp.float32


def test_domains_share_what_is_equal():
    layer = flaxbn.BatchNorm(use_running_average=True, num_domains=2)
    variables = layer.init(jax.random.key(0), np.ones((2, 3), np.float32), domain=0)
    alike = {f"{prefix}.weight": np.float32([1, 2, 3]) for prefix in "ab"}
    loaded = flaxbn.torch.load(variables, state_dict_of("a", "b", **alike), {"": ["a", "b"]})
    assert loaded["params"]["scale"].tolist() == [1, 2, 3]
    assert loaded["batch_stats"]["mean"].tolist() == [[1] * 3, [2] * 3]
    with pytest.raises(ValueError, match=r"the weight of torch's 'a', 'b'.*`domain_affine=True`"):
        flaxbn.torch.load(variables, state_dict_of("a", "b", **alike | {"b.weight": np.ones(3)}), {"": ["a", "b"]})


def test_steps_are_stacked_like_the_layers():
    variables = {
        "batch_stats": {"mean": np.zeros((2, 3), "f4"), "var": np.ones((2, 3), "f4"), "steps": np.zeros(2, "f4")}
    }
    loaded = flaxbn.torch.load(variables, state_dict_of("a", "b"), {"": ["a", "b"]})
    assert loaded["batch_stats"]["steps"].tolist() == [100, 200]


def test_what_is_stored_is_finite():
    variables = jax.tree.map(lambda a: a.astype(jnp.float16), init(Stack(1)))
    state_dict = state_dict_of("a") | {"a.running_var": np.float32([1, 1e6, 1])}
    with pytest.raises(ValueError, match=r"must be finite.*'batch_stats/BatchNorm_0/var' is not, in float16"):
        flaxbn.torch.load(variables, state_dict, {"BatchNorm_0": "a"})


def test_layers_of_a_scan_and_domains_are_stacked():
    variables = {"batch_stats": {"norm": {"mean": np.zeros((2, 3), np.float32), "var": np.ones((2, 3), np.float32)}}}
    loaded = flaxbn.torch.load(variables, state_dict_of("a", "b"), {"norm": ["a", "b"]})
    np.testing.assert_array_equal(loaded["batch_stats"]["norm"]["mean"], [[1] * 3, [2] * 3])
    np.testing.assert_array_equal(loaded["batch_stats"]["norm"]["var"], [[10] * 3, [20] * 3])


def test_what_is_not_named_stays():
    variables = init(Stack(2))
    loaded = flaxbn.torch.load(variables, state_dict_of("a"), {"BatchNorm_0": None, "BatchNorm_1": "a"})
    jax.tree.map(
        np.testing.assert_array_equal, loaded["batch_stats"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    )
    assert loaded["batch_stats"]["BatchNorm_1"]["mean"].tolist() == [1, 1, 1]


def test_dtypes_are_those_of_the_variables():
    variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16), init(Stack(1)))
    loaded = flaxbn.torch.load(variables, state_dict_of("a"), lambda path: "a")
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}


class Tensor:
    """What a tensor of torch looks like, as far as is needed: numpy cannot read one in bfloat16."""

    def __init__(self, value, dtype):
        self.value, self.dtype = value, dtype

    def detach(self):
        return self

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.value, "torch.float32")

    def __array__(self, dtype=None, copy=None):
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.value


def test_tensors():
    state_dict = {key: Tensor(value, "torch.bfloat16") for key, value in state_dict_of("a").items()}
    loaded = flaxbn.torch.load(init(Stack(1)), state_dict, {"BatchNorm_0": "a"})
    assert loaded["batch_stats"]["BatchNorm_0"]["var"].tolist() == [10, 10, 10]


def test_a_proposal_says_how_sure_it_is():
    names = propose(Stack(3), state_dict_of("a", "b"))
    assert str(names).splitlines() == [
        "layer        channels  torch",
        "BatchNorm_0         3  a     one of 2 of 3",
        "BatchNorm_1         3  b     one of 2 of 3",
        "BatchNorm_2         3  None  one of 2 of 3",
    ]
    with pytest.raises(ValueError, match=r"'BatchNorm_2' found none\. Write the names by hand"):
        names.confirm()
    with pytest.raises(TypeError, match=r"A proposal is a guess: .* `names.confirm\(\)`"):
        flaxbn.torch.load(init(Stack(3)), state_dict_of("a", "b"), names)


@pytest.mark.parametrize(
    ("state_dict", "names", "message"),
    [
        (
            state_dict_of("a"),
            {"BatchNorm_0": "a"},
            r"must name each layer, and no other: .*\['BatchNorm_0', 'BatchNorm_1'\]",
        ),
        (state_dict_of("a", "b"), {"BatchNorm_0": "a", "BatchNorm_1": "a"}, "'a' is named twice"),
        (
            state_dict_of("a", "b"),
            {"BatchNorm_0": "a", "BatchNorm_1": "c"},
            r"'c' has no entries. .* There are 'a', 'b'",
        ),
        (
            state_dict_of("a", "b", channels=4),
            lambda path: "ab"[int(path[-1])],
            r"as many channels: got \(4,\) .* \(3,\)",
        ),
        (
            state_dict_of("a") | {"b.weight": np.ones(3)},
            lambda path: "ab"[int(path[-1])],
            r"'b' has \['weight'\]\. \(With",
        ),
    ],
)
def test_errors(state_dict, names, message):
    with pytest.raises(ValueError, match=message):
        flaxbn.torch.load(init(Stack(2)), state_dict, names)


def test_an_affine_parameter_is_not_lost():
    state_dict = state_dict_of("a", **{"a.weight": np.float32([1, 2, 1])})
    with pytest.raises(ValueError, match="no place in 'BatchNorm_0' for the weight of torch's 'a'"):
        flaxbn.torch.load(init(Stack(1, affine=False)), state_dict, {"BatchNorm_0": "a"})
    flaxbn.torch.load(init(Stack(1, affine=False)), state_dict_of("a"), {"BatchNorm_0": "a"})


def test_nothing_to_load_from_or_into():
    with pytest.raises(ValueError, match=r"must hold the `running_mean` .* `checkpoint\['model'\]"):
        propose(Stack(1), {"model": {}})
    with pytest.raises(ValueError, match="must hold the statistics of a batch-norm layer"):
        flaxbn.torch.load({"params": {}}, state_dict_of("a"), {})
    with pytest.raises(ValueError, match=r"`counts` must be by the paths of layers, \['BatchNorm_0'\]: got \['x'\]"):
        flaxbn.torch.load(init(Stack(1)), state_dict_of("a"), {"BatchNorm_0": "a"}, counts={"x": 4})
    with pytest.raises(ValueError, match="`counts` must be 2 or more, values per channel: got 1"):
        flaxbn.torch.load(init(Stack(1)), state_dict_of("a"), {"BatchNorm_0": "a"}, counts=1)
