"""python -m slotfast.train: train a model and write its int6 artifact."""

from .inputs import train_tokenizer
from .program import main
from .trainer import Trainer

__all__ = ["Trainer", "main", "train_tokenizer"]
