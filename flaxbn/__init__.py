"""Batch normalization for JAX without its traps."""

from flaxbn.linen import BatchNorm as BatchNorm
from flaxbn.linen import BatchRenorm as BatchRenorm
from flaxbn.moments import Moments as Moments
from flaxbn.moments import measure as measure
from flaxbn.moments import merge as merge
from flaxbn.moments import merge_across as merge_across
from flaxbn.normalize import ema as ema
from flaxbn.normalize import normalize as normalize
from flaxbn.renorm import correction as correction
from flaxbn.renorm import paper_d_max as paper_d_max
from flaxbn.renorm import paper_r_max as paper_r_max
