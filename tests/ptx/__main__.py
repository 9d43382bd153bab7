"""Runs kernels' cases on their PTX, without a GPU, and says what is wrong with them.

    python -m tests.ptx                        every case of every kernel but production, for sm_80 and sm_90
    python -m tests.ptx CASE ...               those whose "kernel | case" contains one of these
    --production                               production cases instead, of fewer windows, sequences or rows
    --target sm_90                             for this target alone
    --suite                                    what the test suite runs: SUITE of cases.py for sm_90, and the mutants

Exit code 1 if anything is found. What it cannot see: the docstring of the package.
"""

import argparse
import sys
import time

from .cases import MUTANTS, SUITE, check, function, mutated, no_barrier_before_atomics, pairs, torn_pairs


def run(chosen, targets) -> int:
    wrong = 0
    for target in targets:
        for spec, case in chosen:
            started = time.process_time()
            problems, report = check(spec, case, target)
            wrong += bool(problems)
            seconds = time.process_time() - started
            print(f"{target}  {spec.name} | {case.reason}: {report.launches} launches, {seconds:.1f} s", flush=True)
            for each in problems:
                print(f"    {each}")
            for each in report.soft:
                print(f"    ({each})")
    return wrong


def run_mutants() -> int:
    missed = 0
    for module, name, old, new, wanted in MUTANTS:
        with mutated(function(module, name), old, new):
            problems = check(*pairs(wanted)[0], "sm_90")[0]
        print(f"mutant of {name}: {problems[0] if problems else 'NOT FOUND'}", flush=True)
        missed += not problems
    with no_barrier_before_atomics():
        problems = check(*pairs("int6_matmul | split")[0], "sm_90")[0]
    print(f"mutant without a barrier before an atomic: {problems[0] if problems else 'NOT FOUND'}", flush=True)
    missed += not problems
    torn, as_launched = torn_pairs(block=32, fusion=True), torn_pairs()
    print(f"lbfgs_push at its threshold: {as_launched} pairs torn; fused, an element a lane: {torn or 'NOT FOUND'}")
    return missed + (not torn) + as_launched


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--target", choices=("sm_80", "sm_90"))
    parser.add_argument("--production", action="store_true")
    parser.add_argument("--suite", action="store_true")
    args = parser.parse_args()
    if args.suite:
        chosen = [pair for pair in pairs() if pair[1].reason in SUITE.get(pair[0].name, ())]
        return 1 if run(chosen, ["sm_90"]) + run_mutants() else 0
    chosen = pairs(*args.cases, production=args.production)
    if not chosen:
        parser.error(f"no case contains {' or '.join(map(repr, args.cases))}")
    return 1 if run(chosen, [args.target] if args.target else ["sm_80", "sm_90"]) else 0


if __name__ == "__main__":
    sys.exit(main())
