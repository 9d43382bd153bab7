"""Looks for better launch parameters: times the neighbours of what each kernel's `_config` returns.

    python -m bench.sweep [--kernel NAME] [--seconds 150] [--out FILE]

For every production case: each number of the tuple doubled or halved, alone, against another one or together with the
warps, on the inputs of the case. A candidate that does not compile, or does not give the current result, is left out.
Candidates are compiled by several processes first, each by whichever is free, which also keeps a crash away from the
timings. Nothing is changed: what is better goes into
`_config` by hand, with the GPU and the date. A second run then starts from there.
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.bench_kernels import ON_GPU, draw, error, first_case, outcome, rotating, shrunk
from bench.common import Rows, default_device, provenance
from bench.timing import is_small, measure
from slotfast.kernels import specs

DEVICE = default_device()


def _find(name: str, reason: str):
    spec = next(spec for spec in specs() if spec.name == name)
    return spec, next(case for case in spec.cases if case.reason == reason)


def _modules(spec) -> list:
    """The kernel modules that share the `_config` of the spec's own."""
    own = sys.modules[spec.fn.__module__]
    package = own.__name__.rpartition(".")[0] + "."
    wanted = getattr(own, "_config", None)
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith(package)]
    return [module for module in loaded if wanted is not None and getattr(module, "_config", None) is wanted]


@contextlib.contextmanager
def configured(spec, choose):
    """Within: `_config(*a, **k)` returns `choose(result, a, k)`."""
    modules = _modules(spec)
    original = modules[0]._config if modules else None

    def patched(*args, **kwargs):
        return choose(original(*args, **kwargs), args, kwargs)

    for module in modules:
        module._config = patched
    try:
        yield
    finally:
        for module in modules:
            module._config = original


def current(spec, kwargs):
    """The first call of `_config` behind a launch, as (arguments, result); None without one."""
    calls = []
    with configured(spec, lambda result, a, k: calls.append(((a, tuple(k.items())), result)) or result):
        spec.fn(**kwargs)
    return next((call for call in calls if isinstance(call[1], tuple)), None)


def neighbours(config: tuple) -> list[tuple]:
    """Each number doubled or halved: alone, against another, or together with the warps, which stay within 1 to 32."""
    names = getattr(config, "_fields", [""] * (len(config) - 1) + ["num_warps"])
    fields = [i for i, value in enumerate(config) if type(value) is int and value > 0]
    warps = names.index("num_warps")
    moves = [{i: factor} for i in fields for factor in (2, 0.5)]
    moves += [{i: 2, j: 0.5} for i in fields for j in fields if i != j]
    moves += [{i: factor, warps: factor} for i in fields if i != warps for factor in (2, 0.5)]
    found = []
    for move in moves:
        values = [value * move.get(i, 1) for i, value in enumerate(config)]
        whole = all(value == int(value) and value >= 1 for i, value in enumerate(values) if i in move)
        if whole and values[warps] <= 32:
            values = [int(value) if i in move else value for i, value in enumerate(values)]
            found.append(type(config)(*values) if hasattr(config, "_fields") else tuple(values))
    return found


def with_candidate(spec, arguments, candidate):
    return configured(spec, lambda result, a, k: candidate if (a, tuple(k.items())) == arguments else result)


@functools.lru_cache(maxsize=1)
def _small(name: str, reason: str):
    """(spec, case, inputs, current call of `_config`, its result), on few windows."""
    torch.set_num_threads(1)
    spec, case = _find(name, reason)
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 24) if case.production else dict(case.shape))
    found = current(spec, kwargs)
    return spec, case, kwargs, found, None if found is None else outcome(spec.fn(**kwargs))


@torch.no_grad()
def candidates(name: str, reason: str) -> list[tuple]:
    """What to try; compiles what is current."""
    found = _small(name, reason)[3]
    return [] if found is None else [tuple(each) for each in neighbours(found[1])]


@torch.no_grad()
def compile_candidate(name: str, reason: str, candidate: tuple, deadline: float) -> str | None:
    """None if it compiles and gives the current result, else what is wrong with it."""
    if time.time() > deadline:
        return "no time left"
    try:
        spec, case, kwargs, (arguments, config), expected = _small(name, reason)
        with with_candidate(spec, arguments, _like(config, candidate)):
            off = error(outcome(spec.fn(**kwargs)), expected)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"[:120]
    return None if off <= max(4 * torch.finfo(case.dtype).eps, 1e-4) else f"result off by {off:.2g}"


def _like(config: tuple, values: tuple) -> tuple:
    return type(config)._make(values) if hasattr(config, "_fields") else tuple(values)


@torch.no_grad()
def time_candidates(name: str, reason: str, good: list[tuple]) -> dict:
    spec, case = _find(name, reason)
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 28) if case.production else dict(case.shape))
    arguments, config = current(spec, kwargs)
    inputs = rotating(kwargs) if ON_GPU else [kwargs]
    following = itertools.cycle(inputs)
    small, seconds = is_small(lambda: spec.fn(**kwargs), DEVICE), 0.05 if ON_GPU else 0.0

    def call():
        return spec.fn(**next(following))

    def ms(candidate) -> float:
        with with_candidate(spec, arguments, _like(config, candidate)):
            return statistics.median(measure(call, DEVICE, seconds=seconds, small=small, calls=len(inputs)))

    def shown(values) -> str:
        names = getattr(config, "_fields", None)
        return " ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)) if names else str(tuple(values))

    times = {shown(each): ms(each) for each in (config, *good)}
    first, again = times[shown(config)], ms(config)  # differences below theirs are noise
    now = times[shown(config)] = min(first, again)
    best = min(times, key=times.get)
    return {
        "current": shown(config),
        "current_ms": now,
        "noise": abs(again / first - 1),
        "best": best,
        "best_ms": times[best],
        "gain": now / times[best],
        "timed_by": "graph" if small else "events" if ON_GPU else "clock",
        "times_ms": times,
    }


def work(kernel: str | None, most: int | None) -> list[tuple]:
    """(spec, case) of every production case, first every kernel's first one; off the GPU, of one small case each."""
    chosen = []
    for spec in specs():
        cases = [c for c in spec.cases if c.production] if ON_GPU else [first_case(spec)]
        chosen += [(at, spec.name, case.reason) for at, case in enumerate(cases) if kernel in (None, spec.name)]
    return [tuple(item) for at, *item in sorted(chosen, key=lambda item: item[0]) if most is None or at < most]


def compiled(items: list[tuple], jobs: int, most: int | None, deadline: float) -> Iterator[tuple[tuple, list, dict]]:
    """For each item its good candidates, and what is wrong with the others. A candidate is a job of its own: the
    slowest kernel's are compiled by all processes, not by one after another."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        listed = [pool.submit(candidates, *item) for item in items]
        tried = []
        for item, future in zip(items, listed, strict=True):
            try:
                found = future.result()[:most]
            except Exception as problem:
                tried.append({"": f"{type(problem).__name__}: {problem}"[:200]})
                continue
            tried.append({each: pool.submit(compile_candidate, *item, each, deadline) for each in found})
        for item, jobs_of in zip(items, tried, strict=True):
            wrong = {each: job if isinstance(job, str) else job.result() for each, job in jobs_of.items()}
            good = [each for each, problem in wrong.items() if problem is None]
            yield item, good, {str(each): problem for each, problem in wrong.items() if problem is not None}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", choices=[spec.name for spec in specs()])
    parser.add_argument("--seconds", type=float, default=150, help="stop timing after that long")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--most", type=int, help="candidates of a case")
    parser.add_argument("--cases", type=int, help="of each kernel")
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("needs a GPU; TRITON_INTERPRET=1 only tries the code, on a CPU")
    started = time.monotonic()
    rows = Rows(args.out, provenance(DEVICE))
    deadline = time.time() + 0.65 * args.seconds
    # All of them first: compiling beside it would disturb what is timed.
    for item, good, wrong in list(compiled(work(args.kernel, args.cases), args.jobs, args.most, deadline)):
        what = {"kernel": item[0], "case": item[1], "left_out": wrong}
        if not good:
            rows.take(what, lambda: {"skipped": "no candidate"})
        elif time.monotonic() - started > args.seconds:
            rows.take(what, lambda: {"skipped": "no time left"})
        else:
            rows.take(what, time_candidates, *item, good)
    if not any("gain" in row for row in rows.rows):
        print("nothing was measured", file=sys.stderr)
        return 1
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
