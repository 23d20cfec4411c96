"""Batch normalization for JAX without its traps."""

from flaxbn import diagnostics as diagnostics
from flaxbn import domains as domains
from flaxbn.arithmetic.moments import Moments as Moments
from flaxbn.arithmetic.moments import measure as measure
from flaxbn.arithmetic.moments import merge as merge
from flaxbn.arithmetic.moments import merge_across as merge_across
from flaxbn.arithmetic.normalize import ema as ema
from flaxbn.arithmetic.normalize import normalize as normalize
from flaxbn.arithmetic.renorm import correction as correction
from flaxbn.arithmetic.renorm import paper_d_max as paper_d_max
from flaxbn.arithmetic.renorm import paper_r_max as paper_r_max
from flaxbn.data.placement import data_sharding as data_sharding
from flaxbn.estimation.exact.plan import Plan as Plan
from flaxbn.estimation.exact.plan import plan as plan
from flaxbn.estimation.population import estimate_population_stats as estimate_population_stats
from flaxbn.estimation.population import population_moments as population_moments
from flaxbn.estimation.population import to_batch_stats as to_batch_stats
from flaxbn.estimation.replicas import merge_replicas as merge_replicas
from flaxbn.inference.export import export_inference as export_inference
from flaxbn.inference.load import Inference as Inference
from flaxbn.inference.load import load_inference as load_inference
from flaxbn.layers.linen import BatchNorm as BatchNorm
from flaxbn.layers.linen import BatchRenorm as BatchRenorm
from flaxbn.models.apply import apply as apply
from flaxbn.models.independence import BatchDependenceError as BatchDependenceError
from flaxbn.models.independence import assert_batch_independent as assert_batch_independent
