"""The command: settings to inputs, one pass, a report."""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist

from .. import config
from ..command.files import json_text, write_json
from ..command.progress import Progress
from ..command.ranks import join_ranks
from ..command.run import deliver, no_exit
from ..learn import FrozenLoop, Learning, OnTop, make_loop
from ..model import GPT
from ..slot import Adaptation, Adapter, Calibration
from ..words import counted
from .chunked import WindowsLoop
from .forward import block_that_fits
from .inputs import Inputs, choose_rows
from .learning import UNLEARNED, LearningPass, grouped
from .loop import SlidingPass
from .page import write_page
from .plot import draw
from .report import Outcome, TokenRows, list_presets, merge_work, peak_memory_bytes, report, show_preset, table
from .resume import Saver, describe, rank_path
from .setup import Setup, set_up, ttt_row


def evaluate(settings: config.EvalSettings, argv: Sequence[str] = ()) -> None:
    """Evaluate, print the table and write what was asked for; raises InputError on bad input.

    Args:
        settings: of the command.
        argv: the arguments that gave them, for the page.
    """
    started = time.perf_counter()
    if settings.list_presets:
        return print(list_presets())
    if settings.show_preset is not None:
        return print(show_preset(settings.show_preset))
    rows = choose_rows(settings.preset, settings.allow_noncausal, below=ttt_row(settings))
    with join_ranks(settings.device) as worker, no_exit(f"--model {settings.model}"):
        _check_outputs(settings, worker.rank)
        inputs, setup = set_up(settings, rows, worker)
        saved = rank_path(settings.resume, worker.rank) if settings.resume else None
        outcome = _evaluate(inputs, setup, saved, settings.per_token is not None, _intent(inputs, setup, rows), started)
    if worker.rank:
        return None
    found = report(inputs, setup, outcome, settings.model_dump(by_alias=True))
    if settings.budget is not None:
        total = outcome.seconds["total"]
        measured = {"measured": round(total, 3), "within": total <= settings.budget}
        found["budget"] = {"seconds": settings.budget, **measured}
    command = shlex.join(["slotfast", "eval", *argv])
    title = f"{found['text']['source']}, {counted(found['tokens'], 'token')}"
    meter, along = outcome.sliding.meter, outcome.sliding.along
    spent = {row.name: (each.spent, each.forwards) for each in outcome.learners for row in each.rows}
    leaking = {row["preset"] for row in found["presets"] if not row["causal"]}
    deliver(
        json_text(found) if settings.json_ == "-" else table(found),
        (settings.json_, lambda path: write_json(path, found)),
        (settings.per_token, lambda path: outcome.collected.write(path, meter.rows)),
        (settings.plot, lambda path: draw(path, title, meter, along, spent, leaking)),
        (settings.report, lambda path: write_page(path, found, inputs, outcome.sliding, command)),
    )
    return None


def _evaluate(inputs: Inputs, setup: Setup, saved: str | None, per_token: bool, intent: str, started: float) -> Outcome:
    """Score the stream.

    Args:
        saved: where this rank saves its progress, or None.
        per_token: whether to keep every token's losses.
        intent: printed once nothing is left to be refused.
        started: the command, by `time.perf_counter`.
    """
    worker, plan, streaming = setup.worker, setup.plan, setup.streaming
    rank, world = worker.rank, worker.world
    calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    bos_id = inputs.tokenizer.bos_id
    adapters = [Adapter(row, calibration, bos_id) for row in setup.rows]
    model = inputs.artifact.model(setup.weights, worker.backend).to(worker.device)
    if worker.dtype == torch.float64:
        model = model.double()
    elif isinstance(model, GPT) and not setup.learning:
        model.cast_matrices(worker.dtype)
    collected = TokenRows()
    sliding = SlidingPass(
        model,
        inputs.text,
        plan,
        adapters,
        batch_windows=setup.batch_windows,
        adapt_windows=setup.adapt_windows,
        streaming=streaming,
        worker=worker,
    )
    sinks = setup.learning_sinks
    learners = []
    for same in grouped(setup.learning, calibration):
        if same[0].keys == "windows":
            tops = [Adapter(row.top, calibration, bos_id) for row in same if row.top is not None]
            loop = WindowsLoop(
                model, same[0], inputs.text, plan, tops, batch_windows=setup.batch_windows, worker=worker
            )
        else:
            on_top = OnTop.of(same, plan.seq_len, calibration, bos_id)
            dealt = {"rank": rank, "world": world} if same[0].phases else {}
            loop = make_loop(model, same[0], plan.seq_len, sinks, bos_id, worker.dtype, on_top=on_top, **dealt)
        learners.append(LearningPass(loop, same, inputs.text, per_token, rank, world))
    charging = list(learners)
    missing = [learner for learner in learners if "unlearned" not in learner.loop.seconds]
    frozen = None
    if streaming is None and any(learner.loop.row.forward == "stream" for learner in missing):
        # one for all of them: the weights that they start from are the same
        block = block_that_fits(inputs.artifact.config.vocab_size, worker.on_gpu)
        loop = FrozenLoop(model, plan.seq_len, sinks, worker.dtype, block)
        frozen = LearningPass(loop, [UNLEARNED], inputs.text, False, rank, world)
        charging.insert(0, frozen)
    run = describe(inputs, setup, model, per_token) if saved else {}
    saver = Saver(saved, run, sliding, collected, charging, worker) if saved else None
    if not rank:
        print(intent, file=sys.stderr, flush=True)
    loaded = time.perf_counter()
    with saver.interrupt if saver else nullcontext():
        with Progress(len(plan.owned(rank, world)), sliding.windows, "windows", silent=rank > 0) as progress:
            sliding.run(
                on_scored=collected.add if per_token else None,
                on_windows=progress,
                on_piece=saver and saver.save_when_due,
            )
        for each in charging:
            names = ", ".join(row.name for row in each.rows)
            with Progress(each.share, each.charged, f"tokens of {names}", silent=rank > 0) as progress:
                each.run(progress, partial(saver.save_when_due, each) if saver else None)
        if saver:
            saver.save()  # all of it, should writing the result fail
    sliding.meter.reduce()
    sliding.along.reduce()
    for each in charging:
        each.gather(worker)
    none = unlearned = sliding.meter.nats[0], sliding.seconds["forward"]
    if frozen:
        unlearned = frozen.meter.nats[1], frozen.seconds["unlearned"]
    for learner in missing:
        learner.compare(*(none if learner.loop.row.forward == "windows" else unlearned))
    work, peak = [adapter.work() for adapter in adapters], peak_memory_bytes(worker)
    if world > 1:
        gathered: list | None = [None] * world if rank == 0 else None
        dist.gather_object((collected.parts, work, peak), gathered)
        if gathered is not None:
            collected.parts = [part for parts, _, _ in gathered for part in parts]
            work = [merge_work(each) for each in zip(*(work for _, work, _ in gathered), strict=True)]
            peak = max(peak for _, _, peak in gathered)
    for learner in learners if not rank else ():
        learner.add_to(sliding.meter, sliding.along)
        if per_token:
            for nll in learner.nll:
                collected.append(nll)
    earlier = saver.seconds if saver else 0.0
    total = earlier + time.perf_counter() - started
    seconds = {"load": loaded - started, **sliding.seconds, "total": total}
    if sliding.compiled.seconds:
        seconds["compile"] = sliding.compiled.seconds
        seconds["forward"] -= seconds["compile"]
    if learners:
        seconds["learn"] = sum(learner.seconds["learned"] for learner in learners)
    return Outcome(sliding, learners, collected, work, seconds, peak)


def _intent(inputs: Inputs, setup: Setup, rows: list[Adaptation | Learning]) -> str:
    """What will be done, in a line."""
    names = ", ".join(dict.fromkeys(["none", *(row.name for row in rows)]))
    tokens, count = counted(max(len(inputs.stream) - 1, 0), "token"), counted(len(setup.plan), "window")
    return f"scoring {tokens} of {inputs.source} in {count} on {setup.worker.device_name}: {names}"


def _check_outputs(settings: config.EvalSettings, rank: int) -> None:
    """Refuse before the work what could not be written after it."""
    own = {f"--resume of rank {rank}": (rank_path(settings.resume, rank), config.PROGRESS)} if settings.resume else {}
    config.check_outputs(settings, own if rank else None)
