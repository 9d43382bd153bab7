"""The package as it is installed: what a wheel holds, and that it works from anywhere."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(what, checkout, target):
    """Build without a network. The checkout stays off the path, as with pip: setuptools loads plugins of all that is
    installed, the public kernels library's among them, and a folder here has its name."""
    code = f"from setuptools import build_meta; import sys; build_meta.build_{what}(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code, str(target)]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="building a wheel without a network needs setuptools here")
    folder = tmp_path_factory.mktemp("wheel")
    build("wheel", ROOT, folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """What a source distribution unpacks to: of a copy, as building it writes into the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    left = shutil.ignore_patterns(".git", "results", "build", "dist", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=left)
    build("sdist", folder / "checkout", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_a_source_distribution_holds_what_makes_the_wheel_and_nothing_else(sdist):
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    others = {name for name in files if not name.startswith(("slotfast/", "slotfast.egg-info/"))}
    assert others == set("LICENSE MANIFEST.in PKG-INFO README.md pyproject.toml setup.cfg setup.py".split())
    assert not any(path.is_symlink() for path in sdist.rglob("*"))  # other systems have none


def test_a_source_distribution_makes_the_same_wheel(sdist, wheel, tmp_path):
    """Whatever an earlier build has left there."""
    (sdist / "build" / "lib" / "slotfast").mkdir(parents=True)
    (sdist / "build" / "lib" / "slotfast" / "gone.py").touch()
    build("wheel", sdist, tmp_path)
    (path,) = tmp_path.glob("*.whl")
    mine, theirs = (
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
        for archive in (zipfile.ZipFile(path), zipfile.ZipFile(wheel))
    )
    assert mine.keys() == theirs.keys()
    assert mine == theirs
    (license,) = (name for name in mine if name.endswith("/LICENSE"))
    assert mine[license] == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_holds_kernels_under_our_name_and_the_demo(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"slotfast/kernels/spec.py", "slotfast/eval/__main__.py", "slotfast/demo/demo.slotfast"} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    expected = {f"slotfast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.startswith("slotfast/kernels/") and name.endswith(".py")} == expected


def test_the_wheel_installs_the_command_and_what_goes_with_the_code(wheel):
    archive = zipfile.ZipFile(wheel)
    schemas = {f"slotfast/{name}.schema.json" for name in ("eval/result", "audit/result", "record")}
    assert {"slotfast/py.typed", *schemas} <= set(archive.namelist())
    (points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert archive.read(points).decode().split() == ["[console_scripts]", "slotfast", "=", "slotfast.__main__:main"]
    assert callable(importlib.import_module("slotfast.__main__").main)


def test_what_the_wheel_holds_runs_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, "-m", "slotfast.eval", "--max-tokens", "700", "--preset", "none", "causal"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "causal" in done.stdout


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A checkout named slotfast, and folders of packages with it as editable and as a copy."""
    root = tmp_path_factory.mktemp("installed")
    clone = root / "slotfast"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(".git", "results", "build", "*.egg-info"))
    build("editable", clone, root)
    (editable,) = root.glob("*.whl")
    for name, path in (("editable", editable), ("plain", wheel)):
        zipfile.ZipFile(path).extractall(root / name)
    (root / "elsewhere").mkdir()
    return root


@pytest.mark.parametrize("how", ["editable", "plain"])
@pytest.mark.parametrize("where", ["slotfast", ".", "elsewhere"])
def test_an_installed_checkout_is_imported_from_any_folder(installed, how, where):
    code = "import site, sys, importlib.util as u; site.addsitedir(sys.argv[1]); print(u.find_spec('slotfast').origin)"
    command = [sys.executable, "-S", "-c", code, str(installed / how)]
    done = subprocess.run(command, cwd=installed / where, env={}, capture_output=True, text=True, check=True)
    checkout = where == "slotfast" or how == "editable"
    expected = (installed / "slotfast" if checkout else installed / how) / "slotfast" / "__init__.py"
    assert Path(installed / where, done.stdout.strip()).resolve() == expected.resolve()


def test_the_demo_stays_small():
    demo = ROOT / "slotfast" / "demo"
    assert sum(path.stat().st_size for path in demo.iterdir()) < 1_500_000


def test_the_symbolic_link_is_relative():
    link = ROOT / "slotfast" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
