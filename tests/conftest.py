"""Chooses how kernels run before any test imports them: compiled where there is a GPU, interpreted where there is none."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, that is at import of a kernel module.
    os.environ.setdefault("TRITON_INTERPRET", "1")
