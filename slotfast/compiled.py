"""torch.compile of a function whose tensors always have the same shapes, and CUDA graphs of what that gives.

Where it fails, for want of a C++ compiler on a CPU or of Triton on a GPU, or by an operator that the compiler does not
know, the function runs as it is, and a line on standard error says so once. Nothing is lost by that: functions that are
compiled here leave what they are given alone, so a call that fails is made again.
"""

import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import InputError, first_line
from .flash import flash_attention

Mode = Literal["off", "on", "graphs"]  # graphs: compiled, then captured; for GPUs

_NEXT: dict[Mode, Mode] = {"graphs": "on", "on": "off"}
_CALLED: dict[Mode, str] = {"graphs": "a CUDA graph", "on": "torch.compile"}
_MOST_SHAPES = 64  # of one function in a process: an audit runs rows that need different parts of a window
_WARM_UPS = 3  # calls before a capture, in which kernels are tuned and libraries make their handles


class Compiled:
    """A pure function of tensors, whose shapes are the same in every call.

    Args:
        function: takes tensors, gives a tuple of tensors, and changes none of those that it took.
        mode: how to run it.
        device: of the tensors.
        options: of torch.compile, over those of one shape.

    Attributes:
        mode: how it runs; another one than asked for where that failed.
        why: the failure, in a line; None where there was none.
        seconds: of the first call: compiling, and running once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mode: Mode,
        device: torch.device | str,
        options: dict[str, Any] | None = None,
    ):
        self.function, self.mode, self.options = function, mode, options
        self.why: str | None = None
        self.seconds = 0.0
        self._run: Callable[..., Any] | None = None
        self._must = False
        if mode != "off":
            flash_attention(torch.device(device))  # found before anything is compiled

    def __call__(self, *tensors: Tensor) -> Any:
        """What the function gives.

        Raises:
            InputError: it cannot be compiled, and what it goes on from was.
        """
        if self.mode == "off":
            return self.function(*tensors)
        try:
            if self._run is not None:
                return self._run(*tensors)
            started = time.perf_counter()
            run = _compiled(self.function, self.options)
            run = _Graph(run, tensors) if self.mode == "graphs" else run
            found = run(*tensors)
            self._run, self.seconds = run, time.perf_counter() - started
            return found
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a compiler raises
            failed = error
        if self.mode == "on":
            found = self.function(*tensors)  # raises what is no fault of the compiler's
            self._fall_back(failed)
            return found
        self._fall_back(failed)
        return self(*tensors)

    def _fall_back(self, error: Exception) -> None:
        reason = first_line(getattr(error, "inner_exception", error))[:200]
        failure = f"{_CALLED[self.mode]} fails here ({reason})"
        if self._must and self.mode == "on":
            raise InputError(f"--resume: {failure}, and computed what is saved; start anew, with --compile off")
        self.why, self.mode, self._run = failure, _NEXT[self.mode], None
        print(f"--compile: {failure}; going on without", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, bool | None]:
        """Whether what it gave was compiled; None before its first call."""
        return {"compiled": self.mode != "off" if self._run or self.why else None}

    def load_state_dict(self, state: Mapping[str, bool | None]) -> None:
        """Go on as `state_dict` says, so that later results have the bits of earlier ones."""
        if state["compiled"] is not None:
            self._must = state["compiled"]
            self.mode = self.mode if self._must else "off"


def _compiled(function: Callable[..., Any], options: dict[str, Any] | None) -> Callable[..., Any]:
    if options is None:
        options = {"fullgraph": True, "dynamic": False}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options["recompile_limit"] = _MOST_SHAPES
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):  # kernels are not chosen by timing, where the choice changes bits
            options["options"] = {"deterministic": True}
    return torch.compile(function, **options)


class _Graph:
    """A function captured in a CUDA graph; a call copies its tensors in, replays, and copies the results out.

    Args:
        function: pure, and never waits for the device.
        tensors: what it is captured with.
    """

    def __init__(self, function: Callable[..., Any], tensors: Sequence[Tensor]):
        self.inputs = [tensor.clone() for tensor in tensors]
        self.device = self.inputs[0].device
        with torch.cuda.device(self.device):  # which need not be the process's current one
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function(*self.inputs)
            current.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = function(*self.inputs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return tuple(result.clone() for result in self.results)
