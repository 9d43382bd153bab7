"""How an evaluation runs: its settings, read once, and what they leave open, decided by model, text and machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .. import ops
from ..artifact import Artifact
from ..compiled import Mode
from ..config import EvalSettings
from ..errors import InputError
from ..foreign import ForeignModel
from ..learn import LEARNING, Learning, calibrated_row
from ..slot import Adaptation, first_position, is_published
from ..windows import Plan
from ..worker import Worker
from .forward import Streaming, block_that_fits, streams, windows_that_fit
from .inputs import Inputs, Sources, read_inputs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_MAX_BATCH_WINDOWS = 32
_MAX_ADAPT_WINDOWS = 8192  # more would fill no GPU better
_COMPILED_FORWARDS = 1000  # predicted: compiling takes some 20 s on a GPU, and a forward then some 20 ms less


@dataclass(frozen=True)
class Setup:
    """How an evaluation runs.

    Args:
        rows: adaptations that share the run's forward.
        learning: rows that learn, each with a forward of its own.
        plan: windows over the stream.
        batch_windows, adapt_windows: windows of one forward, and windows that are adapted at once.
        streaming: every token is forwarded once; None: every window for itself.
        weights: dequantized or int6.
        worker: this process.
        learning_sinks: of the rows that learn.
    """

    rows: list[Adaptation]
    learning: list[Learning]
    plan: Plan
    batch_windows: int
    adapt_windows: int
    streaming: Streaming | None
    weights: Literal["dequantized", "int6"]
    worker: Worker
    learning_sinks: int = 0

    @property
    def forward(self) -> str:
        return "stream" if self.streaming else "windows"

    @property
    def sinks(self) -> int | None:
        return self.streaming.sinks if self.streaming else None

    @property
    def block_tokens(self) -> int | None:
        return self.streaming.block_tokens if self.streaming else None

    @property
    def backend(self) -> str:
        """What the kernels run on: triton or torch."""
        return "triton" if ops.uses_triton(self.worker.backend, self.worker.device) else "torch"


def set_up(settings: EvalSettings, rows: Sequence[Adaptation | Learning], worker: Worker) -> tuple[Inputs, Setup]:
    """Read what an evaluation needs, and choose how it runs.

    Raises:
        InputError: input that is missing or damaged, or choices that do not go together, or not with the model, the
            text or the number of processes.
    """
    worker = choose_worker(settings, worker)
    sharing, learning = choose_learning(settings, rows, worker.world)
    inputs = read_inputs(settings.pick(Sources))
    plan = choose_plan(settings, inputs, rows)
    batch_windows, adapt_windows = choose_batch(settings, sharing, plan, inputs.artifact.config.vocab_size, worker)
    streaming = choose_streaming(settings, rows, inputs, plan, worker)
    setup = Setup(
        rows=sharing,
        learning=[calibrated_row(row, inputs.artifact.metadata) for row in learning],
        plan=plan,
        batch_windows=batch_windows,
        adapt_windows=adapt_windows,
        streaming=streaming,
        weights=settings.weights,
        worker=replace(worker, compile=choose_compile(settings, plan, batch_windows, streaming, worker)),
        learning_sinks=choose_sinks(settings, inputs),
    )
    return inputs, setup


def choose_worker(settings: EvalSettings, worker: Worker) -> Worker:
    """The process with the dtype and the backend that the settings ask for.

    Raises:
        InputError: kernels without a GPU, or that do not compute in the dtype, or packed weights of a model that has
            none.
    """
    if settings.model is not None and settings.weights == "int6":
        raise InputError("--weights int6: needs an --artifact, whose weights are packed")
    dtype = _DTYPES.get(settings.dtype, torch.bfloat16 if worker.on_gpu else torch.float32)
    if ops.uses_triton(settings.backend, worker.device) and dtype == torch.float64:
        raise InputError("--dtype float64: the kernels compute in float32; add --backend torch")
    return replace(worker, dtype=dtype, backend=settings.backend)


def choose_length(
    settings: EvalSettings, artifact: Artifact | ForeignModel, rows: Sequence[Adaptation | Learning]
) -> int:
    """Positions of a window: as long as the training's, or as a stream can have of the model, where none are chosen."""
    length = settings.seq_len or artifact.config.seq_len
    as_stream = settings.forward == "stream" or any(isinstance(row, Learning) and not row.apart for row in rows)
    if settings.seq_len is None and as_stream and isinstance(artifact, ForeignModel):
        return min(length, artifact.module.stream_window or length)
    return length


def choose_plan(settings: EvalSettings, inputs: Inputs, rows: Sequence[Adaptation | Learning] = ()) -> Plan:
    """Windows of `choose_length`, and a stride of no more than that, unless the settings say otherwise."""
    length = choose_length(settings, inputs.artifact, rows)
    chosen = "stride" in settings.model_fields_set
    return Plan(len(inputs.stream) - 1, length, settings.stride if chosen else min(settings.stride, length))


def choose_batch(
    settings: EvalSettings, rows: Sequence[Adaptation], plan: Plan, vocab_size: int, worker: Worker
) -> tuple[int, int]:
    """How many windows are forwarded, and how many adapted, at once: what fits, in multiples of what a row needs.

    A GPU solves one window on each of its processors, so it wants many times what one forward gives; a CPU does not.
    """
    unit = math.lcm(*(row.unit for row in rows))
    fits = windows_that_fit(plan.seq_len, vocab_size)
    chosen = settings.batch_windows or max(unit, min(fits, _MAX_BATCH_WINDOWS) // unit * unit)
    if chosen % unit:
        raise InputError(
            f"--batch-windows {chosen}: expected a multiple of {unit}, the windows that a preset fits together"
        )
    batch = chosen if chosen <= len(plan) or settings.batch_windows else max(len(plan), 1)
    needed = plan.seq_len - min((first_position(row, plan.seq_len, plan.stride) for row in rows), default=0)
    memory = torch.cuda.mem_get_info(worker.device)[0] // 8 if worker.on_gpu else 0
    fits = min(memory // (4 * needed * vocab_size), _MAX_ADAPT_WINDOWS)
    together = settings.adapt_windows or max(batch, fits // batch * batch)
    if together % chosen and together % batch:
        raise InputError(f"--adapt-windows {together}: expected a multiple of {chosen}, the windows of one forward")
    return batch, max(batch, together // batch * batch)


def choose_compile(
    settings: EvalSettings, plan: Plan, batch_windows: int, streaming: Streaming | None, worker: Worker
) -> Mode:
    """How the forward runs; on a GPU by torch.compile, unless the settings say otherwise, where it runs often.

    Raises:
        InputError: it is to be compiled and is another project's, or captured where there is no GPU.
    """
    chosen = settings.compile
    if chosen == "graphs" and not worker.on_gpu:
        raise InputError("--compile graphs: needs a GPU, and this runs on the CPU")
    if settings.model is not None:
        if chosen in ("on", "graphs"):
            raise InputError(f"--compile {chosen}: is for an --artifact; the code of --model runs as it is")
        return "off"
    if chosen != "auto":
        return chosen
    whole = plan.predictions // streaming.block_tokens if streaming else len(plan) // batch_windows
    return "on" if worker.on_gpu and whole >= _COMPILED_FORWARDS * worker.world else "off"


def choose_streaming(
    settings: EvalSettings, rows: Sequence[Adaptation | Learning], inputs: Inputs, plan: Plan, worker: Worker
) -> Streaming | None:
    """How every token is forwarded once; None: windows.

    Raises:
        InputError: a stream is asked for and the model or a row has none, or its settings without it.
    """
    stored, learns = inputs.stored_forward, any(isinstance(row, Learning) for row in rows)
    chosen = settings.forward
    windows = [row.name for row in rows if isinstance(row, Learning) and row.keys == "windows"]
    if chosen == "stream" and windows:
        raise InputError(f"--forward stream: preset {windows[0]!r} forwards windows; use --forward windows")
    if chosen == "auto":
        # Published numbers come from windows, and what was found at another length says nothing about this one
        suits = plan.seq_len <= inputs.artifact.config.seq_len
        trained_length = settings.seq_len in (None, inputs.artifact.config.seq_len)
        published = windows or any(is_published(row) for row in rows if isinstance(row, Adaptation))
        chosen = stored["forward"] if stored and suits and trained_length and not published else "windows"
    if chosen == "windows":
        for flag, value in (("--sinks", settings.sinks), ("--block-tokens", settings.block_tokens)):
            if value is not None and not (learns and flag == "--sinks"):
                raise InputError(
                    f"{flag} {value}: is for a stream, and this run forwards windows; add --forward stream"
                )
        return None
    if isinstance(inputs.artifact, ForeignModel) and not streams(inputs.artifact.module):
        raise InputError(
            f"--forward stream: {settings.model} has no stream(tokens, state) -> (states, state); use --forward windows"
        )
    block = settings.block_tokens or block_that_fits(inputs.artifact.config.vocab_size, worker.on_gpu)
    return Streaming(choose_sinks(settings, inputs), block)


def choose_sinks(settings: EvalSettings, inputs: Inputs) -> int:
    """First tokens of a stream that stay visible: those of the settings, or of the calibration, or none."""
    stored = (inputs.stored_forward or {}).get("sinks", 0)
    return stored if settings.sinks is None else settings.sinks


def choose_learning(
    settings: EvalSettings, rows: Sequence[Adaptation | Learning], world: int
) -> tuple[list[Adaptation], list[Learning]]:
    """The rows that share the run's forward, and those that learn, each with a forward of its own.

    Raises:
        InputError: a row that learns, in a run that it cannot be part of.
    """
    learning = [row for row in rows if isinstance(row, Learning)]
    for row in learning:
        where = f"preset {row.name!r}: "
        # Processes train one model together, each on its share of a chunk
        if world > 1 and row.keys == "windows" and row.top is not None and row.top.scope == "prefix":
            raise InputError(f"{where}on {world} processes: what is on top needs the stream in order; run one")
        if settings.weights == "int6":
            raise InputError(f"{where}with --weights int6: packed weights pass no gradients on; leave out --weights")
    return [row for row in rows if isinstance(row, Adaptation)], learning


def ttt_row(settings: EvalSettings) -> str | None:
    """The row that --ttt and its numbers spell: ttt-549, with those that are not its own."""
    if not settings.ttt:
        return None
    numbers = {"chunk": settings.ttt_chunk, "lr": settings.ttt_lr, "steps": settings.ttt_epochs}
    numbers |= {"batch": settings.ttt_batch, "momentum": settings.ttt_momentum, "clip": settings.ttt_clip}
    changed = [f"{key}={value}" for key, value in numbers.items() if value != getattr(LEARNING["ttt-549"], key)]
    return ":".join(["ttt-549", *([",".join(changed)] if changed else [])])
