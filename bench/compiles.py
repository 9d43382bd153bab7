"""Compiles every launch of every kernel's cases for sm_90, without a GPU, with one version of Triton or with each.

    python -m bench.compiles                      the Triton that is installed
    python -m bench.compiles --triton 3.2.0 3.6.0 these versions, each fetched by pip into a folder of its own
    python -m bench.compiles --triton all         the newest of each minor version from 3.2 on
    --folder DIR                                  where the fetched versions stay; default: a temporary folder
    --check                                       not every case, but `bench.static_report --check`, with each version

The cases are those that the tests run in the interpreter, so every combination of arguments that a test covers, and the
production shapes. What does not compile is named; exit code 1 if there is anything. Versions run one after another:
about two minutes of one core each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from slotfast.kernels import Compilation, specs

from .compile import compile_for
from .launches import recorded

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")


def launches() -> list[tuple[str, Compilation]]:
    """Every different launch, with the name of the spec and case that makes it."""
    found: list[tuple[str, Compilation]] = []
    for spec in specs():
        for case in spec.cases:
            if case.production:
                made = spec.compilations(**case.shape)
            else:
                inputs = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
                for name in spec.differentiable:
                    if isinstance(inputs.get(name), torch.Tensor):
                        inputs[name].requires_grad_()
                with recorded() as made:
                    outputs = spec.fn(**inputs)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    followed = [output.sum() for output in outputs if output.requires_grad]
                    if followed:
                        sum(followed).backward()
            known = [compilation for _, compilation in found]
            found += [(f"{spec.name} | {case.reason}", each) for each in made if each not in known]
    return found


def compile_all() -> int:
    import triton

    made, failed = launches(), 0
    for name, compilation in made:
        try:
            compile_for(compilation)
        except Exception as error:  # whatever a compiler raises
            failed += 1
            print(f"{name} | {compilation.kernel.__name__}: {str(error).strip() or type(error).__name__}")
    print(f"Triton {triton.__version__}: {len(made) - failed} of {len(made)} launches compile", flush=True)
    return failed


def in_version(version: str, folder: Path, command: list[str]) -> int:
    """Exit code of a module of this package in a process whose Triton is of this version."""
    place = folder / version
    if not (place / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(place), str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", nargs="+", help="versions, or all", default=[])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check and not args.triton:
        parser.error("--check wants --triton; for the installed one there is bench.static_report --check")
    if not args.triton:
        return 1 if compile_all() else 0
    versions = VERSIONS if args.triton == ["all"] else args.triton
    with tempfile.TemporaryDirectory() as scratch:
        command = ["bench.static_report", "--check"] if args.check else ["bench.compiles"]
        codes = [in_version(version, (args.folder or Path(scratch)).resolve(), command) for version in versions]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
