"""Looks for better launch parameters: times the neighbours of what each kernel's `_config` returns.

    python -m bench.sweep [--kernel NAME] [--seconds 150] [--out FILE]

For every production case: each number of the tuple doubled or halved, alone or against another one, on the inputs of
the case. A candidate that does not compile, or does not give the current result, is left out. Candidates are compiled
by several processes first, which also keeps a crash away from the timings. Nothing is changed: what is better goes into
`_config` by hand, with the GPU and the date. A second run then starts from there.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.bench_kernels import ON_GPU, draw, error, shrunk
from bench.common import default_device, measure, provenance, write_json
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
    """Each number doubled or halved, alone or against another; warps stay within 1 to 32."""
    names = getattr(config, "_fields", [""] * len(config))
    fields = [i for i, value in enumerate(config) if type(value) is int and value > 0]
    moves = [{i: factor} for i in fields for factor in (2, 0.5)]
    moves += [{i: 2, j: 0.5} for i in fields for j in fields if i != j]
    found = []
    for move in moves:
        values = [value * move.get(i, 1) for i, value in enumerate(config)]
        whole = all(value == int(value) and value >= 1 for i, value in enumerate(values) if i in move)
        if whole and not any(name == "num_warps" and value > 32 for name, value in zip(names, values, strict=True)):
            values = [int(value) if i in move else value for i, value in enumerate(values)]
            found.append(type(config)(*values) if hasattr(config, "_fields") else tuple(values))
    return found


def result(spec, kwargs):
    """What a candidate has to agree on: of a solver the loss, for its path turns on roundings."""
    found = spec.fn(**kwargs)
    return getattr(found, "loss", found)


def with_candidate(spec, arguments, candidate):
    return configured(spec, lambda result, a, k: candidate if (a, tuple(k.items())) == arguments else result)


def compile_candidates(name: str, reason: str, most: int | None, deadline: float) -> tuple[list, dict]:
    """Candidates that give the current result, and what is wrong with the others."""
    torch.set_num_threads(1)
    spec, case = _find(name, reason)
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 24) if case.production else dict(case.shape))
    found = current(spec, kwargs)
    good, bad = [], {}
    if found is None:
        return good, bad
    arguments, config = found
    expected = result(spec, kwargs)
    for candidate in neighbours(config)[:most]:
        if time.time() > deadline:
            bad[str(tuple(candidate))] = "no time left"
            continue
        try:
            with with_candidate(spec, arguments, candidate):
                off = error(result(spec, kwargs), expected)
            if off <= max(4 * torch.finfo(case.dtype).eps, 1e-4):
                good.append(tuple(candidate))
            else:
                bad[str(tuple(candidate))] = f"result off by {off:.2g}"
        except Exception as problem:
            bad[str(tuple(candidate))] = f"{type(problem).__name__}: {problem}"[:120]
    return good, bad


@torch.no_grad()
def time_candidates(name: str, reason: str, good: list[tuple]) -> dict:
    spec, case = _find(name, reason)
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 28) if case.production else dict(case.shape))
    arguments, config = current(spec, kwargs)

    def ms(candidate) -> float:
        with with_candidate(spec, arguments, candidate):
            return statistics.median(measure(lambda: spec.fn(**kwargs), DEVICE, seconds=0.05 if ON_GPU else 0.0))

    def shown(values) -> str:
        names = getattr(config, "_fields", None)
        return " ".join(f"{n}={v}" for n, v in zip(names, values, strict=True)) if names else str(tuple(values))

    as_config = type(config)._make if hasattr(config, "_fields") else tuple
    times = {shown(config): ms(config), **{shown(c): ms(as_config(c)) for c in good}}
    first, again = times[shown(config)], ms(config)  # differences below theirs are noise
    now = times[shown(config)] = min(times[shown(config)], again)
    best = min(times, key=times.get)
    return {
        "kernel": name,
        "case": reason,
        "current": shown(config),
        "current_ms": now,
        "noise": abs(again / first - 1),
        "best": best,
        "best_ms": times[best],
        "gain": now / times[best],
        "times_ms": times,
    }


def work(kernel: str | None) -> list[tuple]:
    """(spec, case) of every production case, first every kernel's first one; off the GPU, of one small case each."""
    chosen = []
    for spec in specs():
        cases = [c for c in spec.cases if c.production] if ON_GPU else [c for c in spec.cases if "primes" in c.reason]
        cases = cases if ON_GPU else (cases or [*spec.cases])[:1]
        chosen += [(at, spec.name, case.reason) for at, case in enumerate(cases) if kernel in (None, spec.name)]
    return [item for _, *item in sorted(chosen, key=lambda item: item[0])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", choices=[spec.name for spec in specs()])
    parser.add_argument("--seconds", type=float, default=150, help="stop timing after that long")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--most", type=int, help="candidates of a case")
    parser.add_argument("--out", help="where the JSON goes")
    args = parser.parse_args()
    if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("needs a GPU; TRITON_INTERPRET=1 only tries the code, on a CPU")
    started = time.monotonic()
    found = {**provenance(DEVICE), "rows": [], "left_out": {}, "not_reached": []}
    items, ready = work(args.kernel), {}
    deadline = time.time() + 0.65 * args.seconds
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {", ".join(item): pool.submit(compile_candidates, *item, args.most, deadline) for item in items}
        for label, future in futures.items():
            try:
                ready[label], found["left_out"][label] = future.result()
            except Exception as problem:
                found["not_reached"].append(f"{label}: {type(problem).__name__}: {problem}"[:200])
    for item in items:
        label = ", ".join(item)
        if not ready.get(label):
            continue
        if time.monotonic() - started > args.seconds:
            found["not_reached"].append(label)
            continue
        row = time_candidates(*item, ready[label])
        found["rows"].append(row)
        write_json(args.out, found)
        gain = f"{row['gain']:.2f}x by {row['best']}" if row["best"] != row["current"] else "is best"
        print(f"{label}: {row['current']} {row['current_ms']:.4f} ms, {gain}", flush=True)
    if found["rows"]:
        write_json(args.out, found)
    for label in found["not_reached"]:
        print("not reached:", label)
    if not found["rows"]:
        print("nothing was measured", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
