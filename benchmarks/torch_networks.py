"""The networks that are timed in torch, and the passes over them; without torch there are none."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import networks
import numpy as np

if importlib.util.find_spec("torch"):
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(inputs: int, features: int, size: int, stride: int = 1) -> nn.Module:
        """A convolution and its batch normalization."""
        convolution = nn.Conv2d(inputs, features, size, stride, size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(features))

    class Block(nn.Module):
        """A residual block of convolutions: (features, size, stride) each."""

        def __init__(self, inputs: int, layers: list[tuple[int, int, int]]) -> None:
            super().__init__()
            widths = [inputs, *(features for features, _, _ in layers)]
            self.layers = nn.ModuleList(conv(w, *layer) for w, layer in zip(widths, layers))
            stride = max(s for _, _, s in layers)
            same = stride == 1 and widths[-1] == inputs
            self.shortcut = nn.Identity() if same else conv(inputs, widths[-1], 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for i, layer in enumerate(self.layers):
                y = layer(y if i == 0 else functional.relu(y))
            return functional.relu(self.shortcut(x) + y)

    class Head(nn.Module):
        """The mean over positions, and a dense layer."""

        def __init__(self, features: int) -> None:
            super().__init__()
            self.dense = nn.Linear(features, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dense(x.mean((2, 3)))


def cnn(layers: tuple[tuple[int, int], ...], channels: int) -> Any:
    """That of `networks.CNN`."""
    widths = [channels, *(features for features, _ in layers)]
    convolutions = [m for w, (f, s) in zip(widths, layers) for m in (conv(w, f, 3, s), nn.ReLU())]
    return nn.Sequential(*convolutions, Head(widths[-1]))


def resnet20() -> Any:
    """That of `networks.ResNet20`."""
    blocks, width = [], 16
    for features, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, 1, 1):
            blocks.append(Block(width, [(features, 3, stride), (features, 3, 1)]))
            width = features
    return nn.Sequential(conv(3, 16, 3), nn.ReLU(), *blocks, Head(width))


def resnet50(width: int, *, stem: bool) -> Any:
    """That of `networks.ResNet50`."""
    first = [conv(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)] if stem else [conv(3, width, 3), nn.ReLU()]
    blocks, inputs = [], width
    for i, (number, first_stride) in enumerate(networks.STAGES):
        features = width * 2**i
        for stride in (first_stride, *[1] * (number - 1)):
            blocks.append(Block(inputs, [(features, 1, 1), (features, 3, stride), (4 * features, 1, 1)]))
            inputs = 4 * features
    return nn.Sequential(*first, *blocks, Head(inputs))


def build(name: str) -> Any:
    """The network of this name."""
    if name == "CNN":
        return cnn(((32, 1), (64, 2), (128, 2)), 1)
    if name == "ResNet-20":
        return resnet20()
    return resnet50(8, stem=False) if name == "ResNet-50" else resnet50(64, stem=True)


def candidates(name: str, images: np.ndarray, batch_size: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The passes of torch and, where it is there, of fvcore, by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = build(name).to(device, memory_format=torch.channels_last)
    steps = len(images) // batch_size
    batches = [torch.from_numpy(images[k::steps].transpose(0, 3, 1, 2)) for k in range(steps)]
    batches = [b.to(device).to(memory_format=torch.channels_last) for b in batches]
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def finished() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        with cast:
            torch.stack([model(batch).argmax(1) for batch in batches])
        finished()

    def update_bn() -> None:
        with cast:
            torch.optim.swa_utils.update_bn(batches, model)
        finished()

    def fvcore_update() -> None:
        from fvcore.nn.precise_bn import update_bn_stats

        model.train()
        with cast:
            update_bn_stats(model, batches, len(batches))
        finished()

    found = {"torch evaluation": evaluate, "update_bn": update_bn}
    return found | ({"fvcore": fvcore_update} if importlib.util.find_spec("fvcore") else {})


def versions() -> dict[str, str]:
    """Those of torch and fvcore, where they are there."""
    return {name: importlib.metadata.version(name) for name in ("torch", "fvcore") if importlib.util.find_spec(name)}
