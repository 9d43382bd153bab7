"""Several processes of one command, as torchrun starts them."""

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import InputError
from ..worker import Worker

# As gloo and NCCL say it
_LOST = re.compile(r"Connection (closed|reset) by (remote )?peer|remote process exit(ed|ing)")


@contextmanager
def join_ranks(name: str) -> Iterator[Worker]:
    """This process, joined with the others under torchrun.

    Args:
        name: of the device, or auto.

    Raises:
        InputError: no such device, some of torchrun's variables are missing, or another process ended while this one
            waited for it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InputError(f"--device {name}: torch sees {found} GPUs here")
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, local, world = 0, device.index or 0, 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        values = {variable: os.environ.get(variable, "") for variable in variables}
        numbers = [values[variable] for variable in variables if variable != "MASTER_ADDR"]
        if not all(values.values()) or not all(number.isdecimal() for number in numbers):
            raise InputError(f"{values}: several processes need all of these, as torchrun sets them")
        rank, local, world = (int(values[variable]) for variable in variables[:3])
        if not rank < world:
            raise InputError(f"RANK={rank}: expected 0 to {world - 1}, as WORLD_SIZE is {world}")
        if device.index is not None:
            raise InputError(f"--device {name}: under torchrun each process has its own; expected cuda")
    if device.type == "cuda":
        torch.cuda.set_device(local)
    if world > 1:
        # Torch imports this module lazily. Imported later than now, its functions would take the process group as a
        # default argument and keep it alive, and its threads now and then abort a process that has finished.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Worker(f"cuda:{local}" if device.type == "cuda" else "cpu", rank=rank, world=world)
    except RuntimeError as error:
        if world == 1 or not _LOST.search(str(error)):
            raise
        raise InputError(f"rank {rank}: another process, which it waited for, has ended; that one says why") from None
    finally:
        if world > 1:
            dist.destroy_process_group()
