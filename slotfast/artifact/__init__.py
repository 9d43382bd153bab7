"""Artifacts: files that hold a quantised model, ours and other people's; verified before use and never executed."""

from .architecture import parse_overrides
from .community import read_community, write_community
from .contents import Artifact
from .format import artifact_bytes, read_artifact, write_artifact
from .load import is_ours, load_artifact

__all__ = [
    "Artifact",
    "artifact_bytes",
    "is_ours",
    "load_artifact",
    "parse_overrides",
    "read_artifact",
    "read_community",
    "write_artifact",
    "write_community",
]
