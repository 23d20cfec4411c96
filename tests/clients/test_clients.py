"""Small models in the manner of well-known ones: each tool against the model's own training mode in float64.

`make clients` runs every tool on every one, and on models that are installed for it.
"""

import pytest
from clients.small import CLIENTS
from clients.tools import TOOLS

EVERYWHERE = ("apply", "precise", "exact", "plan", "domains", "compare")
# What else is compiled takes about a second each.
ALSO = {
    "a batch-norm class of its own": ("export",),
    "Conformer with paddings": ("moments",),
    "critics under nn.vmap": ("batch_noise", "gap", "independent"),
    "layers under nn.scan": ("diagnose",),
    "ResNet of nnx, 17 layers": ("batch_noise",),
}
# Some ten roundings of float32. In deep networks they add up: Flax's own training mode in float32 is off by 1.6e-6 to
# 3.3e-6 in the worst layers of these two, estimates by 0.9e-6 to 2.8e-6.
TOLERANCE = {"ResNet of nnx, 17 layers": 4e-6, "EfficientNet of nnx, 49 layers": 4e-6}
# The largest of hundreds of outputs, in root mean squares, behind the last layer; so is Flax's own.
OF_OUTPUTS = {"apply": 1e-5, "export": 1e-5}


@pytest.mark.parametrize("name", CLIENTS)
def test_tools(name):
    client = CLIENTS[name]()
    tolerance = TOLERANCE.get(name, 1e-6)
    found = {tool: TOOLS[tool](client) for tool in (*EVERYWHERE, *ALSO.get(name, ()))}
    assert not {tool: off for tool, off in found.items() if not off <= OF_OUTPUTS.get(tool, tolerance)}, found
