"""Random models: what may follow what, given the shape of an example and the kind of numbers."""

from dataclasses import replace

import numpy as np
from fuzz.blocks import Cond, Lifted, Scan, Vmap, Wrapped
from fuzz.nodes import (
    FOREIGN,
    Around,
    Attention,
    Branches,
    Dropout,
    Layer,
    Line,
    Masked,
    Norm,
    Residual,
    Sequence,
    Tied,
    flat,
)
from fuzz.place import Place

CLASSES = ["nn.BatchNorm", "nn.BatchNorm", "flaxbn.BatchNorm", "flaxbn.BatchNorm", "flaxbn.BatchRenorm", "Scaled"]
OPTIONS = ["", "", "", "epsilon=1e-3", "use_scale=False", "use_bias=False", "use_scale=False, use_bias=False"]
POLICY = "nn.remat({}, policy=jax.checkpoint_policies.dots_saveable)"
WRAPS = ["{}", "nn.remat({})", "nn.jit({})", "nn.remat(nn.jit({}))", "nn.jit(nn.remat({}))", POLICY]


class Draw:
    """Draws parts of models by a generator of numpy."""

    def __init__(self, rng):
        self.rng = rng

    def one_of(self, values):
        return values[self.rng.integers(len(values))]

    def chance(self, share):
        return self.rng.random() < share

    def parts(self, place, count):
        """So many parts, and the place behind them."""
        found = []
        for _ in range(count):
            kinds = [kind for kind, fits in KINDS if fits(place)]
            node, shape = self.one_of(kinds)(self, place)
            found.append(node)
            place = replace(place, shape=shape)
        return tuple(found), place

    def body(self, place, share=1.0, **changes):
        """A body that returns the shape that it takes, in most cases with a batch-norm layer."""
        place = replace(place, keep=True, depth=place.depth + 1, **changes)
        nodes, end = self.parts(place, 1 + self.rng.integers(2))
        if self.chance(share) and not has_norm(nodes):
            node, _ = norm(self, end)
            nodes = (*nodes, node)
        if end.shape != place.shape:
            nodes = (*nodes, Layer("Dense", str(place.features)))
        return nodes

    def model(self, shape, is_complex, count):
        """The parts of a model with a batch-norm layer or more."""
        nodes, place = self.parts(Place(shape, complex=is_complex), count)
        if len(shape) > 1 and self.chance(0.15):  # else a batch may be left with a single position
            nodes = (Masked(Norm(self.one_of(["nn.BatchNorm", "flaxbn.BatchNorm"]))), *nodes)
        while not has_norm(nodes):
            nodes = (*nodes, norm(self, place)[0])
        return nodes


def has_norm(nodes):
    return any(isinstance(node, Norm) and node.cls != "Unknown" for node in flat(nodes))


def dense(draw, place):
    features = int(draw.rng.integers(3, 7))
    return Layer("Dense", str(features)), (*place.shape[:-1], features)


def conv(draw, place):
    features, spatial = int(draw.rng.integers(3, 6)), len(place.shape) - 1
    kernel = f"({', '.join(['3'] * spatial)},)"
    if place.keep or draw.chance(0.6) or min(place.shape[:-1]) < 4:
        return Layer("Conv", f"{features}, {kernel}"), (*place.shape[:-1], features)
    if draw.chance(0.5):
        return Layer("Conv", f"{features}, {kernel}, strides=2"), (*(-(-n // 2) for n in place.shape[:-1]), features)
    return Layer("Conv", f'{features}, {kernel}, padding="VALID"'), (*(n - 2 for n in place.shape[:-1]), features)


def norm(draw, place):
    classes = CLASSES if place.lanes else [*CLASSES, *FOREIGN[:2]]
    classes = FOREIGN[-1:] if not place.lanes and draw.chance(0.02) else classes
    if place.complex:
        classes = [cls for cls in classes if cls != "flaxbn.BatchRenorm"]
    cls, axis = draw.one_of(classes), -1
    options = "" if cls in FOREIGN else draw.one_of(OPTIONS)
    if len(place.shape) > 1 and not place.inside and draw.chance(0.3):
        axis = int(draw.rng.integers(1, place.rank))
        if cls not in FOREIGN and place.rank > 3 and draw.chance(0.4):
            axis = (1, -1)
        elif draw.chance(0.4):
            axis -= place.rank
    return Norm(cls, axis, options), place.shape


def activation(draw, place):
    real = ["nn.relu(x)", "jnp.tanh(x)", "nn.gelu(x)", "nn.leaky_relu(x, 0.3)", "x + 0.3 * jnp.sin(x)"]
    return Line(f"x = {draw.one_of(['x / (1 + abs(x))', 'x + 0.3j'] if place.complex else real)}"), place.shape


def function(draw, place):
    """A function of jax that holds others, and no layer."""
    inner = "lambda x: x / (1 + abs(x))" if place.complex else draw.one_of(["jnp.tanh", "jnp.sin", "nn.relu"])
    how = [
        f"jax.checkpoint({inner})(x)",
        f"jax.jit({inner})(x)",
        f"jax.vmap({inner})(x)",
        f"jax.lax.map({inner}, x)",
        f"jax.lax.fori_loop(0, 2, lambda i, x: ({inner})(x), x)",
        f"jax.lax.scan(lambda x, _: (({inner})(x), None), x, None, length=2)[0]",
        f"jax.lax.cond(x.ndim > 0, {inner}, lambda x: -x, x)",
        f"jnp.concatenate([({inner})(x[..., :1]), x[..., 1:]], -1)",
        f"jnp.where(x.real > 0.2, x, ({inner})(x))",
    ]
    more = [] if place.complex else ["jnp.sort(x, -1)", "jnp.cumsum(x, -1)", "nn.softmax(2 * x) * x.shape[-1]"]
    return Line(f"x = {draw.one_of([*how, *more])}"), place.shape


def pool(draw, place):
    spatial = len(place.shape) - 1
    if draw.chance(0.3) or min(place.shape[:-1]) < 4:
        return Line("x = x.mean(1)"), place.shape[1:]
    kind = "avg" if place.complex or draw.chance(0.5) else "max"
    window = f"({', '.join(['2'] * spatial)},)"
    return Line(f"x = nn.{kind}_pool(x, {window}, strides={window})"), (
        *(n // 2 for n in place.shape[:-1]),
        place.features,
    )


def reshape(draw, place):
    if len(place.shape) == 1:
        return Line("x = jnp.stack([x, x[:, ::-1] ** 2], 1)"), (2, *place.shape)
    if draw.chance(0.5) and np.prod(place.shape) <= 64:
        return Line("x = x.reshape(x.shape[0], -1)"), (int(np.prod(place.shape)),)
    return Line("x = x.swapaxes(1, -1)"), (place.features, *place.shape[1:-1], place.shape[0])


def other_norm(draw, place):
    kinds = [Layer("LayerNorm"), Layer("RMSNorm")]
    if not place.inside:
        kinds += [Layer("GroupNorm", "None, group_size=1" if len(place.shape) > 1 else "1")]
    return draw.one_of(kinds), place.shape


def dropout(draw, place):
    return Dropout(), place.shape


def attention(draw, place):
    return Attention(2, 4), place.shape


def residual(draw, place):
    return Residual(draw.body(place)), place.shape


def branches(draw, place):
    inner = replace(place, keep=True, depth=place.depth + 1)
    left, one = draw.parts(inner, 1 + draw.rng.integers(2))
    right, other = draw.parts(inner, 1)
    return Branches(left, right), (*place.shape[:-1], one.features + other.features)


def wrapped(draw, place):
    return Wrapped(draw.one_of(WRAPS), draw.body(place, 0.8)), place.shape


def scan(draw, place):
    body = draw.body(place)
    axis = draw.one_of([0, 0, 0, "broadcast", "carried", 1])
    if axis == 1 and any(isinstance(n, Norm) and n.cls == "flaxbn.BatchRenorm" for n in flat(body)):
        axis = 0  # its number of steps has no axis of its own
    return Scan(body, int(draw.rng.integers(2, 4)), axis, draw.chance(0.3), draw.chance(0.3)), place.shape


def vmap(draw, place):
    if draw.chance(0.2) and not place.lanes:  # examples are lanes, which share everything
        return Vmap(draw.body(place, lanes=True, inside=True), 0, True, draw.chance(0.5)), place.shape
    axis = int(draw.rng.integers(1, len(place.shape)))
    shape = (*place.shape[: axis - 1], *place.shape[axis:])
    shared = draw.chance(0.3)
    body = draw.body(place, shape=shape, lanes=place.lanes or shared)
    return Vmap(body, axis, shared, draw.chance(0.5)), place.shape


def tied(draw, place):
    inner = replace(place, keep=True, depth=place.depth + 1)
    between, end = draw.parts(inner, 1)
    if end.shape != place.shape:
        between = (*between, Layer("Dense", str(place.features)))
    again = draw.one_of(["{}(x)", "{}(x)", "nn.remat(lambda m, x: m(x))({}, x)", "nn.jit(lambda m, x: m(x))({}, x)"])
    return Tied(norm(draw, place)[0], between, again), place.shape


def lifted(draw, place):
    features = int(draw.rng.integers(3, 6))
    shape = (*place.shape[:-1], features)
    return Lifted(draw.one_of(["remat", "jit"]), features, norm(draw, replace(place, shape=shape))[0]), shape


def sequence(draw, place):
    features = int(draw.rng.integers(3, 6))
    shape = (*place.shape[:-1], features)
    return Sequence(features, norm(draw, replace(place, shape=shape))[0]), shape


def cond(draw, place):
    return Cond(draw.body(place)), place.shape


def moved(draw, place):
    """The examples lie along another axis."""
    body = draw.body(place, inside=True)
    return Around("x = jnp.moveaxis(x, 0, -2)", body, "x = jnp.moveaxis(x, -2, 0)"), place.shape


def merged(draw, place):
    """The examples share their axis with another one."""
    body = draw.body(place, inside=True, shape=place.shape[-1:])
    return Around("x = x.reshape(-1, x.shape[-1])", body, "x = x.reshape(SHAPE)"), place.shape


def _always(place):
    return True


def _free(place):
    return not place.keep and not place.inside


def _spatial(place):
    return len(place.shape) > 1 and not place.inside


def _block(place):
    return place.depth < 2


KINDS = [
    *[(norm, _always)] * 4,
    *[(activation, _always)] * 2,
    *[(dense, _always)] * 2,
    *[(conv, lambda p: _spatial(p) and len(p.shape) < 4 and not p.complex)] * 3,
    (pool, lambda p: _free(p) and 1 < len(p.shape) < 4),
    (reshape, lambda p: _free(p) and len(p.shape) < 3),
    (other_norm, lambda p: not p.complex and p.features > 3),
    (dropout, lambda p: not p.complex and not p.lanes),
    (attention, lambda p: _spatial(p) and not p.complex and not p.lanes),
    (residual, _block),
    (branches, _block),
    (wrapped, _block),
    (scan, _block),
    (vmap, lambda p: _block(p) and _spatial(p) and not p.lanes),
    (tied, _block),
    (lifted, _block),
    (sequence, _block),
    (cond, lambda p: _block(p) and not p.lanes),
    (function, _always),
    (moved, lambda p: _block(p) and _spatial(p)),
    (merged, lambda p: _block(p) and _spatial(p)),
]
