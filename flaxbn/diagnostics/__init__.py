"""Looking at the statistics of a model, never touching them.

`diagnose` names the trap that a model is in. What it looks at can also be had alone: `compare`, how far stored
statistics lie from those of data; `batch_noise`, how far those of a batch do; `gap`, what that costs in loss. `table`
and `figure` show them to people.
"""

from flaxbn.diagnostics.diagnosis import Diagnosis as Diagnosis
from flaxbn.diagnostics.diagnosis import diagnose as diagnose
from flaxbn.diagnostics.drift import Channels as Channels
from flaxbn.diagnostics.drift import Drift as Drift
from flaxbn.diagnostics.drift import Drifts as Drifts
from flaxbn.diagnostics.drift import compare as compare
from flaxbn.diagnostics.findings import Finding as Finding
from flaxbn.diagnostics.loss_gap import Gap as Gap
from flaxbn.diagnostics.loss_gap import gap as gap
from flaxbn.diagnostics.noise import BatchNoise as BatchNoise
from flaxbn.diagnostics.noise import batch_noise as batch_noise
from flaxbn.diagnostics.report import figure as figure
from flaxbn.diagnostics.report import table as table
from flaxbn.models.rows import Row as Row
from flaxbn.models.rows import rows_of as rows_of

_PUBLIC = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith("flaxbn.")]
for _name in _PUBLIC:
    globals()[_name].__module__ = "flaxbn.diagnostics"
del _name


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
