"""The model in this package and its tokenizer."""

from importlib import resources
from pathlib import Path

FOLDER = Path(str(resources.files("slotfast") / "demo"))
MODEL = FOLDER / "demo.slotfast"
TOKENIZER = FOLDER / "demo.model"
