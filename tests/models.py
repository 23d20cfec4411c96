"""Small models of every kind that Flax users build, and data for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flaxbn

X = np.random.default_rng(0).normal(1.0, 2.0, size=(40, 3, 6)).astype(np.float32)


BATCHES = [X[:16], X[16:32], X[32:]]


class Subclass(nn.BatchNorm):
    """Overrides nothing."""


class CallsSuper(nn.BatchNorm):
    """Calls the stock layer, and has a parameter of its own."""

    @nn.compact
    def __call__(self, x, use_running_average=None, **kwargs):
        gain = self.param("gain", nn.initializers.constant(1.5), (x.shape[-1],))
        return super().__call__(x * gain.reshape((1,) * (x.ndim - 1) + (-1,)), use_running_average, **kwargs)


class CallsOurSuper(flaxbn.BatchNorm):
    """The same on this library's layer."""

    @nn.compact
    def __call__(self, x, use_running_average=None, **kwargs):
        return 2 * super().__call__(x, use_running_average, **kwargs)


class MLP(nn.Module):
    """Dense layers with batch normalization, an activation and dropout behind each, and a Dense layer for `outputs`."""

    features: tuple[int, ...] = (6, 5)
    norm: object = nn.BatchNorm
    momentum: float = 0.0
    activation: object = staticmethod(nn.relu)
    dropout: float = 0.0
    outputs: int | None = None
    dtype: object = None

    @nn.compact
    def __call__(self, x, train=False):
        for features in self.features:
            norm = self.norm(use_running_average=not train, momentum=self.momentum, dtype=self.dtype)
            x = self.activation(norm(nn.Dense(features, dtype=self.dtype)(x)))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x if self.outputs is None else nn.Dense(self.outputs, dtype=self.dtype)(x)


class OneLayer(nn.Module):
    """A single layer, named, on data as they are."""

    norm: object = nn.BatchNorm
    momentum: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        return self.norm(use_running_average=not train, momentum=self.momentum, name="norm")(x)


class ConvNet(nn.Module):
    """Four layers of convolution, batch normalization and ReLU, with dropout between."""

    norm: object = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(4):
            x = nn.Conv(4, (3, 3), padding="VALID" if x.shape[1] > 3 else "SAME")(x)
            x = self.norm(use_running_average=not train, momentum=0.0)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return x.mean((1, 2))


class Flattened(nn.Module):
    """The batch axis is merged with another before the layer."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x.reshape(-1, x.shape[-1]))


class MaskedLayer(nn.Module):
    """A single layer whose mask is part of the batch."""

    @nn.compact
    def __call__(self, batch):
        return flaxbn.BatchNorm(use_running_average=True, name="norm")(batch["x"], mask=batch["mask"])


class Noisy(nn.Module):
    """A layer that sees the data, and one that sees nothing but random numbers."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="data")(x)
        x = 0 * x + jax.random.normal(self.make_rng("noise"))
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class Residual(nn.Module):
    """Two layers around a residual connection, and one behind it."""

    norm: object = nn.BatchNorm
    dtype: object = None

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return self.norm(use_running_average=not train, momentum=0.0, dtype=self.dtype)(x)

        x = nn.relu(norm(nn.Dense(4, dtype=self.dtype)(x)))
        x = x + nn.relu(norm(nn.Dense(4, dtype=self.dtype)(x)))
        return norm(nn.Dense(2, dtype=self.dtype)(x))


class Pair(nn.Module):
    """Two layers behind each other, and dropout."""

    norm: object = nn.BatchNorm
    mix: object = staticmethod(lambda x: x)

    @nn.compact
    def __call__(self, x, train=False):
        x = self.norm(use_running_average=not train, name="first")(nn.Dense(4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(self.mix(jnp.tanh(x)))
        return self.norm(use_running_average=not train, name="second")(x)


class DomainLayer(nn.Module):
    """A single layer with statistics for each domain; the domain is part of the batch."""

    count: int

    @nn.compact
    def __call__(self, batch):
        norm = flaxbn.BatchNorm(use_running_average=True, num_domains=self.count, name="norm")
        return norm(batch["x"], domain=batch["domain"])


def renorm(**kwargs):
    return flaxbn.BatchRenorm(r_max=1.0, d_max=0.0, **kwargs)


class Block(nn.Module):
    norm: object = nn.BatchNorm
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = self.norm(use_running_average=not self.train, momentum=0.0, name="norm")(x)
        return nn.relu(x)


class ScanBlock(Block):
    @nn.compact
    def __call__(self, x, _):
        return Block(self.norm, self.train, name="block")(x), None


class Deep(nn.Module):
    """Three blocks, each wrapped by `wrap`."""

    norm: object = nn.BatchNorm
    wrap: object = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(3):
            x = self.wrap(Block)(self.norm, train, name=f"block_{i}")(x)
        return x


class Scanned(nn.Module):
    axis: int = 0
    reverse: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = Block(train=train)(x)
        layers = nn.scan(
            ScanBlock,
            variable_axes={"params": 0, "batch_stats": self.axis},
            split_rngs={"params": True},
            length=3,
            reverse=self.reverse,
        )
        return layers(train=train, name="layers")(x, None)[0]


class Loop(nn.Module):
    """One layer called several times."""

    length: int

    @nn.compact
    def __call__(self, x):
        options = {"variable_broadcast": ["params", "batch_stats"], "split_rngs": {"params": False}}
        return nn.scan(ScanBlock, **options, length=self.length)(name="layers")(x, None)[0]


class OwnLanes(nn.Module):
    """nn.vmap with statistics of each lane's own: the lanes are axis 1 of the input."""

    axis: int = 0

    @nn.compact
    def __call__(self, x, train=False):
        block = nn.vmap(
            Block,
            in_axes=1,
            out_axes=1,
            variable_axes={"params": 0, "batch_stats": self.axis},
            split_rngs={"params": True},
        )
        x = block(train=train, name="lanes")(x)
        return Block(train=train, name="after")(x)


class Setup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(6)
        self.norms = [nn.BatchNorm(momentum=0.0) for _ in range(2)]

    def __call__(self, x, train=False):
        for norm in self.norms:
            x = norm(x=self.dense(x), use_running_average=not train)
        return x


class Sequential(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.0)
        return nn.Sequential([nn.Dense(6), norm, nn.relu, nn.Dense(2), nn.tanh])(x)


class Shared(nn.Module):
    """A block whose scope is that of its parent."""

    def setup(self):
        self.inner = Setup()
        nn.share_scope(self, self.inner)

    def __call__(self, x, train=False):
        return self.inner(x, train)


class SeveralOutputs(nn.Module):
    """A dictionary of outputs, and a layer whose output is not used."""

    @nn.compact
    def __call__(self, x, train=False):
        hidden = Block(train=train)(x)
        Block(train=train, name="unused")(hidden)
        return {"logits": Block(train=train)(hidden), "hidden": (hidden, x.sum())}


class FeatureAxes(nn.Module):
    norm: object = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = self.norm(use_running_average=not train, momentum=0.0, axis=(1, -1))(x)
        return self.norm(use_running_average=not train, momentum=0.0, axis=1)(x**2)


class Bare(nn.BatchNorm):
    """The model is a layer itself."""

    momentum: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        return super().__call__(x, use_running_average=not train)


class RemembersCalls(nn.Module):
    """Writes a cache in evaluation."""

    @nn.compact
    def __call__(self, x, train=False):
        calls = self.variable("cache", "calls", lambda: jnp.zeros(()))
        x = Block(train=train)(x)
        if not train:
            calls.value += 1
        return x


MODELS = {
    "stock": Deep(),
    "ours": Deep(flaxbn.BatchNorm),
    "renorm": Deep(renorm),
    "subclass": Deep(Subclass),
    "calls super": Deep(CallsSuper),
    "calls our super": Deep(CallsOurSuper),
    "remat": Deep(wrap=nn.remat),
    "jit": Deep(wrap=nn.jit),
    "remat of jit of ours": Deep(flaxbn.BatchNorm, wrap=lambda block: nn.remat(nn.jit(block))),
    "scan": Scanned(),
    "scan on axis 1": Scanned(axis=1),
    "vmap": OwnLanes(),
    "vmap on axis 1": OwnLanes(axis=1),
    "setup and keyword": Setup(),
    "Sequential": Sequential(),
    "share_scope": Shared(),
    "several outputs": SeveralOutputs(),
    "feature axes": FeatureAxes(),
    "our feature axes": FeatureAxes(flaxbn.BatchNorm),
    "root": Bare(),
    "cache": RemembersCalls(),
}


def initialized(model, x=X):
    """Variables with stored statistics that are far from the data's."""
    variables = jax.jit(model.init)(jax.random.key(1), x)
    shifted = jax.tree.map(lambda a: a + 7 if a.dtype == jnp.float32 else a, variables["batch_stats"])
    return {**variables, "batch_stats": shifted}


def train(module, batch):
    return module(batch, train=True)


def dense_normalized(variables, x, path):
    """One Dense, batch normalization and ReLU in float64, and the batch statistics."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    for key in path:
        p = p[key]
    x = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    x = (x - mean) / np.sqrt(var + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    return np.maximum(x, 0), mean, var


class Repeated(nn.Module):
    """One block, called three times: in a loop, or by nn.scan with carried or broadcast statistics."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "loop":
            block = Block(name="block")
            for _ in range(3):
                x = block(x)
            return x
        shared = {
            "broadcast": {"variable_broadcast": ["params", "batch_stats"]},
            "carried": {"variable_broadcast": "params", "variable_carry": "batch_stats"},
        }[self.how]
        return nn.scan(ScanBlock, **shared, split_rngs={"params": False}, length=3)(name="layers")(x, None)[0]


class SharedLanes(nn.Module):
    """nn.vmap over axis 1 with statistics that all lanes share."""

    @nn.compact
    def __call__(self, x):
        block = nn.vmap(
            Block,
            in_axes=1,
            out_axes=1,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
        )
        return Block(name="after")(block(name="lanes")(x))


class NormCell(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry, x):
        carry = nn.BatchNorm(use_running_average=True, name="norm")(0.5 * carry + x)
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self):
        return 1


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(NormCell(name="cell"), variable_broadcast=["params", "batch_stats"], reverse=True)(x)


class Branches(nn.Module):
    """Large inputs go one way, small ones another; a layer follows."""

    @nn.compact
    def __call__(self, x):
        large, small = Block(name="large"), Block(name="small")
        if self.is_initializing():
            large(x), small(x)
        else:
            x = nn.cond(x.mean() > 1, lambda m, x: large(x), lambda m, x: small(2 * x), self, x)
        return Block(name="after")(x)


class Masked(nn.Module):
    norm: object = flaxbn.BatchNorm

    @nn.compact
    def __call__(self, batch):
        mask = batch["mask"]
        x = nn.Dense(6, name="Dense_0")(batch["x"])
        if self.norm is nn.BatchNorm:
            mask = jnp.broadcast_to(mask[..., None], x.shape)
        return self.norm(use_running_average=True, name="norm")(x, mask=mask)


class InsideWhile(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        if self.is_initializing():
            return block(x)
        return nn.while_loop(
            lambda m, x: x.sum() > 0, lambda m, x: block(x) - 1, self, x, broadcast_variables=["params", "batch_stats"]
        )


class Untracked(nn.Module):
    """nn.scan that does not pass batch_stats on."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0} if self.is_initializing() else {"params": 0}
        layers = nn.scan(ScanBlock, variable_axes=axes, split_rngs={"params": True}, length=2)
        return layers(name="layers")(x, None)[0]
