"""The rows that learn, published ones and ours, and the way from text to a row."""

from typing import Any

import pydantic

from ..errors import Fault, InputError
from ..slot import PRESETS, Adaptation, parse_preset
from ..slot.presets import check_acting, read_changes
from ..words import nearest
from .row import Learning

_OFF = {"clip": None, "alpha": None, "slots": None, "phase_clip": None, "short": ()}  # what `none` says

LEARNING: dict[str, Learning] = {
    "learn": Learning(name="learn", about="score a chunk, then learn from it: LoRA beside all linear layers"),
}


def parse_row(text: str) -> Adaptation | Learning:
    """A row of either kind from NAME or NAME:key=value,key=value.

    Raises:
        InputError: unknown name or key (with the nearest right one), or a value that does not fit.
    """
    name, _, options = text.partition(":")
    if name in LEARNING:
        return _changed(LEARNING[name], options, f"preset {text!r}")
    if name not in PRESETS:
        raise InputError(
            f"preset {name!r}: no such preset{nearest(name, [*PRESETS, *LEARNING])}; --list-presets shows them"
        )
    return parse_preset(text)


def _changed(row: Learning, options: str, where: str) -> Learning:
    changes = read_changes(options, where)
    known: dict[str, Any] = {key: value for key, value in changes.items() if key in Learning.model_fields}
    known |= {key: off for key, off in _OFF.items() if changes.get(key) == "none"}
    try:
        changed = Learning.model_validate({**row.model_dump(), **known})
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        key = f"{fault.name}={changes.get(fault.name)}: " if fault.name else ""
        raise InputError(f"{where}: {key}{fault.expected}") from None
    check_acting(changes, changed.options, where)
    return changed
