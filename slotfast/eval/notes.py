"""What a reader of a result must know to read it rightly: a line each, in the table and in the JSON."""

from collections.abc import Mapping

from ..overlap import MAX_OVERLAP

_SEEN = {
    "calibration": "`causal` was calibrated on",
    "training": "the model was trained on",
    "ttt": "the model was adapted to",
}


def seen_notes(seen: Mapping[str, float]) -> list[str]:
    """Warnings of a text that the model, or its adaptation, was made from.

    Args:
        seen: see `slotfast.overlap.seen`.
    """
    return [
        f"warning: {_SEEN.get(name, name)} text that shares about {share:.1%} of its runs of 32 tokens with this one: "
        "no honest score"
        for name, share in seen.items()
        if share > MAX_OVERLAP
    ]
