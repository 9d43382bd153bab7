"""The command: settings to inputs, training, an int6 artifact and a summary."""

import hashlib
import math
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .. import __version__, config
from ..artifact import write_artifact
from ..command import checkpoint
from ..command.files import json_text, write_json
from ..command.interrupt import Interrupt
from ..command.plots import pyplot, write_png
from ..command.progress import print_above
from ..command.ranks import join_ranks
from ..command.run import deliver
from ..errors import InputError
from ..loader import open_loader
from ..model import GPT
from ..overlap import MAX_OVERLAP
from ..quantize import format_report
from ..words import counted
from ..worker import Worker
from . import prequant_ttt
from .dtype import DTYPES, choose_dtype
from .finish import calibrate_artifact, quantize
from .inputs import Inputs, read_inputs
from .setup import Setup, set_up
from .trainer import Trainer, evaluate

_COMMAND = "slotfast.train"


def train(settings: config.TrainSettings) -> None:
    """Train, quantise, write; raises InputError on bad input."""
    started = time.perf_counter()
    setup = set_up(settings)
    with join_ranks(settings.device) as worker:
        log = _logger(sys.stderr if settings.json_ == "-" else sys.stdout, silent=worker.rank > 0)
        summary = _train(setup, settings.model_dump(by_alias=True), worker, started, log)
    if worker.rank:
        return None
    return deliver(
        json_text(summary) if settings.json_ == "-" else "",
        (settings.json_, lambda path: write_json(path, summary)),
        (settings.plot, lambda path: _draw(path, summary)),
    )


def _train(
    setup: Setup, config: dict[str, Any], worker: Worker, started: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """The summary, of all ranks on rank 0.

    Args:
        config: all settings of the command, for the summary.
        started: the command, by `time.perf_counter`.
    """
    rank, world = worker.rank, worker.world
    if setup.batch_windows % world:
        raise InputError(f"--batch-windows {setup.batch_windows}: expected a multiple of the {world} ranks")
    torch.manual_seed(setup.seed)
    inputs = read_inputs(setup.sources, worker)
    # Before the clock starts; counting refuses tokens that the tokenizer does not have.
    unigram, sketches = inputs.unigram(), inputs.sketches() if rank == 0 else {}
    model_config = setup.model_config(inputs.tokenizer.vocab_size, inputs.tokenizer.bos_id)
    loader = open_loader(
        setup.loader, inputs.names, inputs.shards, model_config.seq_len, setup.batch_windows, setup.seed, world
    )
    model = GPT(model_config).to(worker.device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{counted(parameters, 'parameter')}; {inputs.about}")
    # What a checkpoint must agree with before a training goes on from it
    run = setup.decisive | {
        "vocabulary": model_config.vocab_size,
        "BOS": model_config.bos_id,
        "data": inputs.fingerprint(),
        "ranks": world,
    }
    resumed = checkpoint.load(setup.checkpoint, _COMMAND, run) if setup.resume else None
    dtype = DTYPES[resumed["dtype"]] if resumed else choose_dtype(setup.dtype, model, worker)
    worker = replace(worker, dtype=dtype)

    interrupt = Interrupt(setup.checkpoint or "", "the same command" + " with --resume" * (not setup.resume))

    def save(state: dict[str, Any], step: int) -> None:
        if rank == 0:
            checkpoint.save(setup.checkpoint, _COMMAND, run, {"trainer": state, "dtype": worker.dtype_name})
            inputs.write_tokenizer()  # behind what needs it: on a full disk none is left alone
            log(f"step:{step} saved to {setup.checkpoint}")
        if interrupt.asked:
            raise KeyboardInterrupt

    def validate() -> dict[str, float]:
        return _measure(model, inputs, worker)

    trainer = Trainer(
        model,
        loader,
        setup.training,
        worker,
        on_save=save if setup.checkpoint else None,
        on_validate=validate if inputs.val else None,
        hurry=lambda: interrupt.asked,
        log=log,
    )
    if resumed:
        try:
            trainer.load_state_dict(resumed["trainer"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise InputError(f"{setup.checkpoint}: its state does not fit this run: damaged") from None
        log(f"step:{trainer.step} resumed from {setup.checkpoint}")
    elif setup.resume:
        log(f"{setup.checkpoint}: not there yet, starting from the beginning")
    ready = time.perf_counter()
    # ranks save together, but a signal reaches them in different steps: it ends them at once
    with interrupt if setup.checkpoint and world == 1 else nullcontext():
        trainer.run()
    log(
        f"{counted(trainer.step, 'step')} of {setup.batch_windows * model_config.seq_len} tokens in "
        f"{trainer.elapsed:.0f} s, "
        f"{dtype}; loss {float(trainer.loss_mean):.4f}"
    )
    seconds = {"load": ready - started, "train": trainer.elapsed}
    if inputs.ttt is not None and setup.ttt is not None:
        start = time.perf_counter()
        prequant_ttt.adapt(model, inputs.ttt, setup.ttt, model_config.seq_len, worker, trainer.forward, log)
        seconds["ttt"] = time.perf_counter() - start
    if rank:
        return {}
    return _finish(setup, inputs, unigram, sketches, trainer, seconds, log) | {
        "config": config,
        "versions": {"slotfast": __version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def _finish(
    setup: Setup,
    inputs: Inputs,
    unigram: Tensor,
    sketches: dict[str, str],
    trainer: Trainer,
    seconds: dict[str, float],
    log: Callable,
) -> dict[str, Any]:
    """Write the artifact and measure it; the summary."""
    start = time.perf_counter()
    metadata = _metadata(setup, inputs, sketches, trainer)
    model = trainer.model.eval()
    artifact, report = quantize(setup.quantization, inputs, model, metadata, unigram)
    size = write_artifact(setup.out, artifact)
    inputs.write_tokenizer()
    seconds["quantize"] = time.perf_counter() - start
    log(format_report(report))
    if setup.quantization.calibrate and inputs.held_out is not None and inputs.val_bytes:
        start_calibration = time.perf_counter()
        artifact = calibrate_artifact(inputs, artifact, trainer.worker, log)
        size = write_artifact(setup.out, artifact)
        seconds["calibrate"] = time.perf_counter() - start_calibration
    model = model.cpu()
    reserve = setup.quantization.reserve
    if reserve and seconds["quantize"] > reserve:
        log(f"quantisation took {seconds['quantize']:.1f} s, more than --reserve {reserve:g}")
    val = {}
    if inputs.val is not None:
        for name, tested in (("float32", model), ("int6", artifact.model())):
            val[name] = _measure(tested.to(trainer.device), inputs, Worker(trainer.worker.device))
            log(f"held-out documents, {name:>7}: {val[name]['bpb']:.4f} bpb")
    if inputs.ttt is not None and (inputs.ttt_overlap or 0) > MAX_OVERLAP:
        log(f"NOT an honest score: the weights have learned text that shares {inputs.ttt_overlap:.1%} with it")
    log(f"{setup.out}: {size:,} bytes; {inputs.tokenizer.path}: {inputs.tokenizer.path.stat().st_size:,} bytes")
    measured = seconds["quantize"] + seconds.get("calibrate", 0.0)
    seconds["total"] = sum(seconds.values()) - measured + time.perf_counter() - start
    return {
        "schema": 1,
        "preset": setup.preset,
        "ttt": metadata.get("ttt"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": trainer.step,
        "tokens_seen": trainer.step * setup.batch_windows * model.config.seq_len,
        "loss": float(trainer.loss_mean),
        "ms_per_step": 1000 * trainer.elapsed / trainer.step,
        "val": val,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "artifact_bytes": size,
        "quantization": [asdict(tensor) for tensor in report],
        "calibration": artifact.metadata.get("calibration"),
        "artifact_sha256": hashlib.sha256(Path(setup.out).read_bytes()).hexdigest(),
        "history": trainer.history,
        "measured": trainer.measured,
        "device": trainer.worker.device_name,
        "dtype": trainer.worker.dtype_name,
        "ranks": trainer.worker.world,
        "model": model.config.model_dump(),
    }


def _metadata(setup: Setup, inputs: Inputs, sketches: dict[str, str], trainer: Trainer) -> dict[str, Any]:
    """What the artifact says about its making."""
    metadata = {
        "preset": setup.preset,
        "tokenizer_sha256": inputs.tokenizer.sha256,
        "trained_on": inputs.trained_on,
        "tokens": inputs.tokens,
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "seed": setup.seed,
        "sketches": sketches,
    }
    if inputs.ttt is not None and setup.ttt is not None:
        metadata["ttt"] = {
            "recipe": setup.ttt_name,
            **asdict(setup.ttt),
            "stream": Path(setup.sources.ttt_text or setup.sources.ttt_tokens).name,
            "stream_sha256": inputs.ttt.sha256(),
            "tokens": len(inputs.ttt),
            "validation_overlap": inputs.ttt_overlap,
        }
    return metadata


def _measure(model: GPT, inputs: Inputs, worker: Worker) -> dict[str, float]:
    worker = replace(worker, dtype=torch.bfloat16 if worker.on_gpu else torch.float32)
    nats = evaluate(model, inputs.val, model.config.seq_len, worker)
    return {"nats": nats / (len(inputs.val) - 1), "bpb": nats / math.log(2) / inputs.val_bytes}


def _logger(file: TextIO, silent: bool) -> Callable[[str], None]:
    """Prints lines above the progress bar, or none."""
    if silent:
        return lambda line: None

    return partial(print_above, file=file)


def _draw(path: str, summary: dict[str, Any]) -> None:
    """The loss over the training, with dots where it was measured on other text, and below it the rates."""
    columns = {name: [row[name] for row in summary["history"]] for name in ("step", "loss", "lr_scale")}
    figure, (above, below) = pyplot("--plot").subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1))
    above.plot(columns["step"], columns["loss"])
    above.plot([row["step"] for row in summary["measured"]], [row["nats"] for row in summary["measured"]], "o")
    above.set_ylabel("loss (nats a token)")
    above.set_title(f"{summary['preset']}, {summary['parameters']:,} parameters, {summary['device']}")
    below.plot(columns["step"], columns["lr_scale"])
    below.set_ylabel("rates")
    below.set_xlabel("step")
    write_png(path, figure)
