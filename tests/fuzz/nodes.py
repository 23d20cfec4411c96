"""The parts of random models: each is a value that prints itself, and that writes itself as Flax code, from x to x."""

import dataclasses
from dataclasses import dataclass

FOREIGN = ("Recognized", "Marked", "Unknown")
"""Classes of others; of all but the last one flaxbn is told."""


class Node:
    """A part of a model."""

    def lines(self, writer):
        """Statements that compute a new `x` from `x`, where `train` is known."""
        raise NotImplementedError

    def children(self):
        """The parts within."""
        found = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [node for part in found if isinstance(part, tuple) for node in part if isinstance(node, Node)]

    def flat(self):
        """This part, and all within."""
        return [self, *(node for child in self.children() for node in child.flat())]


def flat(nodes):
    return [one for node in nodes for one in node.flat()]


@dataclass(frozen=True)
class Line(Node):
    """What has neither parameters nor statistics: a statement."""

    code: str

    def lines(self, writer):
        return [self.code]


@dataclass(frozen=True)
class Layer(Node):
    """A layer of Flax with parameters, by its class and arguments."""

    cls: str
    arguments: str = ""

    def lines(self, writer):
        name = writer.name(self.cls.lower())
        comma = ", " if self.arguments else ""
        return [f'x = nn.{self.cls}({self.arguments}{comma}name="{name}"{writer.options()})(x)']


@dataclass(frozen=True)
class Dropout(Node):
    rate: float = 0.5

    def lines(self, writer):
        return [f"x = nn.Dropout({0.0 if writer.reference else self.rate}, deterministic=not train)(x)"]


@dataclass(frozen=True)
class Attention(Node):
    heads: int
    features: int

    def lines(self, writer):
        name = writer.name("attention")
        rate = 0.0 if writer.reference else 0.1
        options = f'qkv_features={self.features}, dropout_rate={rate}, deterministic=not train, name="{name}"'
        return [f"x = nn.MultiHeadDotProductAttention({self.heads}, {options}{writer.options()})(x)"]


@dataclass(frozen=True)
class Norm(Node):
    """A batch-norm layer of any class, for which the reference has Flax's; `options` are arguments, as code."""

    cls: str = "nn.BatchNorm"
    axis: int | tuple = -1
    options: str = ""

    def lines(self, writer):
        name = writer.name("norm")
        return [f"x = {self.constructed(writer, name)}(x)"]

    def constructed(self, writer, name, train="train"):
        frozen = writer.reference and name.partition("__")[0] in writer.frozen
        options = {"axis": None if self.axis == -1 else repr(self.axis), "name": f'"{name}"'}
        if self.cls not in FOREIGN:
            options["axis_name"] = writer.lanes and f'"{writer.lanes}"'
        cls = self.cls
        if writer.reference:
            cls = "nn.BatchNorm" if cls.startswith("flaxbn.") else cls
            options |= {"momentum": "0.0", "use_fast_variance": None if cls in FOREIGN else "False"}
        more = f", {self.options}" if self.options else ""
        return f"{cls}(use_running_average={True if frozen else f'not {train}'}{more}{writer.options(**options)})"


@dataclass(frozen=True)
class Masked(Node):
    """A layer that leaves out a third of the positions of the data; further back, rounding would choose others."""

    norm: Norm

    def lines(self, writer):
        norm = self.norm.constructed(writer, writer.name("norm"))
        return [f"x = {norm}(x, mask=jnp.sin(40 * x[..., :1].real) > -0.5)"]

    def children(self):
        return [self.norm]


@dataclass(frozen=True)
class Tied(Node):
    """One layer, called before and behind other parts; `again` is code with {} for the layer in its second call."""

    norm: Norm
    between: tuple
    again: str = "{}(x)"

    def lines(self, writer):
        first, second = writer.calls(writer.name("norm"), 2)
        between = writer.lines(self.between)
        if writer.reference:
            before, behind = (f"x = {self.norm.constructed(writer, name)}(x)" for name in (first, second))
            return [before, *between, behind]
        tied = first.replace("norm", "tied")
        return [
            f"{tied} = {self.norm.constructed(writer, first)}",
            f"x = {tied}(x)",
            *between,
            f"x = {self.again.format(tied)}",
        ]

    def children(self):
        return [self.norm, *self.between]


@dataclass(frozen=True)
class Residual(Node):
    body: tuple

    def lines(self, writer):
        skip = writer.name("skip")
        return [f"{skip} = x", *writer.lines(self.body), f"x = {skip} + x"]


@dataclass(frozen=True)
class Branches(Node):
    """Two ways, whose features are put beside each other."""

    left: tuple
    right: tuple

    def lines(self, writer):
        start = writer.name("start")
        left, right = writer.lines(self.left), writer.lines(self.right)
        end = start.replace("start", "left")
        return [f"{start} = x", *left, f"{end}, x = x, {start}", *right, f"x = jnp.concatenate([{end}, x], -1)"]


@dataclass(frozen=True)
class Around(Node):
    """Statements before and behind a body, such as a reshape and its inverse."""

    before: str
    body: tuple
    behind: str

    def lines(self, writer):
        shape = writer.name("shape")
        body = writer.lines(self.body)
        return [f"{shape} = x.shape", self.before, *body, self.behind.replace("SHAPE", shape)]


@dataclass(frozen=True)
class Sequence(Node):
    """A Dense layer, a function and a batch-norm layer in an `nn.Sequential`."""

    features: int
    norm: Norm

    def lines(self, writer):
        dense, norm = writer.name("dense"), writer.name("norm")
        first = f'nn.Dense({self.features}, name="{dense}"{writer.options()})'
        return [f"x = nn.Sequential([{first}, jnp.tanh, {self.norm.constructed(writer, norm)}])(x)"]

    def children(self):
        return [self.norm]
