"""Small image models of flax.nnx in the manner of bonsai's: a ResNet and an EfficientNet-B0."""

from flax import nnx


def conv(features, out, size, rngs, **options):
    """A convolution in front of a layer, which has the bias."""
    return nnx.Conv(features, out, (size, size), use_bias=False, rngs=rngs, **options)


class BasicBlock(nnx.Module):
    def __init__(self, features, out, strides, *, rngs):
        self.conv1, self.bn1 = conv(features, out, 3, rngs, strides=strides), nnx.BatchNorm(out, rngs=rngs)
        self.conv2, self.bn2 = conv(out, out, 3, rngs), nnx.BatchNorm(out, rngs=rngs)
        self.shortcut = None if features == out else conv(features, out, 1, rngs, strides=strides)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem and two blocks at each of four widths: 17 batch-norm layers."""

    def __init__(self, widths=(4, 5, 6, 7), *, rngs):
        self.stem = nnx.Sequential(conv(3, widths[0], 3, rngs), nnx.BatchNorm(widths[0], rngs=rngs), nnx.relu)
        blocks, before = [], widths[0]
        for width in widths:
            strides = (1, 1) if width == before else (2, 2)
            blocks += [
                BasicBlock(before, width, strides, rngs=rngs),
                BasicBlock(width, width, (1, 1), rngs=rngs),
            ]
            before = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(before, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class SqueezeExcite(nnx.Module):
    def __init__(self, features, *, rngs):
        self.squeeze, self.excite = nnx.Linear(features, 2, rngs=rngs), nnx.Linear(2, features, rngs=rngs)

    def __call__(self, x):
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(x.mean((1, 2))))))
        return x * gate[:, None, None, :]


class MBConv(nnx.Module):
    """Expand, filter by channel, squeeze and excite, project; a shortcut where the shape stays."""

    def __init__(self, features, out, expand, strides, *, rngs):
        inner = features * expand
        widen = [conv(features, inner, 1, rngs), nnx.BatchNorm(inner, rngs=rngs), nnx.silu]
        self.expand = nnx.Sequential(*(widen if expand > 1 else [lambda x: x]))
        self.depthwise = conv(inner, inner, 3, rngs, strides=strides, feature_group_count=inner)
        self.bn = nnx.BatchNorm(inner, rngs=rngs)
        self.gate = SqueezeExcite(inner, rngs=rngs)
        self.project, self.bn_out = conv(inner, out, 1, rngs), nnx.BatchNorm(out, rngs=rngs)
        self.stays = features == out and strides == (1, 1)

    def __call__(self, x):
        y = self.gate(nnx.silu(self.bn(self.depthwise(self.expand(x)))))
        y = self.bn_out(self.project(y))
        return x + y if self.stays else y


STAGES = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 3, 1), (2, 3, 1), (2, 4, 2), (2, 1, 1))
"""Expansion, blocks, stride: those of B0, but for the expansion, which is 6 there, and two strides."""


class EfficientNet(nnx.Module):
    """16 blocks between a stem and a head: 49 batch-norm layers; one width throughout."""

    def __init__(self, width=4, *, rngs):
        self.stem = nnx.Sequential(conv(3, width, 3, rngs, strides=(2, 2)), nnx.BatchNorm(width, rngs=rngs), nnx.silu)
        self.blocks = nnx.List(
            [
                MBConv(width, width, expand, (stride if j == 0 else 1,) * 2, rngs=rngs)
                for expand, blocks, stride in STAGES
                for j in range(blocks)
            ]
        )
        self.top = nnx.Sequential(conv(width, 2 * width, 1, rngs), nnx.BatchNorm(2 * width, rngs=rngs), nnx.silu)
        self.head = nnx.Linear(2 * width, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.top(x).mean((1, 2)))


def count(model):
    """How many batch-norm layers a model holds."""
    return sum(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model))
