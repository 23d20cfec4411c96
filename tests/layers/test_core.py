"""What a layer computes, without any of Flax's variables: the same as its Linen shell, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flaxbn
from flaxbn.layers.arguments import Mode, options_of
from flaxbn.layers.core import run_layer
from flaxbn.layers.running_average import Stored

X = jax.random.normal(jax.random.key(0), (6, 5, 3)) * 2 + 1
MASK = jnp.arange(30).reshape(6, 5) % 4 > 0
LAYERS = {
    "batch": (flaxbn.BatchNorm(), {}),
    "mask": (flaxbn.BatchNorm(momentum=0.5), {"mask": MASK}),
    "renorm": (flaxbn.BatchRenorm(r_max=1.2, d_max=lambda step: 0.1 * step), {}),
    "domain": (flaxbn.BatchNorm(num_domains=2, domain_affine=True), {"domain": 1}),
    "domains": (flaxbn.BatchRenorm(num_domains=2, r_max=3.0, d_max=5.0), {"domain": jnp.arange(6) % 2}),
}


def stored_of(variables):
    stats = variables["batch_stats"]
    return Stored(stats["mean"], stats["var"], stats.get("steps"))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [True, False])
def test_a_shell_adds_nothing(name, train):
    layer, given = LAYERS[name]
    variables = layer.init(jax.random.key(1), X, True, **{k: v for k, v in given.items() if k == "domain"})
    variables = jax.tree.map(lambda a: a + jnp.arange(1, a.size + 1, dtype=a.dtype).reshape(a.shape), variables)
    y, new = layer.apply(variables, X, not train, mutable=["batch_stats"] if train else ["nothing"], **given)
    params, stored = variables["params"], stored_of(variables)
    options = options_of(layer, "the layer")
    mode = Mode(use_running_average=not train, update=train, initializing=False)
    given = {"mask": None, "domain": None, **given}
    found, found_stored = run_layer(options, mode, X, stored, params["scale"], params["bias"], **given)
    np.testing.assert_array_equal(found, y)
    jax.tree.map(np.testing.assert_array_equal, found_stored, stored_of(new) if train else stored)


def test_messages_name_the_layer_as_the_shell_does():
    options = options_of(flaxbn.BatchNorm(), "Layer 'a/b'")
    mode = Mode(use_running_average=False, update=False, initializing=False)
    stored = Stored(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"^Layer 'a/b' normalizes by batch .* an input of shape \(1, 3"):
        run_layer(options, mode, X[:1, 0], stored, None, None, mask=None, domain=None)
