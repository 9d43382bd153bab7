"""Validated settings of the commands, one class each."""

from .evaluation import AuditSettings, CalibrateSettings, EvalSettings
from .files import BundleSettings, ConvertSettings, RecordSettings, ShowSettings
from .settings import ADAPTATION_VARIABLES, Settings, load, setting, show, warn_unread_variables
from .training import TrainSettings

__all__ = [
    "ADAPTATION_VARIABLES",
    "AuditSettings",
    "BundleSettings",
    "CalibrateSettings",
    "ConvertSettings",
    "EvalSettings",
    "RecordSettings",
    "Settings",
    "ShowSettings",
    "TrainSettings",
    "load",
    "setting",
    "show",
    "warn_unread_variables",
]
