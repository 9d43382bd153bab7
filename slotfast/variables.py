"""Environment variables that change rows of presets."""

from collections.abc import Mapping

# A variable that the community's scripts read, the key of a row that it sets, and values that mean something else here.
VARIABLES: dict[str, tuple[str, Mapping[str, str]]] = {
    "SLOT_STEPS": ("steps", {}),
    "SLOT_LR": ("lr", {}),
    "SLOT_FOCAL_CTX": ("focal", {}),
    "SLOT_CLAMP": ("clamp", {}),
    "SLOT_WARMSTART": ("warm_start", {}),
    "V20_GRAD_WEIGHTED": ("importance", {"1": "0.5"}),  # PR #1372 weights by the root
}
