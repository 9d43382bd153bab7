"""Runs the PTX that Triton emits, without a GPU: every thread of every program of a launch, and finds their races.

    with Emulation("sm_90") as emulation:
        slot_solve(logits, targets)          # CPU tensors; launches as on a GPU, executed here
    assert not emulation.report.hard

`python -m tests.ptx --help` runs the kernels' cases so. Found are

- accesses of two threads of a program to one place, one of them a write, without a barrier between them, in global and
  in shared memory; for threads of one warp in a class of its own. That a write changes nothing is no excuse, unless
  lanes of one and the same store agree;
- races between programs, which only atomics and fences put in order, and bits that turn on the order in which programs
  arrive at an atomic; different values for one place in one store; addresses that are misaligned or outside every
  tensor; threads that wait at a barrier for ever; shuffles by a part of a warp; shared memory that is read before
  cp.async has been waited for, or written while wgmma reads it;
- results that depend on memory that nothing has written: it holds poison, another in each run;
- results that depend on the last bits of approximate instructions: exact in one run, off by 1 or 2 units in another.

Not seen: what ptxas makes of the PTX (it may fuse a multiplication and an addition that are apart here); the order in
which hardware runs warps, beyond what barriers leave open; a missing fence, or registers of wgmma that are used before
it was waited for. TMA and mbarriers are not known yet; an instruction that is not known is an error.

parse.py       text -> blocks of instructions
translate.py   blocks -> functions on numpy arrays, an element a thread;  arithmetic.py, movement.py  instructions
run.py         which block runs next, barriers, cp.async, shuffles;  matrices.py  ldmatrix, mma, wgmma
memory.py      bytes, and who touched them when;  order.py  what atomics and fences order between programs
launch.py      stands in for the driver: binding, specialisation and compilation are Triton's own
cases.py       kernels' specs under it, and faults that must be found
"""

from .launch import Emulation

__all__ = ["Emulation"]
