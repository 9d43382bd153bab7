"""Installation: `pip install .`, or `pip install -e .[dev]` to work on it."""

import re
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "slotfast/__init__.py").read_text("utf-8"), re.M).group(1)
BUILD = tempfile.TemporaryDirectory()

setup(
    name="slotfast",
    version=VERSION,
    description="Test-time logit adaptation of small language models: fast Triton kernels, honest scores",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["slotfast*"]),
    # Makes an editable install a path on sys.path. The finder that setuptools writes otherwise comes after all paths,
    # where a checkout named slotfast, in the folder around it, has been taken for a package without __init__.py.
    package_dir={"": "."},
    # What an earlier build has left in ./build, modules that are gone among it, would be packed along.
    options={"build": {"build_base": BUILD.name}},
    package_data={
        "slotfast": ["demo/*", "py.typed", "*.json"],
        "slotfast.eval": ["*.json"],
        "slotfast.audit": ["*.json"],
        "slotfast.foreign": ["*.json"],
        "slotfast.kernels": ["README.md"],
    },
    entry_points={"console_scripts": ["slotfast = slotfast.__main__:main"]},
    install_requires=[
        "torch>=2.6,<2.16",
        "triton>=3.2; platform_system == 'Linux'",
        "numpy>=1.26",
        "sentencepiece>=0.2.0",
        "brotli>=1.2",
        # No wheels for Linux on ARM: without it rANS matrices are read slowly and not written.
        "constriction>=0.4,<0.6; platform_system != 'Linux' or platform_machine == 'x86_64'",
        "zstandard>=0.22",
        "pydantic>=2.7",
        "tqdm>=4.66",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "hf": ["transformers>=5.0"],
        "harness": ["lm_eval>=0.4.10"],
        "flash": ["flash-attn>=2.6"],
        "bench": ["pytest-benchmark>=5.0", "liger-kernel>=0.5"],
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "setuptools>=70.1",
            "pytest-benchmark>=5.0",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.13",
            "matplotlib>=3.8",
            # what other projects' models and tasks are tested with
            "transformers>=5.0",
            "accelerate>=1.0",
            "lm_eval>=0.4.10",
            "kernels>=0.17",
        ],
    },
)
