"""How a training runs: its settings, read once."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic

from .. import config
from ..artifact import read_artifact
from ..errors import Fault, InputError
from ..model import GPTConfig
from . import prequant_ttt
from .finish import Quantization
from .inputs import NONCAUSAL, Sources
from .optimizers import Optimization
from .schedule import Schedule
from .trainer import Training

# Settings that change no weight, or whose effect the data's fingerprint covers: a resumed run may have others.
_FREE = set(
    "out text tokens data_path val_text val_tokens max_val_tokens tokenizer preset device dtype compile checkpoint "
    "checkpoint_steps checkpoint_seconds resume log_every val_every json_ plot show_config config_ force "
    "allow_noncausal target_bytes calibrate".split()
)
_AFTERWARDS = ("ttt", "quantize")  # prefixes of settings that act after everything that a checkpoint holds


@dataclass(frozen=True)
class Setup:
    """How a training runs.

    Args:
        preset, seed, out: as the settings have them.
        sources: what is read.
        shape: of the model, but for its vocabulary.
        documents_apart: whether the smear gate starts anew at BOS.
        loader: order of the training windows.
        batch_windows: windows of one step, all ranks together.
        training: what the trainer does.
        ttt: recipe of the training on one more stream, and its name; None: there is none.
        quantization: what becomes of the weights.
        dtype: of the forward, or auto.
        checkpoint, resume: where the state is saved, and whether to go on from there.
        decisive: settings on which a checkpoint depends.
    """

    preset: str
    seed: int
    out: str
    sources: Sources
    shape: GPTConfig
    documents_apart: bool
    loader: str
    batch_windows: int
    training: Training
    ttt: prequant_ttt.Recipe | None
    ttt_name: str
    quantization: Quantization
    dtype: str
    checkpoint: str | None
    resume: bool
    decisive: dict[str, Any]

    def model_config(self, vocab_size: int, bos_id: int) -> GPTConfig:
        """The model for a tokenizer."""
        known = {"vocab_size": vocab_size, "bos_id": bos_id if self.documents_apart else None}
        return GPTConfig(**self.shape.model_dump() | known)


def set_up(settings: config.TrainSettings) -> Setup:
    """How a training runs, as far as its settings say.

    Raises:
        InputError: settings that do not go together, or outputs that would destroy something.
    """
    shape = model_shape(settings)
    check_outputs(settings)
    check_ttt(settings)
    tokenizer = tokenizer_path(settings)
    # looked at before any rank has written anything
    going_on = settings.resume and Path(settings.checkpoint).exists() and tokenizer.exists()
    return Setup(
        preset=settings.preset,
        seed=settings.seed,
        out=settings.out,
        sources=settings.pick(
            Sources,
            tokenizer_path=tokenizer,
            going_on=going_on,
            overwrite=settings.force or not settings.resume,
        ),
        shape=shape,
        documents_apart=settings.smear == "documents",
        loader=settings.loader,
        batch_windows=settings.batch_windows,
        training=choose_training(settings),
        ttt=choose_recipe(settings),
        ttt_name=settings.ttt,
        quantization=settings.pick(Quantization, calibrate=settings.calibrate == "yes"),
        dtype=settings.dtype,
        checkpoint=settings.checkpoint,
        resume=settings.resume,
        decisive={
            name: value
            for name, value in settings.model_dump().items()
            if name not in _FREE and not name.startswith(_AFTERWARDS)
        },
    )


def choose_training(settings: config.TrainSettings) -> Training:
    """What the trainer does."""
    return settings.pick(Training, schedule=settings.pick(Schedule), optimization=settings.pick(Optimization))


def model_shape(settings: config.TrainSettings) -> GPTConfig:
    """The model that the settings describe, but for the token that starts a document.

    Raises:
        InputError: sizes that do not fit together.
    """
    try:
        return GPTConfig(
            vocab_size=settings.vocab_size,
            seq_len=settings.seq_len,
            layers=settings.layers,
            width=settings.width,
            heads=settings.heads,
            kv_heads=settings.kv_heads,
            mlp_width=settings.mlp_width,
            mlp_slope=settings.mlp_slope,
            rope_dims=min(settings.rope_dims, settings.width // settings.heads // 2 * 2),
            qk_gain=settings.qk_gain,
            xsa_layers=min(settings.xsa_layers, settings.layers),
            ln_scale=settings.ln_scale == "yes",
            unet=settings.skips != "off",
            skip_gates=settings.skips == "gate",
            smear=settings.smear != "off",
            bigram_buckets=settings.bigram_buckets,
            bigram_width=settings.bigram_width,
            value_width=settings.value_width,
            value_layers=tuple(range(max(settings.layers - settings.value_layers, 0), settings.layers)),
            softcap=settings.softcap,
            loops=settings.loops,
            loop_start=settings.loop_start if settings.loops else 0,
            loop_end=settings.loop_end if settings.loops else 0,
            parallel_from=settings.parallel_from,
        )
    except pydantic.ValidationError as error:
        raise InputError(f"model: {Fault.of(error)}") from None


def choose_recipe(settings: config.TrainSettings) -> prequant_ttt.Recipe | None:
    """The published recipe with what the settings change of it; None where no such training is asked for."""
    if settings.ttt == "off":
        return None
    chosen = {
        "epochs": settings.ttt_epochs,
        "rate": settings.ttt_lr,
        "frozen_blocks": settings.ttt_freeze,
        "batch_windows": settings.ttt_batch_windows,
    }
    return replace(
        prequant_ttt.RECIPES[settings.ttt], **{name: value for name, value in chosen.items() if value is not None}
    )


def tokenizer_path(settings: config.TrainSettings) -> Path:
    """Where the tokenizer is, or will be written."""
    return Path(settings.tokenizer or Path(settings.out).with_suffix(".model"))


def check_ttt(settings: config.TrainSettings) -> None:
    """Raise InputError where test-time training is asked for by halves."""
    named = [path for path in (settings.ttt_text, settings.ttt_tokens) if path]
    if len(named) != (settings.ttt != "off"):
        raise InputError(f"--ttt {settings.ttt}: goes with one of --ttt-text and --ttt-tokens, this has {len(named)}")
    if settings.ttt_tokens and "_val_" in Path(settings.ttt_tokens).name and not settings.allow_noncausal:
        raise InputError(f"--ttt-tokens {settings.ttt_tokens}: {NONCAUSAL}")


def check_outputs(settings: config.TrainSettings) -> None:
    """Refuse before the work what could not be written after it."""
    tokenizer = tokenizer_path(settings)
    if Path(settings.out) == tokenizer:
        raise InputError(f"--out {settings.out}: the tokenizer is written there; choose another suffix")
    own = config.Kind("what --out was trained with (--tokenizer takes it)", lambda path: _is_own(settings, path))
    config.check_outputs(settings, None if settings.tokenizer else {"the tokenizer": (str(tokenizer), own)})
    if settings.resume and settings.checkpoint is None:
        raise InputError("--resume: needs --checkpoint FILE")
    if settings.checkpoint and not settings.resume and Path(settings.checkpoint).exists():
        raise InputError(f"--checkpoint {settings.checkpoint}: exists; add --resume to go on from it, or remove it")


def _is_own(settings: config.TrainSettings, tokenizer: Path) -> bool:
    """Whether the artifact to be replaced was trained with this tokenizer; a resumed run checks that later."""
    try:
        expected = read_artifact(settings.out).metadata.get("tokenizer_sha256")
    except InputError:
        return settings.resume
    return settings.resume or expected == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
