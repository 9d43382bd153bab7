"""The published systems and ours, one row each, and how rows are read from text and the environment."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic

from ..errors import Fault, InputError
from ..variables import VARIABLES
from ..words import nearest
from .adaptation import Adaptation

_STREAM = {"scope": "prefix", "optimizer": "rates", "clamp": 5.0}
_REPEATS = {"parameter": "bias+repeats"}
_FOCAL_BATCH = {"positions": "focal", "scope": "batch", "warm_start": "mean", "clamp": 5.0}
_TWO_PHASES = {"phases": ((5, 10), (18, 20))}
_HIDDEN = {"parameter": "hidden", "optimizer": "adamw", "steps": 8, "lr": 0.005}
_FILM = {"parameter": "hidden+bias", "softcap": "before", "positions": "focal", "warm_start": "mean", "clamp": 5.0}
_FILM_ADAMW = {"optimizer": "adamw", "steps": 24, "lr": 0.012, "lr_end": 0.001}
_FILM_LBFGS = {"scope": "joint", "phases": ((24, 20),)}
_OPTIONAL = ("clamp", "lr_end", "scale", "k", "decay", "gates")
_MAY_IDLE = ("positions", "scope", "optimizer", "parameter")
_FILM_LOWRANK = {"parameter": "lowrank", "positions": "focal", "scope": "batch", "warm_start": "mean"}

PRESETS: dict[str, Adaptation] = {
    name: Adaptation(name=name, about=about, **choices)
    for name, about, choices in (
        ("none", "plain sliding windows", {"parameter": "none", "positions": "none", "optimizer": "none"}),
        ("causal", "token rates over the stream so far, and what followed the same tokens before", _STREAM | _REPEATS),
        ("causal-unigram", "token rates over the stream so far, refreshed after every window", _STREAM),
        ("causal-bigram", "the same for each preceding token", _STREAM | {"parameter": "bigram"}),
        (
            "causal-window",
            "token rates over the window's own context: nothing is carried",
            {"optimizer": "rates", "decay": 0.9985, "clamp": 5.0},
        ),
        (
            "causal-lbfgs",
            "a bias per window by L-BFGS on all of its context, held back by a ridge",
            # float32 losses that differ by less cannot be told apart
            {"ridge": 3.0, "clamp": 5.0, "tolerance": 1e-7},
        ),
        ("pr1350", "PR #1350: one bias for 32 windows, focal 128, warm start: sees what it scores", _FOCAL_BATCH),
        (
            "pr1350-window",
            "PR #1350 made honest: the same fit for each window alone, no warm start",
            {"positions": "focal", "clamp": 5.0},
        ),
        ("pr1372", "PR #1372: as #1350, 5 and then 18 iterations with fresh memory", _FOCAL_BATCH | _TWO_PHASES),
        (
            "pr1372-window",
            "PR #1372 made honest: each window alone, no warm start",
            {"positions": "focal", "clamp": 5.0, **_TWO_PHASES},
        ),
        (
            "pr1217",
            "PR #1217: one shift of the hidden states for 32 windows",
            _HIDDEN | {"scope": "batch"},
        ),
        ("pr1217-window", "PR #1217 made honest, as its thread proposed: a shift for each window", _HIDDEN),
        (
            "pr1306",
            "PR #1306: as #1217, with betas 0.3 and 0.9",
            _HIDDEN | {"scope": "batch", "betas": (0.3, 0.9)},
        ),
        (
            "pr1318",
            "PR #1318: as #1350, fitted to the positions that it scores",
            _FOCAL_BATCH | {"positions": "scored"},
        ),
        (
            "pr1229",
            "PR #1229: hidden shift and bias for each window, fitted to the positions that it scores",
            {"parameter": "hidden+bias", "softcap": "before", "positions": "scored", "optimizer": "adamw"}
            | {"steps": 16, "lr": 0.008, "lr_end": 0.0008},
        ),
        (
            "film-v1",
            "yuyeon's FiLM model, v1: hidden shift and bias on all context (its stride was 96)",
            {"parameter": "hidden+bias", "softcap": "before", **_FILM_ADAMW},
        ),
        (
            "film-logit-only",
            "FiLM: the bias alone, focal 128, started from the mean of the batch before",
            _FILM | _FILM_ADAMW | {"parameter": "bias"},
        ),
        ("film-lbfgs", "FiLM: hidden shifts and biases of a batch under one L-BFGS", _FILM | _FILM_LBFGS),
        (
            "film-lbfgs-logit",
            "FiLM: biases of a batch under one L-BFGS",
            _FILM | _FILM_LBFGS | {"parameter": "bias"},
        ),
        (
            "film-lowrank",
            "FiLM: a product of rank 8, shared in a batch, as published: both factors start at zero and stay there",
            _FILM_LOWRANK | {"phases": ((24, 20),)},
        ),
        (
            "film-lowrank-repaired",
            "the same from a random first factor, so that it can move",
            _FILM_LOWRANK | {"phases": ((24, 20),), "start": "random"},
        ),
    )
}


def is_published(row: Adaptation) -> bool:
    """Whether a row, by its name or NAME:key=value, is a published system, whose numbers are those of windows."""
    name = row.name.partition(":")[0]
    return name != "none" and not name.startswith("causal")


def parse_preset(text: str) -> Adaptation:
    """A row from NAME or NAME:key=value,key=value.

    Args:
        text: a name of `PRESETS`, and changes of its keys.

    Returns:
        The row; its `name` is the preset's.

    Raises:
        InputError: unknown name or key (with a near one that exists), or a value that does not fit.
    """
    name = text.partition(":")[0]
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: no such preset{nearest(name, PRESETS)}; --list-presets shows them")
    where = f"preset {text!r}"
    changes = read_changes(text, where)
    if {"steps", "phases"} <= changes.keys():
        raise InputError(f"{where}: steps and phases say the same: give one of them")
    known = {key: value for key, value in changes.items() if key in Adaptation.model_fields}
    changed = _changed(PRESETS[name], known, where)
    check_acting(changes, (*changed.options, *(("steps",) if changed.optimizer == "lbfgs" else ()), *_MAY_IDLE), where)
    return changed


def read_changes(text: str, where: str) -> dict[str, str]:
    """The values in NAME or NAME:key=value,key=value by key; another form raises an InputError, `where` in front."""
    _, colon, options = text.partition(":")
    changes: dict[str, str] = {}
    for option in options.split(",") if colon else ():
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"{where}: {option!r} is not of the form key=value")
        if key in changes:
            raise InputError(f"{where}: {key!r} is given twice")
        changes[key] = value
    return changes


def check_acting(changes: Iterable[str], acting: Iterable[str], where: str) -> None:
    """Raise an InputError that begins with `where` if a key does nothing on its row."""
    acting = list(dict.fromkeys(acting))
    for key in changes:
        if key not in acting:
            near, keys = nearest(key, acting), ", ".join(acting)
            raise InputError(f"{where}: {key!r} does nothing here{near}; keys that do: {keys}")


def from_environment(row: Adaptation, text: str) -> Adaptation:
    """The row with the community's variables applied, except to keys that `text`, NAME:key=value, sets itself."""
    explicit = set(read_changes(text, f"preset {text!r}"))
    explicit |= {"steps"} if "phases" in explicit else set()
    for variable, (key, meaning) in VARIABLES.items():
        value = os.environ.get(variable, "")
        acts = key in row.options or (key == "steps" and row.optimizer == "lbfgs")
        if value and acts and key not in explicit:
            row = _changed(row, {key: meaning.get(value, value)}, variable)
    return row


def _changed(row: Adaptation, changes: Mapping[str, str], where: str) -> Adaptation:
    values: dict[str, Any] = {
        key: None if value == "none" and key in _OPTIONAL else value for key, value in changes.items()
    }
    try:
        if "steps" in values and values.get("optimizer", row.optimizer) == "lbfgs":
            values["phases"] = ((int(values.pop("steps")), row.phases[-1][1]),)
        return Adaptation.model_validate({**row.model_dump(), **values})
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        key = f"{fault.name}={fault.value}: " if fault.name else ""
        raise InputError(f"{where}: {key}{fault.expected}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
