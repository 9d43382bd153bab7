"""slotfast train: train a model and write its int6 artifact."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .__main__ import main
    from .inputs import train_tokenizer
    from .trainer import Trainer

__all__ = ["Trainer", "main", "train_tokenizer"]
__getattr__, __dir__ = exports(
    __name__, {".__main__": ["main"], ".inputs": ["train_tokenizer"], ".trainer": ["Trainer"]}
)
