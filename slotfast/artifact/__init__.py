"""Artifacts: files that hold a quantised model, ours and other people's; verified before use and never executed."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
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
__getattr__, __dir__ = exports(
    __name__,
    {
        ".architecture": ["parse_overrides"],
        ".community": ["read_community", "write_community"],
        ".contents": ["Artifact"],
        ".format": ["artifact_bytes", "read_artifact", "write_artifact"],
        ".load": ["is_ours", "load_artifact"],
    },
)
