"""Writes `cases.npz`: what torch's own layers put out, with their `state_dict`; run where torch is installed.

python tests/torch_cases/make.py
"""

import pathlib

import numpy as np
import torch
from torch import nn

WIDTH = 4
HERE = pathlib.Path(__file__).parent


class Block(nn.Module):
    """Two convolutions and a shortcut, as in a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.downsample = nn.Sequential(*shortcut) if stride > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """Four stages of two blocks, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i in range(4):
            before = WIDTH * 2 ** max(i - 1, 0)
            after = WIDTH * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(before, after, 1 + (i > 0)), Block(after, after, 1)))
        self.fc = nn.Linear(8 * WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def randomized(module: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are nowhere trivial, and weights that float16 holds."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
            elif name.endswith(("running_var", "weight")) and value.ndim == 1:
                value.uniform_(0.5, 2.0)
            elif value.ndim == 1:
                value.normal_(0.0, 0.3)
            value.copy_(value.half().to(value.dtype))
    return module


def main() -> None:
    """All cases: in evaluation, and a step of training with momentum 1, whose variance divides by n - 1."""
    torch.manual_seed(0)
    layers = {
        "1d": (nn.BatchNorm1d(5), (6, 5)),
        "1d_length": (nn.BatchNorm1d(5), (4, 5, 3)),
        "2d": (nn.BatchNorm2d(5), (3, 5, 4, 2)),
        "3d": (nn.BatchNorm3d(5), (2, 5, 2, 3, 2)),
        "sync": (nn.SyncBatchNorm(5), (3, 5, 4, 2)),
        "without_affine": (nn.BatchNorm2d(5, affine=False), (3, 5, 4, 2)),
        "resnet18": (ResNet18(), (2, 3, 32, 32)),
    }
    saved = {"versions": np.asarray(f"torch {torch.__version__}")}
    for name, (module, shape) in layers.items():
        module, x = randomized(module).eval(), torch.randn(shape).half().float()
        saved[f"{name}|x"], saved[f"{name}|y"] = x.numpy(), module(x).detach().numpy()
        for key, value in module.state_dict().items():
            saved[f"{name}|state|{key}"] = value.numpy() if value.ndim == 0 else value.half().numpy()
    trained, x = nn.BatchNorm2d(5, momentum=1.0), torch.randn(2, 5, 1, 2)
    trained(x)
    saved["trained|x"] = x.numpy()
    for key, value in trained.state_dict().items():
        saved[f"trained|state|{key}"] = value.numpy()
    np.savez_compressed(HERE / "cases.npz", **saved)


if __name__ == "__main__":
    main()
