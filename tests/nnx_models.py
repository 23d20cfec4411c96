"""Small models of flax.nnx, of every kind that users build, and what their statistics are in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import merged

D = 4
X = (np.random.default_rng(0).normal(size=(90, D)) * [1, 2, 3, 0.5] + [0, 5, -3, 1]).astype(np.float32)


class Block(nnx.Module):
    """x + tanh(norm(linear(x)))."""

    def __init__(self, rngs, norm=nnx.BatchNorm):
        self.linear, self.norm = nnx.Linear(D, D, rngs=rngs), norm(D, rngs=rngs)

    def __call__(self, x):
        return x + nnx.tanh(self.norm(self.linear(x)))


class Chain(nnx.Module):
    """Two blocks, and dropout behind them."""

    def __init__(self, rngs, norm=nnx.BatchNorm):
        self.blocks = nnx.List([Block(rngs, norm), Block(rngs, norm)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.dropout(x)


def stacked(rngs, count=3):
    """So many blocks, along a leading axis of their variables."""
    return nnx.split_rngs(splits=count)(nnx.vmap(Block, in_axes=(0,), out_axes=0))(rngs)


class Scanned(nnx.Module):
    """nnx.scan over blocks with statistics of their own, plain, rematerialized or compiled."""

    def __init__(self, rngs, wrap=lambda body: body):
        self.blocks, self.wrap = stacked(rngs), wrap

    def __call__(self, x):
        body = self.wrap(lambda x, block: block(x))
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class StackedInCall(nnx.Module):
    """Blocks that the call itself stacks, to scan over them."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, x):
        graphdefs, states = zip(*map(nnx.split, self.blocks))
        assert graphdefs[1:] == graphdefs[:-1]
        blocks = nnx.merge(graphdefs[0], jax.tree.map(lambda *a: jnp.stack(a), *states))
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


class Repeated(nnx.Module):
    """One block three times, by nnx.scan: carried, or broadcast."""

    def __init__(self, rngs, how):
        self.block, self.how = Block(rngs), how

    def __call__(self, x):
        if self.how == "broadcast":
            scan = nnx.scan(lambda x, block: block(x), length=3, in_axes=(nnx.Carry, None), out_axes=nnx.Carry)
            return scan(x, self.block)
        carried = nnx.scan(lambda c: (c[0], c[0](c[1])), length=3, in_axes=(nnx.Carry,), out_axes=nnx.Carry)
        return carried((self.block, x))[1]


class Members(nnx.Module):
    """nnx.vmap over blocks with statistics of their own."""

    def __init__(self, rngs):
        self.blocks = stacked(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x)


class Lanes(nnx.Module):
    """Two layers over the lanes of an axis, which lies behind the examples, and over which both synchronize."""

    def __init__(self, rngs, norm=nnx.BatchNorm, *, own, **options):
        def make(rngs):
            return norm(D, axis_name="lanes", rngs=rngs, **options)

        if own:  # each lane has stored statistics of its own
            make = nnx.split_rngs(splits=3)(nnx.vmap(make, in_axes=(0,), out_axes=0))
        self.first, self.second, self.axis = make(rngs), make(rngs), 0 if own else None

    def __call__(self, x):
        axes = (self.axis, self.axis, 1)

        @nnx.vmap(in_axes=axes, out_axes=1, axis_name="lanes")
        def run(first, second, x):
            return second(nnx.tanh(first(x) * jnp.arange(1.0, 1 + D)[None]))

        return run(self.first, self.second, x)


class Within(nnx.Module):
    """One block inside a transformation, with a layer of ours."""

    def __init__(self, rngs, run, norm=nnx.BatchNorm):
        self.block, self.run = Block(rngs, norm), run

    def __call__(self, x):
        return self.run(self.block, x)


def shared_lanes(block, x):
    """nnx.vmap over the examples with statistics that all lanes share."""
    return nnx.vmap(lambda block, x: block(x), in_axes=(None, 0))(block, x[:, None])[:, 0]


def remat(block, x):
    return nnx.remat(lambda block, x: block(x))(block, x)


def cond(block, x):
    return nnx.cond(len(x) > 0, lambda block, x: block(x), lambda block, x: x, block, x)


def fori(block, x):
    return nnx.fori_loop(0, 1, lambda i, c: (c[0], c[0](c[1])), (block, x))[1]


@nnx.jit
def compiled(block, x):
    return block(x)


class Tied(nnx.Module):
    """One layer behind two linear ones, under two names."""

    def __init__(self, rngs):
        self.linears = nnx.List([nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)])
        self.again = self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        x = x + nnx.tanh(self.norm(self.linears[0](x)))
        return x + nnx.tanh(self.again(self.linears[1](x)))


class CallsSuper(nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return super().__call__(2 * x, *args, **kwargs)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(3 * x)


class LinenInside(nnx.Module):
    """A layer of nnx, and behind it a Linen module."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.inner = nnx.bridge.ToNNX(LinenNorm(), rngs=rngs).lazy_init(X[:2])

    def __call__(self, x):
        return self.inner(self.norm(x) * jnp.arange(1.0, 1 + D).reshape(1, D) + x)


class InsideLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.to_linen(Block, name="block")(x)


# ---- float64


def moments(x):
    x = np.asarray(x, np.float64)
    return len(x), x.mean(0), x.var(0)


def normalized(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5)


def of_chain(linears, batches):
    """The statistics of layers in a chain of blocks, for each layer those of each batch."""
    found = [[] for _ in linears]
    for x in batches:
        x = np.asarray(x, np.float64)
        for linear, layer in zip(linears, found):
            z = x @ linear[0] + linear[1]
            layer.append(moments(z))
            x = x + np.tanh(normalized(z, *layer[-1][1:]))
    return found


def merge_all(layers):
    """Of each layer the statistics of all batches."""
    return [dict(zip(("mean", "var"), merged(*zip(*layer)))) for layer in layers]


def weights(linear):
    """Kernel and bias in float64; of stacked layers a list of them."""
    kernel, bias = (np.asarray(v[...], np.float64) for v in (linear.kernel, linear.bias))
    return (kernel, bias) if kernel.ndim == 2 else [*zip(kernel, bias)]


def strided(batch_size, x=X):
    """The batches of an estimate of arrays."""
    count = -(-len(x) // batch_size)
    return [x[k::count] for k in range(count)]
