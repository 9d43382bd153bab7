"""Validated settings of the commands, one class each."""

from .arguments import ADAPTATION_VARIABLES, version
from .evaluation import AuditSettings, CalibrateSettings, EvalSettings
from .files import BundleSettings, ConvertSettings, RecordSettings, ShowSettings
from .outputs import PROGRESS, Kind, check_outputs, results
from .settings import Settings, load, setting, show, start, switch, warn_unread_variables
from .training import TrainSettings

__all__ = [
    "ADAPTATION_VARIABLES",
    "PROGRESS",
    "AuditSettings",
    "BundleSettings",
    "CalibrateSettings",
    "ConvertSettings",
    "EvalSettings",
    "Kind",
    "RecordSettings",
    "Settings",
    "ShowSettings",
    "TrainSettings",
    "check_outputs",
    "load",
    "results",
    "setting",
    "show",
    "start",
    "switch",
    "version",
    "warn_unread_variables",
]
