"""Random models of flax.nnx, as code: blocks of layers behind each other, in the transformations of nnx."""

import itertools
import textwrap

from flax import nnx

LAYERS = ["nnx.BatchNorm", "nnx.BatchNorm", "flaxbn.nnx.BatchNorm", "flaxbn.nnx.BatchRenorm"]
SCAN = "nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, {})"
RUNS = {
    "plain": "{}(x)",
    "residual": "x + {}(x)",
    "remat": "nnx.remat(lambda block, x: block(x))({}, x)",
    "jit": "nnx.jit(lambda block, x: block(x))({}, x)",
    "cond": "nnx.cond(x.ndim > 0, lambda block, x: block(x), lambda block, x: x, {}, x)",
    "scan": SCAN,
    "scan of remat": SCAN.replace("lambda x, block: block(x)", "nnx.remat(lambda x, block: block(x))"),
    "members": "nnx.vmap(lambda block, x: block(x), in_axes=(0, None))({}, x).mean(0)",
}
STACKED = ("scan", "scan of remat", "members")


class NnxWriter:
    """Writes a block of parts, each `(kind, ...)`: a layer, a function, or a block in a transformation."""

    def __init__(self):
        self._classes, self._numbers = [], itertools.count(1)

    def block(self, name, parts):
        """Adds the class of a block; a layer is named as none else is."""
        init, call = [], []
        for kind, *details in parts:
            if kind == "function":
                call.append(f"x = {details[0]}(x)")
                continue
            own = f"{kind}_{next(self._numbers)}"
            if kind == "block":
                how, body = details
                cls = self.block(own.title(), body)
                stack = f"nnx.split_rngs(splits=2)(nnx.vmap({cls}, in_axes=(0,), out_axes=0))(rngs)"
                init.append(f"self.{own} = {stack if how in STACKED else f'{cls}(rngs)'}")
                call.append(f"x = {RUNS[how].format(f'self.{own}')}")
            else:
                cls, arguments = details
                init.append(f"self.{own} = {cls}({arguments}, rngs=rngs)")
                call.append(f"x = self.{own}(x)")
        lines = [f"class {name}(nnx.Module):", "    def __init__(self, rngs):"]
        lines += [*(f"        {line}" for line in init or ["pass"]), "", "    def __call__(self, x):"]
        self._classes.append("\n".join([*lines, *(f"        {line}" for line in call), "        return x"]))
        return name

    def model(self, parts):
        self.block("Net", parts)
        return "\n\n\n".join(self._classes)


HEADER = textwrap.dedent("""\
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import flaxbn
    import flaxbn.nnx
    """)


def build_nnx(code):
    """The model of some code, with weights drawn from seed 0."""
    scope = {"__name__": "fuzz.written"}
    exec(compile(f"{HEADER}\n\n{code}\n", "<random nnx model>", "exec"), scope)
    return scope["Net"](nnx.Rngs(0))


def draw_parts(draw, features, spatial, depth=0):
    """Parts that return the number of features that they take, at least one of them with a batch-norm layer."""
    parts = []
    for _ in range(1 + draw.rng.integers(3)):
        kind = draw.one_of(["layer", "function", "norm", *["block"] * (2 - depth)])
        if kind == "block":
            parts.append(("block", draw.one_of(list(RUNS)), draw_parts(draw, features, spatial, depth + 1)))
        elif kind == "function":
            parts.append(("function", draw.one_of(["nnx.relu", "jnp.tanh", "nnx.gelu", "jax.checkpoint(jnp.sin)"])))
        elif kind == "norm":
            parts.append(_norm(draw, features))
        elif spatial and draw.chance(0.5):
            parts.append(("conv", "nnx.Conv", f"{features}, {features}, (3,) * {spatial}"))
        else:
            parts.append(("linear", "nnx.Linear", f"{features}, {features}"))
    return (*parts, _norm(draw, features)) if not any(part[0] in ("norm", "block") for part in parts) else tuple(parts)


def _norm(draw, features):
    return "norm", draw.one_of(LAYERS), str(features)
