"""The command: settings to inputs, one pass, a report."""

import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from .. import config, ops
from ..command.files import json_text, write_json
from ..command.plots import pyplot
from ..command.progress import Progress
from ..command.ranks import join_ranks
from ..command.run import deliver, no_exit
from ..errors import InputError
from ..learn import Learning, LearningLoop
from ..model import GPT
from ..slot import Adaptation, Adapter, Calibration
from ..words import counted
from ..worker import Worker
from .inputs import (
    Inputs,
    choose_batch,
    choose_learning,
    choose_plan,
    choose_rows,
    choose_streaming,
    choose_training,
    read_inputs,
    stored_forward,
)
from .learning import LearningPass
from .loop import SlidingPass
from .plot import draw
from .report import TokenRows, list_presets, merge_work, peak_memory_bytes, report, show_preset, table
from .resume import Saver, describe, rank_path

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def evaluate(settings: config.EvalSettings) -> None:
    """Evaluate, print the table and write what was asked for; raises InputError on bad input."""
    started = time.perf_counter()
    if settings.list_presets:
        return print(list_presets())
    if settings.show_preset is not None:
        return print(show_preset(settings.show_preset))
    rows = choose_rows(settings)
    with join_ranks(settings.device) as worker, no_exit(f"--model {settings.model}"):
        _check_outputs(settings, worker.rank)
        found, sliding, collected = _evaluate(settings, rows, worker, started)
    if worker.rank:
        return None
    title = f"{found['text']['source']}, {counted(found['tokens'], 'token')}"
    deliver(
        json_text(found) if settings.json_ == "-" else table(found),
        (settings.json_, lambda path: write_json(path, found)),
        (settings.per_token, lambda path: collected.write(path, [row["preset"] for row in found["presets"]])),
        (settings.plot, lambda path: draw(path, title, sliding.meter, sliding.along)),
    )
    return None


def _evaluate(
    settings: config.EvalSettings,
    chosen: list[Adaptation | Learning],
    worker: Worker,
    started: float,
) -> tuple[dict[str, Any], SlidingPass, TokenRows]:
    """The result, its sums and, where asked for, every token's losses; on rank 0 of all ranks."""
    rank, world = worker.rank, worker.world
    triton = ops.uses_triton(settings.backend, worker.device)
    dtype = _DTYPES.get(settings.dtype, torch.bfloat16 if worker.on_gpu else torch.float32)
    worker = replace(worker, dtype=dtype, backend=settings.backend)
    if dtype == torch.float64 and triton:
        raise InputError("--dtype float64: the kernels compute in float32; add --backend torch")
    rows, learning = choose_learning(settings, chosen, world)
    inputs = read_inputs(settings)
    plan = choose_plan(settings, inputs)
    batch_windows, adapt_windows = choose_batch(settings, rows, plan, inputs.artifact.config.vocab_size, worker)
    training = choose_training(settings, rows, world)
    streaming = choose_streaming(settings, rows, inputs, plan, worker)
    calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    bos_id = inputs.tokenizer.bos_id
    adapters = [Adapter(row, calibration, bos_id) for row in rows]
    model = inputs.artifact.model(settings.weights, settings.backend).to(worker.device)
    if dtype == torch.float64:
        model = model.double()
    elif isinstance(model, GPT) and training is None and not learning:
        model.cast_matrices(dtype)
    collected = TokenRows()
    sliding = SlidingPass(
        model,
        inputs.text,
        plan,
        adapters,
        batch_windows=batch_windows,
        adapt_windows=adapt_windows,
        streaming=streaming,
        training=training,
        worker=worker,
    )
    sinks = streaming.sinks if streaming else (stored_forward(inputs.artifact) or {}).get("sinks", 0)
    learners = [
        LearningPass(
            LearningLoop(model, row, plan.seq_len, sinks, bos_id, dtype),
            inputs.text,
            keep_nll=settings.per_token is not None,
        )
        for row in learning
    ]
    where = {
        "device": worker.device_name,
        "backend": "triton" if triton else "torch",
        "ranks": world,
        "batch_windows": batch_windows,
        "adapt_windows": adapt_windows,
        "forward": "stream" if streaming else "windows",
        "sinks": streaming.sinks if streaming else None,
        "block_tokens": streaming.block_tokens if streaming else None,
        "dtype": worker.dtype_name,
    }
    saver = None
    if settings.resume:
        run = describe(settings, inputs, model, plan, adapters, where)
        saver = Saver(rank_path(settings.resume, rank), run, sliding, collected)
    loaded = time.perf_counter()
    if not rank:
        print(_intent(inputs, chosen, len(plan), where["device"]), file=sys.stderr, flush=True)
    with Progress(len(plan.owned(rank, world)), sliding.windows, "windows", silent=rank > 0) as progress:
        sliding.run(
            on_scored=collected.add if settings.per_token else None,
            on_windows=progress,
            on_piece=saver.save_when_due if saver else None,
        )
    if saver:
        saver.save()  # all of it, should writing the result fail
    sliding.meter.reduce()
    sliding.along.reduce()
    for learner in learners:
        with Progress(plan.predictions, 0, f"tokens of {learner.row.name}") as progress:
            learner.run(progress).add_to(sliding.meter, sliding.along)
        if settings.per_token:
            collected.append(learner.nll)
    work, peak = [adapter.work() for adapter in adapters], peak_memory_bytes(worker.device)
    if world > 1:
        gathered: list | None = [None] * world if rank == 0 else None
        dist.gather_object((collected.parts, work, peak), gathered)
        if rank:
            return {}, sliding, collected
        collected.parts = [part for parts, _, _ in gathered for part in parts]
        work = [merge_work(each) for each in zip(*(work for _, work, _ in gathered), strict=True)]
        peak = max(peak for _, _, peak in gathered)
    earlier = saver.seconds if saver else 0.0
    total = earlier + time.perf_counter() - started
    seconds = {"load": loaded - started, **sliding.seconds, "total": total}
    if learners:
        seconds["learn"] = sum(sum(learner.loop.seconds.values()) for learner in learners)
    where |= {"peak_memory_bytes": peak, "ttt_chunks": len(training.chunks(plan)) if training else 0}
    return report(settings, inputs, plan, adapters, work, sliding, learners, seconds, where), sliding, collected


def _intent(inputs: Inputs, rows: list[Adaptation | Learning], windows: int, device: str) -> str:
    """What will be done, in a line."""
    names = ", ".join(dict.fromkeys(["none", *(row.name for row in rows)]))
    tokens, count = counted(max(len(inputs.stream) - 1, 0), "token"), counted(windows, "window")
    return f"scoring {tokens} of {inputs.source} in {count} on {device}: {names}"


def _check_outputs(settings: config.EvalSettings, rank: int) -> None:
    """Refuse before the work what could not be written after it."""
    own = {f"--resume of rank {rank}": (rank_path(settings.resume, rank), config.PROGRESS)} if settings.resume else {}
    config.check_outputs(settings, own if rank else None)
    if settings.plot:
        pyplot()
