"""The dtype of a training's forward."""

import time

import torch
import torch.distributed as dist

from ..model import GPT
from ..worker import Worker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(name: str, model: GPT, worker: Worker) -> torch.dtype:
    """The dtype of that name; for `auto`, bfloat16 on a GPU, and on a CPU whichever rank 0 finds faster."""
    if name != "auto":
        return DTYPES[name]
    if worker.on_gpu:
        return torch.bfloat16
    choice = [_faster_dtype(model)]
    if worker.world > 1:
        dist.broadcast_object_list(choice)
    return choice[0]


def _faster_dtype(model: GPT) -> torch.dtype:
    """bfloat16 where this machine is faster with it, as with matrix units, else float32: measured, not guessed."""
    tokens = torch.arange(model.config.seq_len + 1)[None] % model.config.vocab_size
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):
            start = time.perf_counter()
            model(tokens[:, :-1], tokens[:, 1:], dtype).backward()
            seconds[dtype] = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return min(seconds, key=seconds.get)
