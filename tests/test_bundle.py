"""Kernels taken along: one file that computes what the package computes, where nothing of it is; and a hub folder."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slotfast
from slotfast import kernels
from slotfast.bundle import inline, self_extracting, write_hub
from slotfast.bundle.__main__ import main
from slotfast.bundle.source import Folder
from slotfast.contest import CAP_BYTES
from slotfast.errors import InputError

PUBLIC = {name: getattr(kernels, name) for name in kernels.__all__}


@pytest.fixture(scope="module")
def folder():
    return Folder()


def _script(tmp_path, text):
    path = tmp_path / "train_gpt.py"
    path.write_text(text, encoding="utf-8")
    return path


def run_alone(tmp_path, text, *arguments, interpret="1"):
    """Runs a script in an empty folder, with torch's packages to import and nothing that was installed as editable."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train_gpt.py").write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(torch.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-S", "-P", "train_gpt.py", *map(str, arguments)]  # -S: no .pth files are read
    done = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [path.name for path in alone.iterdir() if path.suffix != ".pt"] == ["train_gpt.py"]
    return done.stdout


def _drawn():
    """For each kernel the smallest case that gives something to compute: name and arguments."""
    for spec in kernels.specs():
        drawn = []
        for case in spec.cases:
            if case.production or case.dtype == torch.bfloat16:  # the interpreter truncates to bf16
                continue
            arguments = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
            drawn += [(sum(sizes), len(drawn), arguments)] if all(sizes) else []
        for _, _, arguments in sorted(drawn, key=lambda each: each[:2])[:1]:
            yield spec.fn.__name__, arguments


# Named tuples of the package cannot be loaded where there is no package: they travel as (name of the class, fields).
def _plain(value):
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["named", type(value).__name__, [_plain(each) for each in value]]
    return value


EVERYTHING = """
import sys, torch
from kernels import (  # names
    {names},
)
from kernels import History, PackedInt6
def named(value):
    return globals()[value[1]](*map(named, value[2])) if isinstance(value, list) and value[:1] == ["named"] else value
def tensors(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
if __name__ == "__main__":
    results = []
    for name, arguments in torch.load(sys.argv[1]):
        results.append(tensors(globals()[name](**{{key: named(value) for key, value in arguments.items()}})))
    torch.save(results, "results.pt")
    ours = {{module.partition(".")[0] for module in sys.modules}} & {{"slotfast", "kernels", "pydantic"}}
    assert not ours, ours
"""


def test_every_kernel_alone_computes_what_the_package_computes(tmp_path):
    pytest.importorskip("triton", reason="interpreter launches need triton")
    if torch.cuda.is_available():
        pytest.skip("the package compiles its kernels here, the script interprets them")
    calls = list(_drawn())
    plain = [(name, {key: _plain(value) for key, value in given.items()}) for name, given in calls]
    torch.save(plain, tmp_path / "calls.pt")
    script = EVERYTHING.format(names=",\n    ".join(sorted({name for name, _ in calls})))
    run_alone(tmp_path, self_extracting(inline(_script(tmp_path, script))), tmp_path / "calls.pt")
    results = torch.load(tmp_path / "alone" / "results.pt")
    assert len(results) == len(calls) > 7
    for (name, arguments), got in zip(calls, results, strict=True):
        expected = [
            t for t in torch.utils._pytree.tree_leaves(PUBLIC[name](**arguments)) if isinstance(t, torch.Tensor)
        ]
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


CLASHES = '''#!/usr/bin/env python
"""A script whose names are also the kernels' names."""
from __future__ import annotations
import torch, triton
import torch.nn.functional as F
tl = History = "theirs"
def _config(*arguments): return "theirs"
class _Tile: pass
from slotfast.kernels import bias_cross_entropy as nats; from kernels.cross_entropy import bias_cross_entropy_ref
try:
    from kernels import (slot_solve,  # a comment
                         int6_matmul)
except ImportError:
    slot_solve = None
def fit(logits, targets):
    from kernels import slot_solve_mm
    return slot_solve_mm(logits, targets, ridge=1.0)
if __name__ == "__main__":
    logits, targets = torch.linspace(-3, 3, 2 * 9 * 33).sin().view(2, 9, 33), torch.arange(18).view(2, 9)
    got, expected = nats(logits, targets)[0], bias_cross_entropy_ref(logits, targets)[0]
    torch.testing.assert_close(got, expected)
    ours = slot_solve(logits, targets, ridge=1.0).bias
    torch.testing.assert_close(ours, fit(logits, targets).bias, rtol=0, atol=0.01)
    assert callable(int6_matmul) and tl == History == _config() == "theirs" and _Tile.__doc__ is None
    torch.save(got, "results.pt")
'''


@pytest.mark.parametrize(
    ("form", "future"),
    [(self_extracting, True), (str, False)],
    ids=["self-extracting, postponed annotations", "plain"],
)
def test_names_of_the_script_stay_its_own(tmp_path, folder, form, future):
    pytest.importorskip("triton", reason="interpreter launches need triton")
    script = CLASHES if future else CLASHES.replace("from __future__ import annotations\n", "")
    text = inline(_script(tmp_path, script), ["lbfgs"], folder)
    assert text.startswith(script[: script.index("import torch")]) and ast.get_docstring(ast.parse(text))
    run_alone(tmp_path, form(text))
    if not torch.cuda.is_available():
        logits, targets = torch.linspace(-3, 3, 2 * 9 * 33).sin().view(2, 9, 33), torch.arange(18).view(2, 9)
        nll, _ = kernels.bias_cross_entropy(logits, targets)
        assert torch.equal(torch.load(tmp_path / "alone" / "results.pt"), nll)


# The compiler reads a kernel's source too, where the self-extracting form has it in no file.
COMPILES = """
import dataclasses, os, runpy, sys
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what lies in a cache shows nothing
theirs = runpy.run_path(sys.argv[1])
from bench.compile import compile_for
from slotfast.kernels import specs
(spec,) = (spec for spec in specs() if spec.name == "bias_cross_entropy")
compilation = spec.compilations(**next(case.shape for case in spec.cases if case.production))[0]
kernel = theirs[compilation.kernel.fn.__name__]
assert kernel is not compilation.kernel and theirs["tl"] is None
def instructions(kernel):
    lines = compile_for(dataclasses.replace(compilation, kernel=kernel)).asm["ptx"].splitlines()
    return [line for line in lines if line.startswith("\\t") and not line.startswith(("\\t.", "\\t//"))]
assert len(instructions(kernel)) > 100
print("the same", instructions(kernel) == instructions(compilation.kernel))
"""


@pytest.mark.parametrize("future", ["from __future__ import annotations\n", ""], ids=["postponed annotations", "plain"])
def test_the_self_extracting_form_compiles_to_the_same_instructions(tmp_path, compiling, folder, future):
    script = future + "tl = None\nfrom kernels import bias_cross_entropy\n"
    packed = tmp_path / "packed.py"
    packed.write_text(self_extracting(inline(_script(tmp_path, script), (), folder)))
    assert compiling("-c", COMPILES, packed).split() == ["the", "same", "True"]


def test_what_is_taken_along(tmp_path, folder):
    text = inline(_script(tmp_path, "from kernels import bias_cross_entropy\n"))
    assert "_ref(" not in text and "KernelSpec" not in text and "#" not in text
    assert not any(ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    whole = inline(_script(tmp_path, "print(1)\n"), ["solver", "int6", "int6_product"])
    defined = {node.name for node in ast.parse(whole).body if isinstance(node, ast.FunctionDef)}
    assert {"slot_solve", "slot_solve_mm", "int6_matmul", "pack_int6"} <= defined
    assert "slot_solve_ref" not in defined and "bias_cross_entropy" not in defined
    assert whole.endswith("\nprint(1)\n")
    source = sum(path.stat().st_size for path in folder.files.values())
    everything = inline(
        _script(tmp_path, "print(1)\n"), ["cross_entropy", "cross_entropy_grad", "int6_product", "lbfgs"]
    )
    assert len(self_extracting(everything)) < 0.15 * source
    assert len(self_extracting(text)) < 0.5 * len(text)


def test_an_import_of_the_public_library_stays(tmp_path):
    text = inline(_script(tmp_path, "from kernels import get_kernel\nfrom kernels import slot_solve\n"))
    assert "\nfrom kernels import get_kernel\npass\n" in text


def test_kernel_files_fit_in_one_namespace(tmp_path, folder):
    """Each function of the text finds every name that it looks up, for one file and for all of them."""
    import builtins
    import symtable

    from slotfast.bundle.source import inner_scopes

    run = (name for name in folder.public.values() if not name.name.endswith("_ref"))
    files = sorted({name.module.partition(".")[0] for name in run} - {"spec"})
    for chosen in (files, *([file] for file in files)):
        table = symtable.symtable(inline(_script(tmp_path, "print(1)\n"), chosen, folder), "", "exec")
        bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        looked_up = {s.get_name() for scope in inner_scopes(table) for s in scope.get_symbols() if s.is_global()}
        assert looked_up <= bound | set(dir(builtins)), chosen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", "train_gpt.py, line 2: not Python: invalid syntax$"),
        ("try:\n    from kernels import slot_solve\n", "line 2: not Python: expected 'except' or 'finally' block$"),
        ("print(1)\n", "imports nothing from kernels; --kernels says"),
        ("import kernels\n", "line 1: import kernels: expected from kernels import NAME"),
        ("import torch\nimport slotfast.kernels as k\n", "line 2: .*: expected from kernels import NAME"),
        ("from slotfast import adapt\n", "expected from kernels import NAME"),
        ("from kernels import *\n", r"import \*: expected from kernels import NAME"),
        ("from kernels import bias_crossentropy\n", "no 'bias_crossentropy' in kernels; the nearest is 'bias_cross_en"),
        ("from kernels import slot_solve, get_kernel\n", "there is no 'get_kernel' in kernels"),
        ("from kernels import specs\n", "specs describe the kernels folder"),
        ("constexpr = 1\nfrom kernels import slot_solve\n", "'constexpr': the script gives this name"),
        ("from . import model\n", "one file cannot take along what lies beside it"),
        ("import beside.deep\n", "one file cannot take along what lies beside it"),
    ],
)
def test_scripts_that_cannot_be_one_file(tmp_path, text, message):
    (tmp_path / "beside.py").touch()
    with pytest.raises(InputError, match=message) as caught:
        inline(_script(tmp_path, text))
    assert "\n" not in str(caught.value)


IMPORTS = """
try:
    from {package} import bias_cross_entropy_ref as nats
    from {package}.int6 import pack_int6
except ImportError:
    nats = None
"""


@pytest.mark.parametrize(("dots", "place"), [("", "kernels"), ("", "yours/fast"), (".", "fast")])
def test_a_copy_of_the_folder_beside_the_script_is_taken_along_as_it_is(tmp_path, dots, place):
    copy = tmp_path / place
    shutil.copytree(Folder().root, copy, ignore=shutil.ignore_patterns("__pycache__"))
    own = (copy / "int6.py").read_text("utf-8") + "\n\n_OWN = 'changed here'\n\n\ndef changed():\n    return _OWN\n"
    (copy / "int6.py").write_text(own, "utf-8")
    (tmp_path / "beside.py").touch()
    package = dots + place.replace("/", ".")
    script = _script(tmp_path, IMPORTS.format(package=package) + f"from {package}.int6 import changed\n")
    text = inline(script)
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert "changed here" in text and not any(node.level or node.module.startswith(package) for node in imported)
    with pytest.raises(InputError, match="cannot take along what lies beside it"):
        inline(_script(tmp_path, f"from {package} import pack_int6\nimport beside\n"))
    (copy / "int6.py").write_text("def f(:\n", "utf-8")
    with pytest.raises(InputError, match=r"int6.py, line 1: not Python"):
        inline(script)


def test_the_fit_of_the_kernels_readme_is_taken_along_and_is_ours(tmp_path):
    pytest.importorskip("triton", reason="interpreter launches need triton")
    readme = (Folder().root / "README.md").read_text("utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "slot_solve(" in block)
    shutil.copytree(Folder().root, tmp_path / "yours" / "fast", ignore=shutil.ignore_patterns("__pycache__"))
    text = inline(_script(tmp_path, example))
    assert "def slot_solve(" in text and "from yours" not in text and "slotfast.bundle --script" in readme
    names = {}
    exec(example.replace("yours.fast", "slotfast.kernels"), names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(24, device=device).view(2, 12)
    adapted = names["adapted_logits"](logits, targets, stride=4)
    nll = torch.nn.functional.cross_entropy(adapted.transpose(1, 2), targets[:, 8:], reduction="none")
    # the windows have no tokens in common: a call for each
    ours = [slotfast.adapt(logits[i : i + 1], targets[i : i + 1], 8, preset="causal-lbfgs").nll[0, 8:] for i in (0, 1)]
    torch.testing.assert_close(nll, torch.stack(ours).to(nll), rtol=1e-3, atol=1e-3)


def test_the_command_counts_every_byte(tmp_path, capsys):
    script, out, model = _script(tmp_path, "from kernels import slot_solve\n"), tmp_path / "one.py", tmp_path / "m"
    arguments = ["--script", str(script), "--out", str(out), "--artifact", str(model), "--compress"]
    model.write_bytes(b"x")
    main(arguments)
    code = out.stat().st_size
    assert re.findall(r"[\d,]+ bytes of code", capsys.readouterr().out) == [f"{code:,} bytes of code"]
    os.truncate(model, CAP_BYTES - code)
    main(arguments)
    assert f"together {CAP_BYTES:,}, 0 below the cap" in capsys.readouterr().out
    out.unlink()
    os.truncate(model, CAP_BYTES - code + 1)
    with pytest.raises(InputError, match="16,000,001 bytes of code and model, 1 above the cap: nothing is written"):
        main(arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--script or --hub: give one of them"),
        (["--script", "no.py", "--out", "x.py"], "no.py: cannot be read: No such file"),
        (["--script", "train_gpt.py"], "--out: needed with --script"),
        (["--script", "train_gpt.py", "--out", "./train_gpt.py"], "--script and --out: both are ./train_gpt.py"),
        (["--script", "train_gpt.py", "--out", "x.py", "--kernels", "solverr"], "the nearest is 'solver'"),
        (["--script", "train_gpt.py", "--out", "x.py", "--artifact", "no"], "no: cannot be read: No such file"),
        (["--hub", "hub", "--kernels", "zzz"], "kernel 'zzz': no such file; expected one of attention"),
        (["--hub", "hub", "--name", "Upper_Case"], "--name 'Upper_Case': expected the form "),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, monkeypatch, arguments, message):
    _script(tmp_path, "from kernels import slot_solve\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == {"train_gpt.py"}


HUB = """
import sys
from pathlib import Path
import kernels, torch
from kernels import get_local_kernel
assert hasattr(kernels, "__version__") and not hasattr(kernels, "specs"), kernels.__file__
whole, part = (get_local_kernel(Path(name), backend="cpu") for name in ("whole", "part"))
assert part.__all__ and set(part.__all__) < set(whole.__all__) and "int6_matmul" not in part.__all__
assert whole.slot_solve is not part.slot_solve and "slotfast" not in sys.modules
assert get_local_kernel(Path("whole")).__all__ == whole.__all__  # the variant that torch was built for
cuda = get_local_kernel(Path("whole") / "build" / "torch-cuda")
assert cuda.__all__ == whole.__all__ and cuda is not whole
found = {Path(each.module.__file__).parent.name: each.metadata for each in kernels.get_loaded_kernels()}
assert {str(each.backend.backend_type) for each in found.values()} == {"cpu", "cuda"}, found
ran = set()
for module in (whole, part):
    for spec in module.specs():
        case = next(case for case in spec.cases if not case.production and case.dtype == torch.float32)
        arguments = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
        torch.utils._pytree.tree_map(torch.testing.assert_close, spec.fn(**arguments), spec.reference(**arguments))
        ran.add(spec.name)
print("ran", *sorted(ran))
"""


def test_the_public_kernels_library_loads_the_hub_folder(tmp_path):
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the public kernels library is not installed")
    pytest.importorskip("triton", reason="interpreter launches need triton")
    written = write_hub(tmp_path / "whole", "slotfast-kernels")
    assert written == [tmp_path / "whole" / "build" / f"torch-{backend}" for backend in ("cuda", "cpu")]
    write_hub(tmp_path / "part", "slotfast-slot-solve", ["solver"])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", HUB],
        cwd=tmp_path,
        env=environment | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"kernels {version}: {done.stderr[-4000:]}"
    assert done.stdout.split()[1:] == sorted(spec.name for spec in kernels.specs())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_no_half_of_a_hub_folder_stays(tmp_path, monkeypatch, error):
    def fail(variant, name, backend):
        if backend == "cpu":
            raise error

    with monkeypatch.context() as patched, pytest.raises((InputError, KeyboardInterrupt)):
        patched.setattr("slotfast.bundle.hub._write_metadata", fail)
        write_hub(tmp_path, "slotfast-kernels")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_hub(tmp_path, "slotfast-kernels")


def test_a_hub_folder_is_not_written_twice(tmp_path):
    write_hub(tmp_path, "slotfast-kernels")
    with pytest.raises(InputError, match="torch-cuda: is there already"):
        write_hub(tmp_path, "slotfast-kernels")
    shutil.rmtree(tmp_path / "build" / "torch-cuda")
    with pytest.raises(InputError, match="torch-cpu: is there already"):
        write_hub(tmp_path, "slotfast-kernels")
    assert not (tmp_path / "build" / "torch-cuda").exists()


def test_variants_have_the_same_code_and_metadata_of_their_own(tmp_path):
    folders = write_hub(tmp_path, "slotfast-kernels", ["solver"])
    metadata = [json.loads((folder / "metadata.json").read_text()) for folder in folders]
    assert [each.pop("backend") for each in metadata] == [{"type": "cuda"}, {"type": "cpu"}]
    cuda, cpu = (each.pop("id") for each in metadata)
    assert cuda.replace("_cuda_", "_cpu_") == cpu != cuda and metadata[0] == metadata[1]
    code = [{path.relative_to(f): path.read_bytes() for path in f.rglob("*.py")} for f in folders]
    assert code[0] == code[1] and len(code[0]) > 3
