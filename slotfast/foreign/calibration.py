"""A calibration of somebody else's model, in a JSON file beside it: `calibration.schema.json` describes the form."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .. import __version__
from ..command.files import atomic_write
from ..data import Tokenizer
from ..errors import Fault, InputError, reading
from ..slot import Calibration
from ..words import counted
from .models import ForeignModel

_Pair = Annotated[list[float], Field(min_length=2, max_length=2)]  # a tuple is none in JSON, and so not read back


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ComparedForwards(_Strict):
    """Windows against streams; see `slotfast.calibrate.compare_forwards`."""

    forward: Literal["windows", "stream"]
    sinks: int = Field(ge=0, le=1 << 10)
    difference_bpb: float | None
    difference_se: float | None


class FoundLearning(_Strict):
    """The numbers of `learn`; see `slotfast.calibrate.calibrate_learning`."""

    row: Literal["learn", "learn+causal"] = "learn"
    what: Literal["all", "lora", "norms"]
    rank: int | None = Field(None, ge=1)
    chunk: int = Field(ge=1)
    optimizer: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    betas: _Pair | None = None
    eps: float | None = Field(None, gt=0)
    decay: float = Field(ge=0)
    forget: float | None = Field(None, ge=0, le=1)
    steps: int = Field(ge=0)
    gain_bpb: float | None
    gain_se: float | None
    trials: int = Field(ge=1)
    seconds: float = Field(ge=0)


class Found(_Strict):
    """What was fitted; see `slotfast.calibrate.calibrate`."""

    forward: ComparedForwards | None
    scale: float = Field(ge=0, le=2)
    decay: float = Field(gt=0, le=1)
    gates: list[_Pair] = Field(min_length=6, max_length=6)
    tokens: int = Field(ge=1)
    rates_gain_bpb: float
    repeats_gain_bpb: float
    repeats_gain_se: float | None
    learn: FoundLearning | None = None


class Counts(_Strict):
    """How often tokens came: those that did, rising, and how often each one."""

    token: list[int]
    count: list[int]

    @model_validator(mode="after")
    def _fit_together(self) -> "Counts":
        if len(self.token) != len(self.count) or not self.token:
            raise ValueError(f"{len(self.token)} tokens and {len(self.count)} counts: expected as many, and some")
        if min(self.count) < 1 or self.token[0] < 0 or sorted({*self.token}) != self.token:
            raise ValueError("expected tokens that rise from 0 or more, and counts of 1 or more")
        return self


class StoredCalibration(_Strict):
    """A calibration and what it belongs to.

    Args:
        schema_: version of the form.
        slotfast: version of this package that wrote it.
        architecture, parameters: of the model, for people.
        vocab_size, tokenizer_sha256: of what it must be used with.
        calibration: what was fitted.
        frequency: counts of tokens in the text that was named.
        sketch: of that text, by which it is known again; see `slotfast.overlap.sketch`.
    """

    schema_: Literal[1] = Field(alias="schema")
    slotfast: str = __version__
    architecture: str
    parameters: int = Field(ge=0)
    vocab_size: int = Field(ge=1)
    tokenizer_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    calibration: Found
    frequency: Counts
    sketch: str

    @model_validator(mode="after")
    def _tokens_fit(self) -> "StoredCalibration":
        if self.frequency.token[-1] >= self.vocab_size:
            raise ValueError(f"token {self.frequency.token[-1]} of a vocabulary of {self.vocab_size}")
        return self

    @classmethod
    def read(cls, path: str | os.PathLike) -> "StoredCalibration":
        """A file that `write` wrote; raises InputError where it is none, or damaged."""
        with reading(path):
            data = Path(path).read_bytes()
        try:
            return cls.model_validate(json.loads(data))
        except pydantic.ValidationError as error:
            raise InputError(f"{path}: not a calibration: {Fault.of(error)}") from None
        except (ValueError, RecursionError):
            raise InputError(
                f"{path}: not a calibration: expected JSON as slotfast calibrate --model writes it"
            ) from None

    def write(self, path: str | os.PathLike) -> int:
        """Write the file, whole or not at all, a line for each key; gives its bytes."""
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.model_dump(by_alias=True).items())
        text = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        with atomic_write(path) as file:
            file.write(text)
        return len(text)

    @property
    def unigram(self) -> torch.Tensor:
        """Shares of tokens, float64 [V]."""
        counts = torch.zeros(self.vocab_size, dtype=torch.float64)
        counts[self.frequency.token] = torch.tensor(self.frequency.count, dtype=torch.float64)
        return counts / counts.sum()

    @property
    def metadata(self) -> dict[str, Any]:
        """As an artifact holds what was found."""
        return {"calibration": self.calibration.model_dump(), "sketches": {"calibration": self.sketch}}


def with_calibration(model: ForeignModel, tokenizer: Tokenizer, path: str) -> ForeignModel:
    """A model with the calibration that a file holds; a warning says where that was found for another model.

    Raises:
        InputError: no such file, or one of another vocabulary or tokenizer.
    """
    stored = StoredCalibration.read(path)
    if (stored.vocab_size, stored.tokenizer_sha256) != (model.config.vocab_size, tokenizer.sha256):
        raise InputError(
            f"--calibration {path}: for {stored.vocab_size} logits and the tokenizer {stored.tokenizer_sha256[:12]}; "
            f"the model has {model.config.vocab_size} and {tokenizer.sha256[:12]}"
        )
    found, this = ((each.architecture, each.parameters) for each in (stored, model.config))
    if found != this:
        told = " and ".join(f"{name}, {counted(count, 'parameter')}" for name, count in (found, this))
        print(f"warning: --calibration {path}: found for another model than this is: {told}", file=sys.stderr)
    return replace(model, metadata={**model.metadata, **stored.metadata}, unigram=stored.unigram)


def read_calibration(path: str | os.PathLike) -> Calibration:
    """What `slotfast calibrate --model` found, for `slotfast.adapt` and `Adapter`.

    Args:
        path: of its JSON file.

    Returns:
        Token frequencies, float64 [V], and the strength, decay and gates of `causal`.

    Raises:
        InputError: no such file, or not a calibration.
    """
    stored = StoredCalibration.read(path)
    return Calibration.stored(stored.unigram, stored.metadata)
