"""Validated settings of the commands: from flags, then environment variables, then defaults.

argparse reads the flags and pydantic validates the values. (pydantic-settings would do both, but it splits lists at the
commas that `--preset NAME:key=value,key=value` needs, and does not tell where a value came from.)
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from .errors import InputError

# An unread variable that starts like one of these is probably misspelt.
_PREFIXES = ("SLOT_", "SLOTFAST_", "EVAL_", "V20_")
# Read by `slot.from_environment`: they change the rows of presets, not settings.
ADAPTATION_VARIABLES = ("SLOT_ENABLED", "SLOT_STEPS", "SLOT_FOCAL_CTX", "SLOT_CLAMP", "SLOT_WARMSTART")


def setting(default: Any, help: str, env: str | None = None, positional: bool = False, **options: Any) -> Any:
    """A field of a settings class: its default, help text, environment variable, and options of pydantic's Field.

    A positional one is given without a flag, and has to be given.
    """
    return Field(default, description=help, json_schema_extra={"env": env, "positional": positional}, **options)


class Settings(BaseModel):
    """Base of every command's settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, str_min_length=1
    )


class EvalSettings(Settings):
    """Settings of python -m slotfast.eval."""

    artifact: str | None = setting(None, "model to evaluate; default: the one in this package", "ARTIFACT_PATH")
    model_config_: str | None = setting(
        None, "settings of the model of other people's files: KEY=VALUE,KEY=VALUE or JSON", alias="model_config"
    )
    tokens: str | None = setting(None, "glob of token shards to score")
    data_path: str | None = setting(None, "folder whose fineweb_val_*.bin shards are scored", "DATA_PATH")
    text: str | None = setting(None, "text to score: .txt, .jsonl (key text), also .xz .gz .bz2 .zst")
    tokenizer: str | None = setting(None, "SentencePiece model; default: the one in this package", "TOKENIZER_PATH")
    preset: list[str] = setting(
        ["none", "causal", "causal-lbfgs"], "adaptations, NAME or NAME:key=value,key=value; one forward for all"
    )
    seq_len: int | None = setting(
        None, "positions of a window; default: the training length", "EVAL_SEQ_LEN", ge=1, le=1 << 17
    )
    stride: int = setting(64, "new positions of each window", "EVAL_STRIDE", ge=1)
    batch_windows: int | None = setting(
        None, "windows of one forward; default: what fits", "EVAL_BATCH_SEQS", ge=1, le=1 << 16
    )
    max_tokens: int | None = setting(None, "score only the start of the stream", "EVAL_MAX_TOKENS", ge=2)
    weights: Literal["dequantized", "int6"] = setting(
        "dequantized", "int6: the blocks' linear layers run on packed 6-bit weights"
    )
    backend: Literal["auto", "triton", "torch"] = setting("auto", "auto: triton on a GPU, torch on a CPU")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "of the forward; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    budget: float | None = setting(None, "seconds that the evaluation may take: adds a verdict", gt=0)
    allow_noncausal: bool = setting(False, "also run presets whose score has seen its own tokens")
    json_: str | None = setting(None, "write the result as JSON; - for standard output", alias="json")
    per_token: str | None = setting(None, "write every scored token as .npz")
    list_presets: bool = setting(False, "list the presets and exit")
    show_preset: str | None = setting(None, "show one preset and why it is, or is not, causal, and exit")
    show_config: bool = setting(False, "show every setting with its source and exit")


class TrainSettings(Settings):
    """Settings of python -m slotfast.train."""

    preset: Literal["demo"] = setting("demo", "what to train: demo is the model in this package")
    out: str = setting("demo.slotfast", "artifact to write; the tokenizer goes beside it as .model")
    text: str | None = setting(None, "train on this text; default: the standard library's docstrings and comments")
    tokenizer: str | None = setting(None, "SentencePiece model; default: one is trained", "TOKENIZER_PATH")
    vocab_size: int = setting(1024, "pieces of the tokenizer that is trained", "VOCAB_SIZE", ge=300, le=65536)
    seconds: float = setting(480.0, "training time", "MAX_WALLCLOCK_SECONDS", gt=0)
    batch_windows: int = setting(4, "windows of one step", ge=1)
    seed: int = setting(1337, "of initialisation and sampling", "SEED", ge=0, lt=1 << 63)
    layers: int = setting(6, "transformer layers", "NUM_LAYERS", ge=1, le=256)
    width: int = setting(192, "model width", "MODEL_DIM", ge=8)
    heads: int = setting(6, "attention heads", "NUM_HEADS", ge=1)
    kv_heads: int = setting(2, "key and value heads", "NUM_KV_HEADS", ge=1)
    mlp_width: int = setting(480, "hidden width of the MLP", ge=1)
    seq_len: int = setting(512, "training length", "TRAIN_SEQ_LEN", ge=16)
    qk_gain: float = setting(4.0, "initial gain of the queries", "QK_GAIN_INIT", gt=0)
    matrix_lr: float = setting(0.02, "Muon's step size", "MATRIX_LR", gt=0)
    embed_lr: float = setting(0.01, "AdamW's step size for embeddings and scales", "EMBED_LR", gt=0)
    show_config: bool = setting(False, "show every setting with its source and exit")


class ShowSettings(Settings):
    """Settings of python -m slotfast.artifact show."""

    file: str = setting("", "artifact or checkpoint", positional=True)
    model_config_: str | None = setting(
        None, "settings of the model of other people's files: KEY=VALUE,KEY=VALUE or JSON", alias="model_config"
    )
    json_: str | None = setting(None, "write the result as JSON; - for standard output", alias="json")


class ConvertSettings(ShowSettings):
    """Settings of python -m slotfast.artifact convert."""

    out: str = setting("", "file to write: .slotfast, or .ptz as PR #1019 has it", positional=True)


S = TypeVar("S", bound=Settings)


def load(cls: type[S], prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[S, dict[str, str]]:
    """Settings of one command.

    Args:
        cls: a settings class.
        prog, description: for --help.
        argv: arguments, sys.argv's by default.

    Returns:
        The settings, and for each field where its value came from: "flag", the variable's name, or "default".

    Raises:
        InputError: unknown flag (with the nearest right one), or a value out of range.
        SystemExit: --help.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, field in cls.model_fields.items():
        flag = _flag(name)
        if field.json_schema_extra["positional"]:
            parser.add_argument(name, metavar=name.upper(), help=field.description)
        elif field.annotation is bool:
            parser.add_argument(flag, dest=name, action="store_true", help=field.description)
        else:
            many = {"nargs": "+", "action": "extend"} if get_origin(field.annotation) is list else {}
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            metavar = "/".join(choices) or name.strip("_").upper()
            default = "" if field.default in (None, "auto") else f" (default: {field.default})"
            text = (field.description + default).replace("%", "%%")
            parser.add_argument(flag, dest=name, metavar=metavar, help=text, **many)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [_flag(name) for name in cls.model_fields]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise InputError(f"{unknown[0]}: no such flag" + (f"; the nearest is {near[0]}" if near else "; see --help"))
    values, sources = dict(vars(flags)), dict.fromkeys(vars(flags), "flag")
    for name, field in cls.model_fields.items():
        variable = _variable(field)
        if variable and name not in values and os.environ.get(variable):
            values[name], sources[name] = os.environ[variable], variable
    try:
        settings = cls.model_validate({cls.model_fields[name].alias or name: value for name, value in values.items()})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = next(n for n, f in cls.model_fields.items() if first["loc"][0] in (n, f.alias))
        source = sources.get(name, "default")
        where = _flag(name) if source == "flag" else source
        raise InputError(f"{where} {first['input']!r}: {first['msg']}") from None
    return settings, {name: sources.get(name, "default") for name in cls.model_fields}


def warn_unread_variables() -> None:
    """Say on standard error which environment variables look like ours but are read by nothing."""
    known = set(ADAPTATION_VARIABLES)
    for cls in (EvalSettings, TrainSettings):
        known.update(filter(None, map(_variable, cls.model_fields.values())))
    for variable in sorted(os.environ):
        if variable.startswith(_PREFIXES) and variable not in known:
            near = difflib.get_close_matches(variable, known, 1)
            hint = f"; the nearest that is read is {near[0]}" if near else ""
            print(f"warning: nothing reads the environment variable {variable}{hint}", file=sys.stderr)


def show(settings: Settings, sources: Mapping[str, str]) -> str:
    """A table of every setting, its value and where it came from."""
    rows = [(_flag(name), json.dumps(getattr(settings, name)), sources[name]) for name in type(settings).model_fields]
    rows += [(name, os.environ[name], "changes rows of presets") for name in ADAPTATION_VARIABLES if name in os.environ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def _variable(field: Any) -> str | None:
    return field.json_schema_extra["env"]


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")
