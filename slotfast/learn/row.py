"""A learning system as a row of choices, the verdict that follows from them, and the way from text to a row."""

from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import InputError, expected
from ..slot import PRESETS, Adaptation, Compliance, parse_preset
from ..slot.presets import check_acting, read_changes
from ..words import nearest
from .lora import PROJECTIONS

_OPTIONAL = ("clip",)


class Learning(BaseModel):
    """One way to learn from what has been scored.

    Raises:
        pydantic.ValidationError: a value out of range, or choices that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str = ""
    what: Literal["all", "lora", "norms"] = Field("lora", description="what learns")
    rank: int = Field(16, ge=1, le=1024, description="of LoRA's factors")
    projections: tuple[str, ...] = Field(PROJECTIONS, min_length=1, description="that LoRA stands beside")
    chunk: int = Field(64, ge=1, le=1 << 17, description="tokens that are charged, and then learned from")
    steps: int = Field(1, ge=1, le=1000, description="of the optimiser on each chunk")
    scope: Literal["stream", "document"] = Field("stream", description="document: what learned starts afresh at BOS")
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(5e-4, gt=0, le=10)
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW")
    eps: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    decay: float = Field(0.0, ge=0, le=100, description="of the weights, times lr a step")
    clip: float | None = Field(None, gt=0, description="bound on the gradient's norm")
    keys: Literal["stale"] = Field("stale", description="of earlier chunks: as they were when these were scored")
    order: Literal["stream"] = Field("stream", description="in which tokens are charged")

    @field_validator("projections", mode="before")
    @classmethod
    def _parse_projections(cls, value: Any) -> Any:
        """Projections may be written as q/v."""
        names = tuple(value.split("/")) if isinstance(value, str) else tuple(value)
        for name in names:
            if name not in PROJECTIONS:
                raise ValueError(f"no projection {name!r}: expected some of {'/'.join(PROJECTIONS)}")
        if len(set(names)) < len(names):
            raise ValueError("expected different projections")
        return names

    @field_validator("betas", mode="before")
    @classmethod
    def _parse_betas(cls, value: Any) -> Any:
        """Betas may be written as 0.9+0.99."""
        return tuple(float(n) for n in value.split("+")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _choices_fit(self) -> "Learning":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: expected 0 <= beta < 1")
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """Fields that act on this row, and may be set in NAME:key=value."""
        return (
            "what",
            *(("rank", "projections") if self.what == "lora" else ()),
            *("chunk", "steps", "scope", "optimizer", "lr"),
            *(("betas", "eps") if self.optimizer == "adamw" else ("momentum",)),
            *("decay", "clip", "keys", "order"),
        )

    @property
    def compliance(self) -> Compliance:
        """The contest's four conditions, computed from the choices: no choice that is offered leaks."""
        fresh = ", and it starts afresh at each document" if self.scope == "document" else ""
        return Compliance(why=f"each chunk of {self.chunk} tokens is charged before anything learns from it{fresh}")

    def summary(self) -> dict[str, Any]:
        """The choices, and the numbers that act."""
        return {"name": self.name} | {key: getattr(self, key) for key in self.options}


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
    known |= {key: None for key in _OPTIONAL if changes.get(key) == "none"}
    try:
        changed = Learning.model_validate({**row.model_dump(), **known})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = f"{first['loc'][0]}={changes.get(first['loc'][0])}: " if first["loc"] else ""
        raise InputError(f"{where}: {key}{expected(first)}") from None
    check_acting(changes, changed.options, where)
    return changed
