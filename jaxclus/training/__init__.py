"""Training: `jc.training.fit` with an objective and a configuration."""

from jaxclus.training import objectives
from jaxclus.training._checkpoint import Checkpoints, CorruptCheckpointError
from jaxclus.training._config import TrainingConfig
from jaxclus.training._fit import Preempted, Run, fit
from jaxclus.training._log import TrainingDiverged

__all__ = [
    "Checkpoints",
    "CorruptCheckpointError",
    "Preempted",
    "Run",
    "TrainingConfig",
    "TrainingDiverged",
    "fit",
    "objectives",
]
