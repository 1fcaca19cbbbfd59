"""Every setting of an experiment, as frozen dataclasses.

A recipe is a TOML file whose tables are the sections of `Config`, read by `cpd.config.load`. Everything in
`Config` outside `logging` affects results and is frozen in the run directory.
"""

from cpd.config.experiment import (
    Config,
    EvaluationConfig,
    LoggingConfig,
    StreamConfig,
    changes,
    continued,
    differences,
)
from cpd.config.student import DistillConfig, MemoryConfig, MethodConfig, ProtectionConfig, StudentConfig
from cpd.config.teacher import (
    ExplorationConfig,
    PPOConfig,
    RolloutConfig,
    StayConfig,
    TeacherConfig,
    WarmStartConfig,
)

__all__ = [
    "Config",
    "DistillConfig",
    "EvaluationConfig",
    "ExplorationConfig",
    "LoggingConfig",
    "MemoryConfig",
    "MethodConfig",
    "PPOConfig",
    "ProtectionConfig",
    "RolloutConfig",
    "StayConfig",
    "StreamConfig",
    "StudentConfig",
    "TeacherConfig",
    "WarmStartConfig",
    "changes",
    "continued",
    "differences",
]
