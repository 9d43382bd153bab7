"""The rows that learn, published ones and ours, and how rows are read from text."""

import re
from collections.abc import Mapping
from typing import Any

import pydantic

from ..errors import Fault, InputError
from ..slot import PRESETS, Adaptation, parse_preset
from ..slot.presets import check_acting, read_changes
from ..words import nearest
from .row import Learning
from .top import check_top

_OFF = {"clip": None, "alpha": None, "slots": None, "phase_clip": None, "short": ()}  # what `none` says
_DOCUMENTS = {"scope": "document", "keys": "recompute", "eps": 1e-10, "lr": 1e-4, "decay": 0.5, "slots": 64}
_ALL = ("q", "k", "v", "attn", "mlp", "head")  # attn: what the published code calls O, beside the whole attention
_1855 = {"projections": _ALL, "rank": 80, "alpha": 144, "betas": (0.0, 0.99), "chunk": 48}
_TTT = {"what": "all", "chunk": 32768, "steps": 3, "optimizer": "sgd", "momentum": 0.9, "clip": 1.0, "keys": "windows"}
_PHASED = {"order": "longest", "start": "warm"}

LEARNING: dict[str, Learning] = {
    name: Learning(name=name, about=about, **choices)
    for name, about, choices in (
        ("learn", "score a chunk, then learn from it: LoRA beside all linear layers", {}),
        (
            "lora-doc",
            "#1855's LoRA for each document, made honest: as they come, and each for itself",
            _DOCUMENTS | _1855,
        ),
        (
            "lora-1530",
            "PR #1530: LoRA of rank 96 for each document, chunks of 32, longest first",
            _DOCUMENTS
            | {"projections": _ALL, "rank": 96, "betas": (0.0, 0.999), "chunk": 32}
            | {"start": "fresh", "order": "longest"},
        ),
        (
            "lora-1855",
            "PR #1855: rank 80, A kept from document to document, three phases of SGD on all weights",
            _DOCUMENTS | _1855 | _PHASED | {"phases": 3},
        ),
        (
            "lora-2014",
            "PR #2014, its learning: no Q and V, shorter chunks for short documents, one phase",
            _DOCUMENTS
            | _1855
            | _PHASED
            | {"projections": ("k", "attn", "mlp", "head"), "lr": 7.5e-5, "slots": 24, "phases": 1}
            | {"short": ((2000, 24), (256, 8))},
        ),
        (
            "ttt-549",
            "PR #549: windows as published; all weights, three epochs of SGD over each chunk of 32,768",
            _TTT | {"lr": 0.002, "schedule": "cosine"},
        ),
        ("ttt-1413", "PR #1413: the same at a higher rate", _TTT | {"lr": 0.005, "schedule": "cosine"}),
    )
}


# Of `learn`, by slotfast calibrate
CALIBRATED = ("what", "rank", "chunk", "optimizer", "lr", "betas", "eps", "decay", "forget", "steps")


def calibrated_row(row: Learning, metadata: Mapping[str, Any]) -> Learning:
    """The row `learn` with the numbers that a model's calibration chose for it; any other row as it is.

    Numbers that the row's name, `learn:key=value,...`, sets stand; where it says what learns, or by which optimiser,
    numbers that were chosen for another are none for it, and neither are they where they do not go with what it says.

    Args:
        metadata: of the model's file; its `calibration` may have `learn`.

    Raises:
        InputError: numbers that no row can have.
    """
    stored = (metadata.get("calibration") or {}).get("learn")
    if not stored or re.split(r"[:+]", row.name, maxsplit=1)[0] != "learn":
        return row
    chosen = _chosen(stored)
    given = given_keys(row.name)
    if any(key in given and getattr(row, key) != chosen[key] for key in ("what", "optimizer")):
        return row
    changed = vars(row) | {key: value for key, value in chosen.items() if key not in given}
    try:
        calibrated = Learning.model_validate(changed)
    except pydantic.ValidationError:
        return row
    return calibrated if given <= set(calibrated.options) else row


def _chosen(stored: Any) -> dict[str, Any]:
    """Numbers of a file, each of which may be anything."""
    if not isinstance(stored, Mapping):
        raise InputError("the model's calibration of 'learn': expected numbers by name")
    chosen = {key: stored[key] for key in CALIBRATED if stored.get(key) is not None}
    try:
        Learning(name="learn", **chosen)
    except pydantic.ValidationError as error:
        raise InputError(f"the model's calibration of 'learn': {Fault.of(error)}") from None
    return chosen


def given_keys(text: str) -> frozenset[str]:
    """The keys that a row's text sets, of what learns where it is ROW+ROW."""
    return frozenset(read_changes(_split(text)[0], f"preset {text!r}"))


def parse_row(text: str) -> Adaptation | Learning:
    """A row of either kind from NAME or NAME:key=value,key=value; one on top of another as ROW+ROW, the first learns.

    Raises:
        InputError: unknown name or key (with the nearest right one), a value that does not fit, or a row that does not
            go on top.
    """
    first, joined, second = _split(text)
    name = first.partition(":")[0]
    where = f"preset {text!r}"
    if name in LEARNING:
        row = _changed(LEARNING[name], read_changes(first, where), where)
        if not joined:
            return row
        top = parse_row(second)
        if not isinstance(top, Adaptation):
            raise InputError(f"{where}: {second!r} on top learns too: expected a row that shares a forward")
        check_top(top, where)
        return row.model_copy(update={"top": top})
    if joined:
        raise InputError(f"{where}: in ROW+ROW the first learns: expected one of {', '.join(LEARNING)}")
    if name not in PRESETS:
        raise InputError(
            f"preset {name!r}: no such preset{nearest(name, [*PRESETS, *LEARNING])}; --list-presets shows them"
        )
    return parse_preset(text)


def _split(text: str) -> tuple[str, str, str]:
    """ROW+ROW at the first plus in front of a letter; within the values of a row that learns a number follows it."""
    learns = re.split(r"[:+]", text, maxsplit=1)[0] in LEARNING
    named = re.match(r"[\w-]+\+(?=[A-Za-z])", text)
    match = re.search(r"\+(?=[A-Za-z])", text) if learns or named else None
    return (text[: match.start()], "+", text[match.end() :]) if match else (text, "", "")


def _changed(row: Learning, changes: Mapping[str, str], where: str) -> Learning:
    fields = Learning.model_fields.keys() - {"name", "about", "top"}
    known: dict[str, Any] = {key: value for key, value in changes.items() if key in fields}
    known |= {key: off for key, off in _OFF.items() if changes.get(key) == "none"}
    try:
        changed = Learning.model_validate({**row.model_dump(), **known})
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        key = f"{fault.name}={changes.get(fault.name)}: " if fault.name else ""
        raise InputError(f"{where}: {key}{fault.expected}") from None
    check_acting(changes, changed.options, where)
    return changed
