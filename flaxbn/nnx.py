"""The layers for flax.nnx, which is loaded with this module, and not before."""

from flaxbn.layers.nnx import BatchNorm as BatchNorm
from flaxbn.layers.nnx import BatchRenorm as BatchRenorm

for _layer in (BatchNorm, BatchRenorm):
    _layer.__module__ = __name__  # where it is public: pickles do not name a room that may move
del _layer
