"""Looking at the statistics of a model, never touching them."""

from flaxbn.diagnosis import Diagnosis as Diagnosis
from flaxbn.diagnosis import diagnose as diagnose
from flaxbn.drift import Channels as Channels
from flaxbn.drift import Drift as Drift
from flaxbn.drift import compare as compare
from flaxbn.findings import Finding as Finding
from flaxbn.gap import Gap as Gap
from flaxbn.gap import gap as gap
from flaxbn.noise import BatchNoise as BatchNoise
from flaxbn.noise import batch_noise as batch_noise
from flaxbn.report import figure as figure
from flaxbn.report import table as table
from flaxbn.rows import Row as Row
from flaxbn.rows import rows_of as rows_of
