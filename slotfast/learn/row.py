"""A learning system as a row of choices, and the verdict that follows from them."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..slot import Adaptation, Compliance
from .layers import PROJECTIONS

_PHASES = ("prefix", "phase_lr", "phase_momentum", "phase_epochs", "phase_clip", "piece")


class Learning(BaseModel):
    """One way to learn from what has been scored.

    Raises:
        pydantic.ValidationError: a value out of range, or choices that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    about: str = ""
    top: Adaptation | None = Field(None, description="adapts the logits that are learned, as each chunk is charged")
    what: Literal["all", "lora", "norms"] = Field("lora", description="what learns")
    rank: int = Field(16, ge=1, le=1024, description="of LoRA's factors")
    alpha: float | None = Field(None, gt=0, le=1e6, description="LoRA's product counts alpha / rank times; none: once")
    projections: tuple[str, ...] = Field(
        ("q", "k", "v", "o", "up", "down", "head"), min_length=1, description="that LoRA stands beside"
    )
    start: Literal["cold", "fresh", "warm"] = Field(
        "cold", description="A where a document begins: one draw for all, one of its own, or what the slot's last left"
    )
    chunk: int = Field(64, ge=1, le=1 << 17, description="tokens that are charged, and then learned from")
    short: tuple[tuple[int, int], ...] = Field(
        (), max_length=8, description="(tokens, chunk): of groups whose longest document has no more tokens"
    )
    steps: int = Field(1, ge=0, le=1000, description="of the optimiser on each chunk; 0: nothing is learned")
    scope: Literal["stream", "document"] = Field("stream", description="document: what learned starts afresh at BOS")
    forget: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of what was learned that goes where a document begins; the optimiser's stays",
    )
    slots: int | None = Field(
        None, ge=1, le=4096, description="documents side by side, each by its own tokens alone; none: one stream"
    )
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = Field(5e-4, gt=0, le=10)
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW")
    eps: float = Field(1e-8, gt=0, le=1, description="of AdamW")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD")
    decay: float = Field(0.0, ge=0, le=100, description="of the weights, times lr a step")
    clip: float | None = Field(None, gt=0, description="bound on the gradient's norm")
    keys: Literal["stale", "refresh", "recompute", "windows"] = Field(
        "stale", description="of earlier chunks: as they were when these were scored, or forwarded again"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the rate, over all chunks of the stream"
    )
    batch: int = Field(32, ge=1, le=1 << 16, description="sequences of a step, where a chunk is more than one window")
    every: int = Field(8, ge=1, le=1 << 17, description="chunks from one refresh of the keys to the next")
    order: Literal["stream", "longest"] = Field("stream", description="in which documents are charged")
    phases: int = Field(0, ge=0, le=100, description="times that all weights are trained on the documents charged")
    prefix: int = Field(2500, ge=1, description="documents charged when the last phase begins")
    phase_lr: float = Field(1e-3, gt=0, le=10, description="SGD's rate on a phase's first piece; a cosine ends it")
    phase_momentum: float = Field(0.9, ge=0, lt=1)
    phase_epochs: int = Field(1, ge=1, le=100)
    phase_clip: float | None = Field(1.0, gt=0, description="bound on the gradient's norm")
    piece: int = Field(32768, ge=1, le=1 << 24, description="tokens of a phase's step")

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
        if not isinstance(value, str):
            return value
        try:
            first, second = map(float, value.split("+"))
        except ValueError:
            raise ValueError("expected two numbers, as 0.9+0.99") from None
        return first, second

    @field_validator("short", mode="before")
    @classmethod
    def _parse_short(cls, value: Any) -> Any:
        """Short groups' chunks may be written as 2000+24/256+8."""
        if not isinstance(value, str):
            return value
        try:
            return tuple((int(tokens), int(chunk)) for tokens, chunk in (part.split("+") for part in value.split("/")))
        except ValueError:
            raise ValueError("expected pairs of tokens and chunk, as 2000+24/256+8") from None

    @model_validator(mode="after")
    def _choices_fit(self) -> "Learning":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: expected 0 <= beta < 1")
        if any(tokens < 1 or not 1 <= chunk <= self.chunk for tokens, chunk in self.short):
            raise ValueError(f"short {self.short}: expected tokens and chunks of 1 to {self.chunk}")
        if not self.steps and self.forward == "windows":
            raise ValueError("steps 0 needs one stream with keys 'stale'")
        if self.slots and (self.scope != "document" or self.what != "lora"):
            raise ValueError("slots need what 'lora' and scope 'document'")
        if self.forget and (self.scope != "stream" or self.forward != "stream"):
            raise ValueError("forget needs scope 'stream' and keys 'stale'")
        if self.keys == "windows":
            if (self.what, self.scope, self.optimizer) != ("all", "stream", "sgd") or self.decay:
                raise ValueError("keys 'windows' need what 'all', scope 'stream' and optimizer 'sgd' without decay")
            return self
        if self.schedule != "constant":
            raise ValueError("schedule 'cosine' needs keys 'windows'")
        if self.what != "lora" and self.keys != "stale":
            raise ValueError(f"keys {self.keys!r} need what 'lora'")
        if not self.slots:
            if self.keys != "stale" and self.scope == "document":
                raise ValueError(f"keys {self.keys!r} with scope 'document' need slots")
            for key in ("order", "start", "short", "phases"):
                if (value := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} {value!r} needs slots")
        if self.prefix < self.phases:
            raise ValueError(f"phases {self.phases}: prefix {self.prefix} has no document for each of them")
        if self.short and self.order != "longest":
            raise ValueError("short needs order 'longest': a document's length is known only where it ends")
        beside = {"attn", "mlp"} & set(self.projections)
        if beside and not self.apart:
            raise ValueError(f"projections {'/'.join(sorted(beside))} need slots, or keys that are forwarded again")
        return self

    @property
    def apart(self) -> bool:
        """Whether documents, or a stream as one, have windows of their own: `DocumentLoop` runs the row."""
        return self.slots is not None or self.keys in ("refresh", "recompute")

    @property
    def forward(self) -> str:
        """`stream`, or `windows`: of documents, or as the run's own are."""
        return "windows" if self.apart or self.keys == "windows" else "stream"

    @property
    def options(self) -> tuple[str, ...]:
        """Fields that act on this row, and may be set in NAME:key=value."""
        if self.keys == "windows":
            chosen = ("what", "chunk", "steps", "scope", "optimizer", "lr", "schedule", "momentum", "clip", "batch")
            return (*chosen, "keys", "order")
        return (
            "what",
            *(("rank", "alpha", "projections") if self.what == "lora" else ()),
            *(("start",) if self.slots else ()),
            "chunk",
            *(("short",) if self.order == "longest" else ()),
            *("steps", "scope"),
            *(("forget",) if self.scope == "stream" and self.forward == "stream" else ()),
            *(("slots",) if self.scope == "document" and self.what == "lora" else ()),
            *("optimizer", "lr"),
            *(("betas", "eps") if self.optimizer == "adamw" else ("momentum",)),
            *("decay", "clip", "keys"),
            *(("every",) if self.keys == "refresh" else ()),
            "order",
            *(("phases",) if self.slots else ()),
            *(_PHASES if self.phases else ()),
        )

    @property
    def alone(self) -> "Learning":
        """What learns, under whatever name, with nothing on top: rows that agree in it share a pass."""
        return self.model_copy(update={"name": "", "about": "", "top": None})

    @property
    def compliance(self) -> Compliance:
        """The contest's four conditions, computed from the choices, and from those of what is on top."""
        learned = self._compliance
        if self.top is None:
            return learned
        top = self.top.compliance
        holds = {name: getattr(learned, name) and getattr(top, name) for name in ("c1", "c2", "c3", "c4")}
        fresh = ", from BOS on" if self.scope == "document" else ""
        why = f"{learned.why}; on top, {self.top.name}: {top.why}{fresh}"
        return replace(learned, **holds, why=why if top.causal or not learned.causal else f"{top.why} (on top)")

    @property
    def _compliance(self) -> Compliance:
        charged = f"each chunk of {self.chunk} tokens is charged before anything learns from it"
        if self.order == "longest":
            # As published, a document's last window ends with it, and so begins where its length says
            starts = "their last windows' start" if self.keys != "stale" else ""
            moved = " and ".join(filter(None, ("the length of chunks" if self.short else "", starts)))
            learned = "A" if self.start == "warm" else ""
            learned += f"{' and ' if learned else ''}all weights" if self.phases else ""
            why = "documents in another order, longest first"
            why += f"; how long they are sets {moved}" if moved else ""
            why += f"; {learned} learned from documents that come later" if learned else ""
            ahead = bool(moved or learned)
            return Compliance(c1=not ahead, c2=not ahead, c3=not learned, c4=False, why=why)
        if self.schedule == "cosine":
            charged += "; its rate follows from how long the stream is, which the contest has made known"
        if self.scope == "stream":
            return Compliance(why=charged)
        if self.start == "warm" or self.phases:
            return Compliance(why=f"{charged}, and documents learn from those before them alone")
        alone = ", and no document sees another" if self.slots else ", and it starts afresh at each document"
        return Compliance(why=charged + alone)

    def summary(self) -> dict[str, Any]:
        """The choices, and the numbers that act."""
        chosen = {"name": self.name} | {key: getattr(self, key) for key in self.options}
        return chosen if self.top is None else chosen | {"top": self.top.summary()}
