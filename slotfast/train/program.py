"""The command: settings to inputs, training, an int6 artifact and a summary."""

import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__, config
from ..artifact import Artifact, artifact_bytes, read_artifact, write_artifact
from ..calibrate import calibrate, calibrated, summary
from ..command import checkpoint
from ..command.files import json_text, write_json
from ..command.plots import pyplot, write_png
from ..command.ranks import join_ranks
from ..command.run import deliver
from ..data import Text, TokenStream
from ..errors import InputError, expected
from ..generate import sample
from ..loader import open_loader
from ..model import GPT, GPTConfig
from ..overlap import MAX_OVERLAP
from ..quantize import TensorReport, format_report, quantize_model
from ..words import counted
from ..worker import Worker
from . import prequant_ttt
from .dtype import DTYPES, choose_dtype
from .inputs import Inputs, check_ttt, read_inputs, tokenizer_path
from .trainer import Trainer, check_length, evaluate

_COMMAND = "slotfast.train"
# Settings that change no weight, or whose effect the data's fingerprint covers: a resumed run may have others.
_FREE = set(
    "out text tokens data_path val_text val_tokens max_val_tokens tokenizer preset device dtype compile checkpoint "
    "checkpoint_steps checkpoint_seconds resume log_every val_every json_ plot show_config config_ force "
    "allow_noncausal target_bytes calibrate".split()
)
_AFTERWARDS = ("ttt", "quantize")  # prefixes of settings that act after everything that a checkpoint holds
_CALIBRATION_BYTES = 8192  # more than a calibration's numbers and its sketch take in the header
_CALIBRATION_TOKENS = 100_000


def train(settings: config.TrainSettings) -> None:
    """Train, quantise, write; raises InputError on bad input."""
    started = time.perf_counter()
    build_config(settings, settings.vocab_size)
    _check_outputs(settings)
    with join_ranks(settings.device) as worker:
        summary = _train(settings, worker, started)
    if worker.rank:
        return None
    return deliver(
        json_text(summary) if settings.json_ == "-" else "",
        (settings.json_, lambda path: write_json(path, summary)),
        (settings.plot, lambda path: _draw(path, summary)),
    )


def _train(settings: config.TrainSettings, worker: Worker, started: float) -> dict[str, Any]:
    """The summary, of all ranks on rank 0."""
    rank, world = worker.rank, worker.world
    check_length(settings, world)
    check_ttt(settings)
    log = _logger(settings, rank)
    torch.manual_seed(settings.seed)
    inputs = read_inputs(settings, worker)
    # Before the clock starts; the count refuses foreign tokens.
    unigram, sketches = inputs.unigram(), inputs.sketches() if rank == 0 else {}
    model_config = build_config(settings, inputs.tokenizer.vocab_size, inputs.tokenizer.bos_id)
    loader = open_loader(
        settings.loader, inputs.names, inputs.shards, settings.seq_len, settings.batch_windows, settings.seed, world
    )
    model = GPT(model_config).to(worker.device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{counted(parameters, 'parameter')}; {inputs.about}")
    run = _describe(settings, inputs, model_config, world)
    resumed = checkpoint.load(settings.checkpoint, _COMMAND, run) if settings.resume else None
    dtype = DTYPES[resumed["dtype"]] if resumed else choose_dtype(settings, model, worker)
    worker = replace(worker, dtype=dtype)

    def save(state: dict[str, Any], step: int) -> None:
        if rank == 0:
            checkpoint.save(settings.checkpoint, _COMMAND, run, {"trainer": state, "dtype": worker.dtype_name})
            log(f"step:{step} saved to {settings.checkpoint}")

    def validate() -> dict[str, float]:
        return _measure(model, inputs, settings, worker)

    trainer = Trainer(
        model,
        loader,
        settings,
        worker,
        on_save=save if settings.checkpoint else None,
        on_validate=validate if inputs.val else None,
        log=log,
    )
    if resumed:
        try:
            trainer.load_state_dict(resumed["trainer"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise InputError(f"{settings.checkpoint}: its state does not fit this run: damaged") from None
        log(f"step:{trainer.step} resumed from {settings.checkpoint}")
    elif settings.resume:
        log(f"{settings.checkpoint}: not there yet, starting from the beginning")
    ready = time.perf_counter()
    trainer.run()
    log(
        f"{counted(trainer.step, 'step')} of {settings.batch_windows * settings.seq_len} tokens in "
        f"{trainer.elapsed:.0f} s, "
        f"{dtype}; loss {float(trainer.loss_mean):.4f}"
    )
    seconds = {"load": ready - started, "train": trainer.elapsed}
    if inputs.ttt is not None:
        start, recipe = time.perf_counter(), _recipe(settings)
        prequant_ttt.adapt(model, inputs.ttt, recipe, settings.seq_len, worker, trainer.forward, log)
        seconds["ttt"] = time.perf_counter() - start
    return _finish(settings, inputs, unigram, sketches, trainer, seconds, log) if rank == 0 else {}


def _finish(
    settings: config.TrainSettings,
    inputs: Inputs,
    unigram: Tensor,
    sketches: dict[str, str],
    trainer: Trainer,
    seconds: dict[str, float],
    log: Callable,
) -> dict[str, Any]:
    """Write the artifact and measure it; the summary."""
    start = time.perf_counter()
    metadata = _metadata(settings, inputs, sketches, trainer)
    model = trainer.model.eval()
    artifact, report = _quantize(settings, inputs, model, metadata, unigram)
    size = write_artifact(settings.out, artifact)
    seconds["quantize"] = time.perf_counter() - start
    log(format_report(report))
    if inputs.held_out is not None and settings.calibrate == "yes" and inputs.val_bytes:
        start_calibration = time.perf_counter()
        artifact, size = _calibrate(settings, inputs, artifact, trainer.worker, log)
        seconds["calibrate"] = time.perf_counter() - start_calibration
    model = model.cpu()
    if settings.reserve and seconds["quantize"] > settings.reserve:
        log(f"quantisation took {seconds['quantize']:.1f} s, more than --reserve {settings.reserve:g}")
    val = {}
    if inputs.val is not None:
        for name, tested in (("float32", model), ("int6", artifact.model())):
            val[name] = _measure(tested.to(trainer.device), inputs, settings, Worker(trainer.worker.device))
            log(f"held-out documents, {name:>7}: {val[name]['bpb']:.4f} bpb")
    if inputs.ttt is not None and (inputs.ttt_overlap or 0) > MAX_OVERLAP:
        log(f"NOT an honest score: the weights have learned text that shares {inputs.ttt_overlap:.1%} with it")
    log(f"{settings.out}: {size:,} bytes; {inputs.tokenizer.path}: {inputs.tokenizer.path.stat().st_size:,} bytes")
    measured = seconds["quantize"] + seconds.get("calibrate", 0.0)
    seconds["total"] = sum(seconds.values()) - measured + time.perf_counter() - start
    return {
        "schema": 1,
        "preset": settings.preset,
        "ttt": metadata.get("ttt"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "tokens_seen": trainer.step * settings.batch_windows * settings.seq_len,
        "loss": float(trainer.loss_mean),
        "ms_per_step": 1000 * trainer.elapsed / trainer.step,
        "val": val,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "artifact_bytes": size,
        "quantization": [asdict(tensor) for tensor in report],
        "calibration": artifact.metadata.get("calibration"),
        "artifact_sha256": hashlib.sha256(Path(settings.out).read_bytes()).hexdigest(),
        "history": trainer.history,
        "measured": trainer.measured,
        "device": trainer.worker.device_name,
        "dtype": trainer.worker.dtype_name,
        "ranks": trainer.worker.world,
        "model": model.config.model_dump(),
        "config": settings.model_dump(by_alias=True),
        "versions": {"slotfast": __version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def _metadata(
    settings: config.TrainSettings, inputs: Inputs, sketches: dict[str, str], trainer: Trainer
) -> dict[str, Any]:
    """What the artifact says of its making."""
    metadata = {
        "preset": settings.preset,
        "tokenizer_sha256": inputs.tokenizer.sha256,
        "trained_on": inputs.trained_on,
        "tokens": inputs.tokens,
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "seed": settings.seed,
        "sketches": sketches,
    }
    if inputs.ttt is not None:
        metadata["ttt"] = {
            "recipe": settings.ttt,
            **asdict(_recipe(settings)),
            "stream": Path(settings.ttt_text or settings.ttt_tokens).name,
            "stream_sha256": inputs.ttt.sha256(),
            "tokens": len(inputs.ttt),
            "validation_overlap": inputs.ttt_overlap,
        }
    return metadata


def _quantize(
    settings: config.TrainSettings, inputs: Inputs, model: GPT, metadata: dict[str, Any], unigram: Tensor
) -> tuple[Artifact, list[TensorReport]]:
    """The artifact, and what became of each tensor."""
    windows = None
    if settings.quantize == "gptq" and settings.quantize_on == "self":
        windows = sample(model, settings.quantize_windows, settings.seq_len, seed=settings.seed)
    elif settings.quantize == "gptq":
        loader = open_loader("shuffle", inputs.names, inputs.shards, settings.seq_len, 1, settings.seed, 1)
        device = model.tok_emb.weight.device
        windows = (loader.next_batch()[:, :-1].to(device) for _ in range(settings.quantize_windows))

    will_calibrate = inputs.held_out is not None and settings.calibrate == "yes"
    target = settings.target_bytes and settings.target_bytes - _CALIBRATION_BYTES * will_calibrate

    def size(tensors: Mapping[str, Any]) -> int:
        return artifact_bytes(Artifact(model.config, tensors, metadata, unigram))

    found = quantize_model(
        model,
        windows,
        method=settings.quantize,
        clip=settings.quantize_clip,
        target_bytes=target,
        size=size if target else None,
        budget_seconds=settings.reserve or None,
    )
    return Artifact(model.config, found.tensors, metadata, unigram), found.report


def _calibrate(
    settings: config.TrainSettings, inputs: Inputs, artifact: Artifact, worker: Worker, log: Callable
) -> tuple[Artifact, int]:
    """The artifact with its adaptation calibrated on the documents held out, written again, and its size."""
    tokenizer = inputs.tokenizer
    stream = TokenStream([inputs.held_out.read(0, min(len(inputs.held_out), _CALIBRATION_TOKENS))])
    text = Text(stream, tokenizer.byte_table, tokenizer.bos_id)
    # by rank 0 alone, and in float32
    found = calibrate(artifact.model().to(worker.device), text, artifact.unigram, worker=Worker(worker.device))
    log(summary(found))
    artifact = calibrated(artifact, found, stream)
    return artifact, write_artifact(settings.out, artifact)


def _recipe(settings: config.TrainSettings) -> prequant_ttt.Recipe:
    """The published recipe with what the settings change of it."""
    chosen = {
        "epochs": settings.ttt_epochs,
        "rate": settings.ttt_lr,
        "frozen_blocks": settings.ttt_freeze,
        "batch_windows": settings.ttt_batch_windows,
    }
    return replace(
        prequant_ttt.RECIPES[settings.ttt], **{name: value for name, value in chosen.items() if value is not None}
    )


def _measure(model: GPT, inputs: Inputs, settings: config.TrainSettings, worker: Worker) -> dict[str, float]:
    worker = replace(worker, dtype=torch.bfloat16 if worker.on_gpu else torch.float32)
    nats = evaluate(model, inputs.val, settings.seq_len, worker)
    return {"nats": nats / (len(inputs.val) - 1), "bpb": nats / math.log(2) / inputs.val_bytes}


def build_config(settings: config.TrainSettings, vocab_size: int, bos_id: int | None = None) -> GPTConfig:
    """The model that the settings describe.

    Raises:
        InputError: sizes that do not fit together.
    """
    try:
        return GPTConfig(
            vocab_size=vocab_size,
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
            bos_id=bos_id if settings.smear == "documents" else None,
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
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"model: {where + ': ' if where else ''}{expected(first)}") from None


def _check_outputs(settings: config.TrainSettings) -> None:
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
    if settings.plot:
        pyplot()


def _is_own(settings: config.TrainSettings, tokenizer: Path) -> bool:
    """Whether the artifact that is replaced was trained with this tokenizer; a resumed run looks when it needs it."""
    try:
        expected = read_artifact(settings.out).metadata.get("tokenizer_sha256")
    except InputError:
        return settings.resume
    return settings.resume or expected == hashlib.sha256(tokenizer.read_bytes()).hexdigest()


def _logger(settings: config.TrainSettings, rank: int) -> Callable[[str], None]:
    """Prints lines above the progress bar, on rank 0; to standard error where standard output is for the JSON."""
    if rank:
        return lambda line: None
    file = sys.stderr if settings.json_ == "-" else sys.stdout

    def log(line: str) -> None:
        tqdm.write(line, file=file)
        file.flush()

    return log


def _describe(settings: config.TrainSettings, inputs: Inputs, model: GPTConfig, world: int) -> dict[str, Any]:
    """What a checkpoint must agree with before a training goes on from it."""
    chosen = {
        name: value
        for name, value in settings.model_dump().items()
        if name not in _FREE and not name.startswith(_AFTERWARDS)
    }
    sizes = {"vocabulary": model.vocab_size, "BOS": model.bos_id}
    return chosen | sizes | {"data": inputs.fingerprint(), "ranks": world}


def _draw(path: str, summary: dict[str, Any]) -> None:
    """The loss along the training, dots where it was measured on other text, and the rates below."""
    columns = {name: [row[name] for row in summary["history"]] for name in ("step", "loss", "lr_scale")}
    figure, (above, below) = pyplot().subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1))
    above.plot(columns["step"], columns["loss"])
    above.plot([row["step"] for row in summary["measured"]], [row["nats"] for row in summary["measured"]], "o")
    above.set_ylabel("loss (nats a token)")
    above.set_title(f"{summary['preset']}, {summary['parameters']:,} parameters, {summary['device']}")
    below.plot(columns["step"], columns["lr_scale"])
    below.set_ylabel("rates")
    below.set_xlabel("step")
    write_png(path, figure)
