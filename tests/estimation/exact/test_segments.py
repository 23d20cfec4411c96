"""What the devices say to each other in the pieces of a model."""

from compiled import collectives, programs
from meshes import X, estimate

import flaxbn


def test_exact_calls_communicate_once_for_each_batch(devices):
    options = {"method": "exact", "sharding": flaxbn.data_sharding(), "batch_size": 24}
    said = [collectives(text)[0] for text in programs(lambda: estimate(X[:72], **options))]
    assert set(said) == {0, 1}
    assert said.count(1) >= 2  # of two layers
