"""Writes a model as the Flax code that is run, and that a person can read, paste and change."""

import itertools
import textwrap


class Writer:
    """The code of one model: classes for its blocks, and names that no two of its layers share.

    As a reference the model is written for Flax's training mode. Its layers keep no memory, dropout layers drop nothing
    and renormalization is clipped to none; and what is called several times is written as so many layers, named
    `NAME__0`, `NAME__1` and so on, so that what each call stores is seen. All other names are the same in both.

    Attributes:
        reference: whether this is the reference.
        frozen: the names of layers that keep to what they have stored, in training mode too.
        dtype: what the layers compute in, as code; None for that of the data.
        lanes: the mapped axis over which the layers written at present share their statistics.
    """

    def __init__(self, reference=False, frozen=(), dtype=None):
        self.reference, self.frozen, self.dtype = reference, frozen, dtype
        self.lanes = None
        self._classes, self._numbers = [], itertools.count(1)

    def name(self, kind):
        return f"{kind}_{next(self._numbers)}"

    def lines(self, nodes):
        """The statements of nodes, one after the other, from `x` to `x`."""
        return [line for node in nodes for line in node.lines(self)]

    def options(self, **options):
        """Arguments of a constructor, as they come last: those that are None are left out."""
        options = {"dtype": self.dtype} | options
        return "".join(f", {key}={value}" for key, value in options.items() if value is not None)

    def calls(self, name, count):
        """What the layers are named that are called so many times: one name each, or the same for all."""
        return [f"{name}__{i}" if self.reference else name for i in range(count)]

    def module(self, name, lines, carries=False):
        """Adds the class of a block, which takes `x` as one of `nn.scan` where it carries."""
        given, returned = ("x, _", "x, None") if carries else ("x", "x")
        body = [f"class {name}(nn.Module):", "    train: bool", "", "    @nn.compact"]
        body += [f"    def __call__(self, {given}):", "        train = self.train"]
        self._classes.append("\n".join([*body, *(f"        {line}" for line in lines), f"        return {returned}"]))
        return name

    def text(self, text):
        """Adds a class as it is written."""
        self._classes.append(textwrap.dedent(text).strip())

    def model(self, nodes):
        """The code of a whole model, a class `Net`."""
        lines = self.lines(nodes)
        net = ["class Net(nn.Module):", "    @nn.compact", "    def __call__(self, x, train=False):"]
        return "\n\n\n".join(
            [*self._classes, "\n".join([*net, *(f"        {line}" for line in lines), "        return x"])]
        )


def stored_name(name):
    """What a layer is called in the model, from its name in the reference."""
    return name.partition("__")[0]


HEADER = textwrap.dedent("""\
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from fuzz.layers import Marked, Recognized, Scaled, Unknown

    import flaxbn
    """)


def build(code):
    """The class `Net` of some code."""
    scope = {"__name__": "fuzz.written"}
    exec(compile(f"{HEADER}\n\n{code}\n", "<random model>", "exec"), scope)
    return scope["Net"]
