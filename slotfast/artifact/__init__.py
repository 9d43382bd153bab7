"""Artifacts: files that hold a quantised model, ours and other people's; verified before use and never executed."""

from .contents import Artifact
from .format import read_artifact, write_artifact

__all__ = ["Artifact", "read_artifact", "write_artifact"]
