"""The layers for flax.linen."""

from flaxbn.layers.linen import BatchNorm as BatchNorm
from flaxbn.layers.linen import BatchRenorm as BatchRenorm
