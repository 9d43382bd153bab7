"""Adaptation systems as rows of four choices, and the verdict that follows from them."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_BIASED = ("bias", "bias+temperature", "hidden+bias")
_COUNTED = ("bigram", "bias+repeats")
_FITTED = ("lbfgs", "adamw", "mm")


class Adaptation(BaseModel):
    """One adaptation system: the four choices and their numbers.

    Raises:
        pydantic.ValidationError: a value out of range, or choices that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str = ""
    parameter: Literal[
        "none", "bias", "bias+temperature", "hidden", "hidden+bias", "lowrank", "bigram", "bias+repeats"
    ] = "bias"
    positions: Literal["none", "context", "focal", "scored"] = "context"
    scope: Literal["window", "batch", "joint", "prefix"] = "window"
    optimizer: Literal["none", "lbfgs", "adamw", "mm", "rates"] = "lbfgs"
    softcap: Literal["after", "before"] = Field("after", description="where the bias is added: after the cap or before")
    clamp: float | None = Field(None, gt=0, description="bound on every bias")
    focal: int = Field(128, ge=1, le=1 << 20, description="focal positions, counted from the end of the window")
    batch: int = Field(32, ge=2, le=4096, description="windows that are fitted together")
    warm_start: Literal["no", "mean", "place"] = Field(
        "no", description="start from the batch before: its parameters' mean, or those of the same place in it"
    )
    importance: float = Field(0.0, ge=0, le=4, description="a: half the weight goes as (1 - p_target)^a; 0: uniform")
    ridge: float = Field(0.0, ge=0, le=1e6, description="(ridge / 2) |parameter|^2 on top of the summed loss")
    phases: tuple[tuple[int, int], ...] = Field(((25, 20),), description="(iterations, history) of each L-BFGS run")
    tolerance: float = Field(
        1e-9, gt=0, le=1, description="an L-BFGS run ends where its mean loss, in nats, or a number changes less"
    )
    steps: int = Field(8, ge=1, le=1000, description="of adamw or mm")
    lr: float = Field(0.005, gt=0, le=10, description="of the first AdamW step")
    lr_end: float | None = Field(None, ge=0, le=10, description="what a cosine takes it to; None: constant")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-5, gt=0, description="of AdamW")
    weight_decay: float = Field(1e-8, ge=0, le=1, description="of AdamW")
    rank: int = Field(8, ge=1, le=64, description="of the product of two matrices that maps hidden states to logits")
    start: Literal["zero", "random"] = Field("zero", description="of the first of these matrices; the second is zero")
    decay: float | None = Field(None, gt=0, le=1, description="weight of a count one token later; calibrated if None")
    document_decay: float = Field(0.1, ge=0, le=1, description="weight of a count one document later")
    scale: float | None = Field(None, ge=0, le=2, description="strength; calibrated where None")
    k: float | None = Field(
        None, gt=0, le=1e9, description="pseudo-count of the prior; from token frequencies where None"
    )
    k2: float = Field(0.5, gt=0, le=1e9, description="pseudo-count of the bigram form")
    gates: tuple[tuple[float, float], ...] | None = Field(
        None, min_length=6, max_length=6, description="(a, b) of each context length of repeats; calibrated where None"
    )

    @field_validator("phases", mode="before")
    @classmethod
    def _parse_phases(cls, value: Any) -> Any:
        """Phases may be written as 5x10+18x20."""
        if isinstance(value, str):
            return tuple(tuple(int(n) for n in phase.split("x")) for phase in value.split("+"))
        return value

    @field_validator("betas", mode="before")
    @classmethod
    def _parse_betas(cls, value: Any) -> Any:
        """Betas may be written as 0.3+0.9."""
        return tuple(float(n) for n in value.split("+")) if isinstance(value, str) else value

    @field_validator("warm_start", mode="before")
    @classmethod
    def _parse_warm_start(cls, value: Any) -> Any:
        """A plain yes means the published form, the mean."""
        switches = {"0": "no", "false": "no", "off": "no", "1": "mean", "true": "mean", "yes": "mean", "on": "mean"}
        return switches.get(str(value).lower(), value)

    @model_validator(mode="after")
    def _choices_fit(self) -> "Adaptation":
        nothing = {self.parameter == "none", self.positions == "none", self.optimizer == "none"}
        if len(nothing) > 1:
            raise ValueError("parameter, positions and optimizer are all 'none' or none of them is")
        if self.parameter in _COUNTED and (self.optimizer != "rates" or self.scope != "prefix"):
            raise ValueError(f"parameter {self.parameter!r} needs optimizer 'rates' and scope 'prefix'")
        if self.optimizer == "rates" and (
            self.parameter not in ("bias", *_COUNTED) or self.softcap == "before" or self.positions != "context"
        ):
            raise ValueError("optimizer 'rates' needs a bias after the soft cap and positions 'context'")
        if (self.scope == "prefix") > (self.optimizer == "rates"):
            raise ValueError(f"scope 'prefix' needs optimizer 'rates', not {self.optimizer!r}")
        if self.optimizer == "rates" and self.scope not in ("window", "prefix"):
            raise ValueError("optimizer 'rates' needs scope 'window' or 'prefix'")
        if self.scope == "joint" and self.optimizer != "lbfgs":
            raise ValueError("scope 'joint' needs optimizer 'lbfgs': the others act on each number alone")
        if self.optimizer == "mm" and (not self.plain or self.scope != "window" or not (self.ridge or self.clamp)):
            raise ValueError("optimizer 'mm' needs a bias after the soft cap, scope 'window', and a ridge or a clamp")
        if self.optimizer not in _FITTED and self.warm_start != "no":
            raise ValueError("warm_start needs optimizer 'lbfgs', 'adamw' or 'mm'")
        if self.warm_start == "place" and self.scope == "batch":
            raise ValueError("warm_start 'place' needs a parameter for each window")
        if not self.phases or any(not 1 <= number <= 1000 for phase in self.phases for number in phase):
            raise ValueError(f"phases {self.phases}: expected iterations and history of 1 to 1000")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: expected 0 <= beta < 1")
        return self

    @property
    def plain(self) -> bool:
        """Whether the parameter is a bias after the soft cap, whose fit needs neither the head nor autograd."""
        return self.parameter == "bias" and self.softcap == "after"

    @property
    def needs_logits(self) -> bool:
        """Whether it scores with more than the losses that the model has without it."""
        return self.optimizer != "none"

    @property
    def needs_hidden(self) -> bool:
        """Whether logits must be made again from hidden states, because the parameter acts before they are final."""
        return self.parameter in ("hidden", "hidden+bias", "lowrank") or self.softcap == "before"

    @property
    def carries(self) -> bool:
        """Whether a batch's result depends on the batches before it."""
        return self.scope == "prefix" or self.warm_start != "no"

    @property
    def unit(self) -> int:
        """Windows that the fit looks at together."""
        return self.batch if self.scope in ("batch", "joint") or self.warm_start != "no" else 1

    @property
    def options(self) -> tuple[str, ...]:
        """Fields that act on this row, and may be set in NAME:key=value."""
        if self.optimizer == "none":
            return ()
        if self.optimizer == "rates":
            own = {"bigram": ("k2",), "bias+repeats": ("gates",)}.get(self.parameter, ())
            return ("parameter", "positions", "scope", "clamp", "decay", "document_decay", "scale", "k", *own)
        numbers = {
            "lbfgs": ("phases", "tolerance"),
            "adamw": ("steps", "lr", "lr_end", "betas", "eps", "weight_decay"),
            "mm": ("steps",),
        }
        return (
            *("parameter", "positions", "scope", "optimizer", *numbers[self.optimizer], "ridge", "importance"),
            *(("softcap", "clamp") if self.parameter in _BIASED else ()),
            *(("focal",) if self.positions == "focal" else ()),
            *(("batch",) if self.unit > 1 else ()),
            "warm_start",
            *(("rank", "start") if self.parameter == "lowrank" else ()),
        )

    @property
    def compliance(self) -> "Compliance":
        """The contest's four conditions, computed from the choices."""
        if self.positions == "none":
            return Compliance(why="nothing is fitted")
        if self.parameter == "lowrank" and self.start == "zero":
            return Compliance(why="both its factors start at zero, where both gradients vanish: nothing is ever fitted")
        if self.positions == "scored":
            return _leak("it is fitted to the very tokens that it is scored on")
        later = "the context of each holds the tokens that the windows before it are about to score"
        if self.scope == "batch":
            return _leak(f"{self.batch} windows share one parameter, and {later}")
        if self.scope == "joint":
            return _leak(
                f"one line search and one curvature couple the parameters of {self.batch} windows, and {later}"
            )
        if self.scope == "prefix":
            before = "the one being scored" if self.parameter == "bias+repeats" else "the window's first one"
            return Compliance(why=f"its state holds only tokens scored before {before}")
        return Compliance(why="each window's parameter is fitted to tokens that earlier windows scored")

    def summary(self) -> dict[str, Any]:
        """The choices, and the numbers that act."""
        shown = {"name": self.name, "parameter": self.parameter, "positions": self.positions, "scope": self.scope}
        shown["optimizer"] = self.optimizer
        return shown | {key: getattr(self, key) for key in self.options if key not in shown}


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


def _leak(why: str) -> Compliance:
    """A distribution that has seen its own token breaks every condition but that of a single pass."""
    return Compliance(c1=False, c2=False, c3=False, why=why)
