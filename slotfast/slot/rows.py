"""Adaptation systems as rows of four choices, the published ones as presets, and the verdict that follows."""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import InputError


class Adaptation(BaseModel):
    """One adaptation system: the four choices and their numbers.

    Raises:
        pydantic.ValidationError: a value out of range, or choices that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str = ""
    parameter: Literal["none", "bias"] = "bias"
    positions: Literal["none", "context", "focal", "scored"] = "context"
    scope: Literal["window", "batch", "prefix"] = "window"
    optimizer: Literal["none", "lbfgs", "rates"] = "lbfgs"
    clamp: float = Field(5.0, gt=0, description="bound on every bias")
    focal: int = Field(128, ge=1, le=1 << 20, description="focal positions, counted from the end of the window")
    batch: int = Field(32, ge=2, le=4096, description="windows that share one parameter")
    phases: tuple[tuple[int, int], ...] = Field(((25, 20),), description="(iterations, history) of each L-BFGS run")
    ridge: float = Field(0.0, ge=0, le=1e6, description="(ridge / 2) |bias|^2 on top of the summed loss")
    warm_start: bool = Field(False, description="start from the result of the batch before")
    decay: float = Field(0.97 ** (1 / 64), gt=0, le=1, description="weight of a count one token later")
    document_decay: float = Field(0.1, ge=0, le=1, description="weight of a count one document later")
    scale: float | None = Field(None, ge=0, le=2, description="strength; calibrated where None")
    k: float | None = Field(
        None, gt=0, le=1e9, description="pseudo-count of the prior; from token frequencies where None"
    )

    @field_validator("phases", mode="before")
    @classmethod
    def _parse_phases(cls, value: Any) -> Any:
        """Phases may be written as 5x10+18x20."""
        if isinstance(value, str):
            return tuple(tuple(int(n) for n in phase.split("x")) for phase in value.split("+"))
        return value

    @model_validator(mode="after")
    def _choices_fit(self) -> "Adaptation":
        if (self.parameter == "none") != (self.optimizer == "none") or (self.optimizer == "none") != (
            self.positions == "none"
        ):
            raise ValueError("parameter, positions and optimizer are all 'none' or none of them is")
        if self.optimizer == "rates" and (self.scope == "batch" or self.positions != "context"):
            raise ValueError("optimizer 'rates' needs positions 'context' and scope 'window' or 'prefix'")
        if self.optimizer == "lbfgs" and self.scope == "prefix":
            raise ValueError("optimizer 'lbfgs' needs scope 'window' or 'batch'")
        if self.warm_start and self.scope != "batch":
            raise ValueError("warm_start needs scope 'batch'")
        if not self.phases or any(not 1 <= number <= 1000 for phase in self.phases for number in phase):
            raise ValueError(f"phases {self.phases}: expected iterations and history of 1 to 1000")
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """Fields that act on this row, and may be set in NAME:key=value."""
        if self.optimizer == "none":
            return ()
        choices = ("positions", "scope", "clamp")
        if self.optimizer == "rates":
            return (*choices, "decay", "document_decay", "scale", "k")
        focal = ("focal",) if self.positions == "focal" else ()
        shared = ("batch", "warm_start") if self.scope == "batch" else ()
        return (*choices, "phases", "steps", "ridge", *focal, *shared)

    @property
    def compliance(self) -> "Compliance":
        """The contest's four conditions, computed from the choices."""
        if self.positions == "scored":
            return Compliance(c1=False, c3=False, why="it is fitted to the very tokens that it is scored on")
        if self.scope == "batch" and self.positions != "none":
            return Compliance(
                c1=False,
                c3=False,
                why=f"{self.batch} windows share one parameter, and the context of each holds the tokens that the "
                "windows before it are about to score",
            )
        if self.scope == "prefix":
            return Compliance(why="its state holds only tokens scored before the window's first one")
        if self.positions == "none":
            return Compliance(why="nothing is fitted")
        return Compliance(why="each window's parameter is fitted to tokens that earlier windows scored")

    def summary(self) -> dict[str, Any]:
        """The choices, and the numbers that act."""
        shown = {"name": self.name, "parameter": self.parameter, "positions": self.positions, "scope": self.scope}
        numbers = {key: getattr(self, key) for key in self.options if key not in (*shown, "steps")}
        return {**shown, "optimizer": self.optimizer, **numbers}


@dataclass(frozen=True)
class Compliance:
    """Strict causality (c1), full distribution (c2), score before update (c3), single pass (c4); and the reason."""

    c1: bool = True
    c2: bool = True
    c3: bool = True
    c4: bool = True
    why: str = ""

    @property
    def causal(self) -> bool:
        return self.c1 and self.c2 and self.c3 and self.c4


PRESETS: dict[str, Adaptation] = {
    row.name: row
    for row in (
        Adaptation(
            name="none",
            about="plain sliding windows",
            parameter="none",
            positions="none",
            optimizer="none",
        ),
        Adaptation(
            name="causal",
            about="token rates over the stream so far, refreshed after every window",
            scope="prefix",
            optimizer="rates",
        ),
        Adaptation(
            name="causal-window",
            about="token rates over the window's own context: nothing is carried",
            optimizer="rates",
            decay=0.9985,
        ),
        Adaptation(
            name="causal-lbfgs",
            about="a bias per window by L-BFGS on all of its context, held back by a ridge",
            ridge=3.0,
        ),
        Adaptation(
            name="pr1350",
            about="PR #1350: one bias for 32 windows, focal 128, warm start: sees what it scores",
            positions="focal",
            scope="batch",
            warm_start=True,
        ),
        Adaptation(
            name="pr1350-window",
            about="PR #1350 made honest: the same fit for each window alone, no warm start",
            positions="focal",
        ),
    )
}


def parse_preset(text: str) -> Adaptation:
    """A row from NAME or NAME:key=value,key=value.

    Raises:
        InputError: unknown name or key (with the nearest right one), or a value that does not fit.
    """
    name, _, options = text.partition(":")
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: no such preset{_nearest(name, PRESETS)}; --list-presets shows them")
    row, changes = PRESETS[name], {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise InputError(f"preset {text!r}: {option!r} is not of the form key=value")
        changes[key] = value
    if {"steps", "phases"} <= changes.keys():
        raise InputError(f"preset {text!r}: steps and phases say the same: give one of them")
    known = (*Adaptation.model_fields, "steps")
    changed = _changed(row, {key: value for key, value in changes.items() if key in known}, f"preset {text!r}")
    for key in changes:
        if key not in (*row.options, *changed.options):
            raise InputError(f"preset {text!r}: {key!r} does nothing here{_nearest(key, changed.options)}")
    return changed


def from_environment(row: Adaptation, text: str) -> Adaptation:
    """The row with SLOT_* variables applied, except to keys that `text`, its NAME:key=value form, sets itself."""
    explicit = {option.partition("=")[0] for option in text.partition(":")[2].split(",")}
    explicit |= {"steps"} if "phases" in explicit else set()
    variables = {"STEPS": "steps", "FOCAL_CTX": "focal", "CLAMP": "clamp", "WARMSTART": "warm_start"}
    for variable, key in ((f"SLOT_{name}", key) for name, key in variables.items()):
        value = os.environ.get(variable, "")
        if value and key in row.options and key not in explicit:
            row = _changed(row, {key: value}, variable)
    return row


def _changed(row: Adaptation, changes: Mapping[str, str], where: str) -> Adaptation:
    changes = dict(changes)
    try:
        if "steps" in changes:
            changes["phases"] = ((int(changes.pop("steps")), row.phases[-1][1]),)
        return Adaptation.model_validate({**row.model_dump(), **changes})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = f"{first['loc'][0]}={first['input']}: " if first["loc"] else ""
        raise InputError(f"{where}: {key}{first['msg']}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; the nearest is {near[0]!r}" if near else ""
