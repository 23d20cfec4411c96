"""Parts of random models that are modules of their own, in the transformations of Flax."""

from dataclasses import dataclass

from fuzz.nodes import Node, Norm


@dataclass(frozen=True)
class Wrapped(Node):
    """A block under `nn.remat`, `nn.jit` or both, or as it is; `wrap` is code with {} for the class."""

    wrap: str
    body: tuple

    def lines(self, writer):
        name = writer.name("block")
        cls = writer.module(name.title(), writer.lines(self.body))
        return [f'x = {self.wrap.format(cls)}(train, name="{name}")(x)']


@dataclass(frozen=True)
class Cond(Node):
    """A block in a branch that is always taken, and known to be."""

    body: tuple

    def lines(self, writer):
        name = writer.name("block")
        cls = writer.module(name.title(), writer.lines(self.body))
        if writer.reference:
            return [f'x = {cls}(train, name="{name}")(x)']
        branch = f"nn.cond(x.ndim > 0, lambda m, x: {name}(x), lambda m, x: x, self, x)"
        return [f'{name} = {cls}(train, name="{name}")', f"x = {name}(x) if self.is_initializing() else {branch}"]


@dataclass(frozen=True)
class Scan(Node):
    """A block in a loop, with statistics of each step's own along `axis`; or "broadcast" or "carried" from all."""

    body: tuple
    length: int
    axis: int | str = 0
    reverse: bool = False
    remat: bool = False

    def lines(self, writer):
        name = writer.name("scan")
        shared = isinstance(self.axis, str)
        lines = writer.lines(self.body)
        if shared and writer.reference:
            cls = writer.module(name.title(), lines)
            return [f'x = {cls}(train, name="{one}")(x)' for one in writer.calls(name, self.length)]
        cls = writer.module(name.title(), lines, carries=True)
        how = {
            "broadcast": 'variable_broadcast=["params", "batch_stats"], split_rngs={"params": False}',
            "carried": 'variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False}',
        }.get(self.axis, f'variable_axes={{"params": 0, "batch_stats": {self.axis}}}, split_rngs={{"params": True}}')
        block = f"nn.remat({cls}, prevent_cse=False)" if self.remat else cls
        loop = f"nn.scan({block}, {how}, length={self.length}, reverse={self.reverse})"
        return [f'x, _ = {loop}(train, name="{name}")(x, None)']


@dataclass(frozen=True)
class Vmap(Node):
    """A block side by side along an axis of x, with variables of each lane's own, or the same for all.

    A layer whose statistics are shared must merge its lanes to train, and so the reference does. To evaluate, it need
    not know that there are others: `silent` leaves it so.
    """

    body: tuple
    axis: int
    shared: bool = False
    silent: bool = False

    def lines(self, writer):
        name = writer.name("vmap")
        outer = writer.lanes
        if self.shared and (writer.reference or not self.silent):
            writer.lanes = name
        cls = writer.module(name.title(), writer.lines(self.body))
        writer.lanes = outer
        params, stats = ("None", "None") if self.shared else ("0", "0")
        how = (
            f'variable_axes={{"params": {params}, "batch_stats": {stats}}}, split_rngs={{"params": {not self.shared}}}'
        )
        lanes = f"nn.vmap({cls}, in_axes={self.axis}, out_axes={self.axis}, {how}"
        lanes += f', axis_name="{name}")' if self.shared else ")"
        return [f'x = {lanes}(train, name="{name}")(x)']


@dataclass(frozen=True)
class Lifted(Node):
    """A layer beside a method under `nn.remat` or `nn.jit` in which there is none."""

    how: str
    features: int
    norm: Norm

    def lines(self, writer):
        block, norm = writer.name("lifted"), writer.name("norm")
        constructed = self.norm.constructed(writer, norm, "self.train").replace(f', name="{norm}"', "")
        writer.text(f"""
            class {block.title()}(nn.Module):
                train: bool

                def setup(self):
                    self.dense = nn.Dense({self.features}{writer.options()})
                    self.{norm} = {constructed}

                @nn.{self.how}
                def first(self, x):
                    return self.dense(x)

                def __call__(self, x):
                    return self.{norm}(self.first(x))
        """)
        return [f'x = {block.title()}(train, name="{block}")(x)']

    def children(self):
        return [self.norm]
