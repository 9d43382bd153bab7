"""The command."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import config, ops
from ..command import run
from ..data import atomic_write
from ..errors import InputError
from ..slot import Adapter, Calibration
from ..windows import Plan
from .inputs import choose_batch, choose_rows, read_inputs
from .loop import sliding_pass
from .report import TokenRows, list_presets, merge_work, report, show_preset, table

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_ABOUT = "Bits per byte of a model, plain and adapted, out of one sliding-window pass."


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; raises InputError on bad input."""
    started = time.perf_counter()
    settings, sources = config.load(config.EvalSettings, "python -m slotfast.eval", _ABOUT, argv)
    config.warn_unread_variables()
    if settings.show_config:
        return print(config.show(settings, sources))
    if settings.list_presets:
        return print(list_presets())
    if settings.show_preset is not None:
        return print(show_preset(settings.show_preset))
    rank, world, device = _process(settings.device)
    triton = ops.uses_triton(settings.backend, device)
    rows = choose_rows(settings)
    for path in (settings.json_, settings.per_token):
        if path not in (None, "-") and not os.access(Path(path).resolve().parent, os.W_OK):
            raise InputError(f"{path}: its folder does not exist or cannot be written")
    inputs = read_inputs(settings)
    length = settings.seq_len or inputs.artifact.config.seq_len
    plan = Plan(len(inputs.stream) - 1, length, settings.stride)
    batch_windows = choose_batch(settings, rows, plan, inputs.artifact.config.vocab_size)
    calibration = Calibration(inputs.artifact.unigram, inputs.artifact.metadata.get("scale"))
    bos_id = inputs.tokenizer.bos_id
    adapters = [Adapter(row, calibration, bos_id) for row in rows]
    model = inputs.artifact.model(settings.weights).to(device)
    dtype = _DTYPES.get(settings.dtype, torch.float32 if device == "cpu" else torch.bfloat16)
    if dtype == torch.float64:
        model = model.double()
    collected = TokenRows()
    loaded = time.perf_counter()
    with _progress(len(plan.owned(rank, world)), silent=rank > 0) as progress:
        result = sliding_pass(
            model,
            inputs.stream,
            plan,
            adapters,
            inputs.tokenizer.byte_table,
            bos_id,
            batch_windows=batch_windows,
            dtype=dtype,
            device=device,
            rank=rank,
            world=world,
            backend=settings.backend,
            on_scored=collected.parts.append if settings.per_token else None,
            on_windows=progress,
        )
    result.meter.reduce()
    work = [adapter.work() for adapter in adapters]
    if world > 1:
        gathered: list | None = [None] * world if rank == 0 else None
        dist.gather_object((collected.parts, work), gathered)
        if rank:
            return None
        collected.parts = [part for parts, _ in gathered for part in parts]
        work = [merge_work(each) for each in zip(*(work for _, work in gathered), strict=True)]
    seconds = {"load": loaded - started, **result.seconds, "total": time.perf_counter() - started}
    found = report(settings, inputs, plan, adapters, work, result, seconds, device, "triton" if triton else "torch")
    if settings.per_token:
        collected.write(settings.per_token, result.meter.rows)
    if settings.json_ == "-":
        print(json.dumps(found, indent=2))
        return None
    if settings.json_:
        with atomic_write(settings.json_) as file:
            file.write(json.dumps(found, indent=2).encode() + b"\n")
    return print(table(found))


def _process(device: str) -> tuple[int, int, str]:
    """Rank, number of ranks and device of this process; joins the others under torchrun."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch sees no GPU here")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return rank, world, device


class _progress:
    """A bar on a terminal, a line every ten seconds elsewhere; called with the number of windows just done."""

    def __init__(self, total: int, silent: bool):
        self.total, self.silent, self.done, self.last = total, silent, 0, time.perf_counter()
        self.bar = tqdm(total=total, unit=" windows", disable=True if silent else None, file=sys.stderr, leave=False)

    def __enter__(self) -> "_progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, windows: int) -> None:
        self.done += windows
        self.bar.update(windows)
        if self.bar.disable and not self.silent and time.perf_counter() - self.last > 10:
            self.last = time.perf_counter()
            print(f"{self.done} of {self.total} windows", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
