"""Batch normalization for JAX without its traps."""

from flaxbn import diagnostics as diagnostics
from flaxbn import domains as domains
from flaxbn.exact import plan as plan
from flaxbn.export import export_inference as export_inference
from flaxbn.independence import BatchDependenceError as BatchDependenceError
from flaxbn.independence import assert_batch_independent as assert_batch_independent
from flaxbn.inference import Inference as Inference
from flaxbn.inference import load_inference as load_inference
from flaxbn.linen import BatchNorm as BatchNorm
from flaxbn.linen import BatchRenorm as BatchRenorm
from flaxbn.mesh import data_sharding as data_sharding
from flaxbn.moments import Moments as Moments
from flaxbn.moments import measure as measure
from flaxbn.moments import merge as merge
from flaxbn.moments import merge_across as merge_across
from flaxbn.normalize import ema as ema
from flaxbn.normalize import normalize as normalize
from flaxbn.planning import Plan as Plan
from flaxbn.population import apply as apply
from flaxbn.population import estimate_population_stats as estimate_population_stats
from flaxbn.population import population_moments as population_moments
from flaxbn.population import to_batch_stats as to_batch_stats
from flaxbn.renorm import correction as correction
from flaxbn.renorm import paper_d_max as paper_d_max
from flaxbn.renorm import paper_r_max as paper_r_max
from flaxbn.replicas import merge_replicas as merge_replicas
