"""The kernels folder, copied into another project under another name, works there, with triton and without."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "kernels"
FILES = sorted(FOLDER.rglob("*.py"))

# Runs in a fresh process, isolated from this checkout: argv is the copy's name, then packages that must not be found.
PROLOGUE = """
import sys
name, *absent = sys.argv[1:]

class Absent:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, ".")

import importlib, torch
try:  # first, so that what it imports does not count as the folder's
    import triton.language, triton.runtime.interpreter
except ImportError:
    assert "triton" in absent
before = set(sys.modules)
kernels = importlib.import_module(name)
specs = kernels.specs()
new = {module.partition(".")[0] for module in set(sys.modules) - before}
assert specs, "no kernel found"
assert new <= {name, "torch", "triton"} | sys.stdlib_module_names, new
assert not set(absent) & {module.partition(".")[0] for module, found in sys.modules.items() if found}, "not isolated"

def cases(spec):
    "The three smallest cases that give something to compare, as (reason, keyword arguments)."
    drawn = []
    for case in spec.cases:
        if case.production or case.dtype == torch.bfloat16:  # the interpreter truncates to bf16
            continue
        arguments = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor)]
        drawn += [(sum(sizes), case.reason, arguments)] if all(sizes) else []  # an empty input launches nothing
    assert drawn, f"{spec.name}: nothing to run"
    return [each[1:] for each in sorted(drawn, key=lambda each: each[0])[:3]]

def tensors(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
"""

INTERPRETED = """
for spec in specs:
    for reason, arguments in cases(spec):
        got, expected = tensors(spec.fn(**arguments)), tensors(spec.reference(**arguments))
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected):
            near = 5e-3 if torch.float16 in (a.dtype, b.dtype) else 1e-4
            torch.testing.assert_close(a, b, rtol=near, atol=near, equal_nan=True, msg=f"{spec.name}: {reason}")
        print("ran", spec.name)
"""

WITHOUT_TRITON = """
for spec in specs:
    for reason, arguments in cases(spec):
        assert tensors(spec.reference(**arguments)), spec.name
        try:
            spec.fn(**arguments)
        except ImportError as error:
            assert "triton" in str(error)
        else:
            raise AssertionError(f"{spec.name}: {reason}: launched without triton")
        print("ran", spec.name)
"""

TWICE = """
import shutil
shutil.copytree(name, "second")
second = importlib.import_module("second")
assert {spec.name for spec in second.specs()} == {spec.name for spec in specs}
assert all(a.fn is not b.fn for a, b in zip(second.specs(), specs))
print("ran", *(spec.name for spec in specs))
"""


def run_copy(tmp_path, body, absent, **environment):
    """Runs `body` beside a copy called `borrowed`; returns the names of the kernels that it reports."""
    shutil.copytree(FOLDER, tmp_path / "borrowed", ignore=shutil.ignore_patterns("__pycache__"))
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROLOGUE + body, "borrowed", *absent],
        cwd=tmp_path,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {word for line in done.stdout.splitlines() if line.startswith("ran ") for word in line.split()[1:]}


def kernel_names():
    """Names of the kernels by reading the files: independent of what the copy finds."""
    return {
        keyword.value.value
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "KernelSpec"
        for keyword in node.keywords
        if keyword.arg == "name"
    }


def test_a_copy_runs_under_another_name(tmp_path):
    pytest.importorskip("triton", reason="interpreter launches need triton")
    assert run_copy(tmp_path, INTERPRETED, ["slotfast", "kernels"], TRITON_INTERPRET="1") == kernel_names() != set()


def test_without_triton_references_run_and_launches_say_why(tmp_path):
    assert run_copy(tmp_path, WITHOUT_TRITON, ["slotfast", "kernels", "triton"]) == kernel_names() != set()


def test_two_copies_do_not_collide(tmp_path):
    pytest.importorskip("triton", reason="with kernels, not stand-ins")
    assert run_copy(tmp_path, TWICE, ["slotfast", "kernels"]) == kernel_names() != set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_imports_torch_triton_and_itself_only(file):
    outside = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot is this folder; more would leave it.
            assert node.level <= len(file.relative_to(FOLDER).parts), f"line {node.lineno}"
            outside |= {node.module.partition(".")[0]} if node.level == 0 else set()
    assert outside <= {"torch", "triton"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_registers_nothing_and_tunes_nothing(file):
    """No operator library (a copy beside slotfast would collide), no autotuning, no settings of torch."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not dotted.startswith(("torch.library", "torch.backends", "torch.ops", "triton.autotune")), dotted
            assert dotted not in ("torch.set_default_dtype", "torch.set_float32_matmul_precision", "os.environ"), dotted


def test_readme_names_every_kernel_file():
    readme = (FOLDER / "README.md").read_text()
    for path in {FOLDER / file.relative_to(FOLDER).parts[0] for file in FILES}:
        if not path.name.startswith("_"):
            assert f"| `{path.name}{'/' * path.is_dir()}` |" in readme


def test_no_module_has_the_name_of_something_public():
    """`kernels.x` would be the module or the function, by the order of imports."""
    public = next(
        node.value for node in ast.parse((FOLDER / "__init__.py").read_text()).body if isinstance(node, ast.Assign)
    )
    assert not {file.relative_to(FOLDER).parts[0].removesuffix(".py") for file in FILES} & set(ast.literal_eval(public))


def test_every_reference_is_offered(tmp_path):
    body = "for spec in specs:\n    assert callable(getattr(kernels, spec.reference.__name__)), spec.name\n"
    assert run_copy(tmp_path, body + "    print('ran', spec.name)\n", ["slotfast", "kernels"]) == kernel_names()


ON_A_CPU = """
for spec in specs:
    for reason, arguments in cases(spec):
        try:
            spec.fn(**arguments)
        except ValueError as error:
            reference = spec.reference.__name__
            assert f"{reference.removesuffix('_ref')}: expected CUDA tensors, got tensors on cpu; " in str(error), error
            assert f"on a CPU call {reference}, or set TRITON_INTERPRET=1 before the first import" in str(error), error
            assert error.__suppress_context__ and "\\n" not in str(error)
        else:
            raise AssertionError(f"{spec.name}: {reason}: launched on a CPU")
        print("ran", spec.name)
"""


def test_cpu_tensors_are_refused_by_name(tmp_path):
    pytest.importorskip("triton", reason="with kernels, not stand-ins")
    assert run_copy(tmp_path, ON_A_CPU, ["slotfast", "kernels"]) == kernel_names() != set()


OLD_INTERPRETER = """
from borrowed._triton import _launch, triton
class Interpreted:
    def __getitem__(self, grid):
        def launch(**arguments):
            raise Exception("TypeError('only 0-dimensional arrays can be converted to Python scalars')")
        return launch
try:
    _launch(Interpreted(), (1,), "rate_scan", x_ptr=torch.zeros(1))
except RuntimeError as error:
    assert str(error) == (
        f"rate_scan: the interpreter of Triton {triton.__version__} does not work with numpy 2.4 or newer; "
        "install numpy < 2.4, or Triton 3.7 or newer"
    )
    print("ran", "it")
"""


def test_an_interpreter_that_numpy_breaks_says_so(tmp_path):
    pytest.importorskip("triton", reason="with kernels, not stand-ins")
    assert run_copy(tmp_path, OLD_INTERPRETER, ["slotfast", "kernels"]) == {"it"}
