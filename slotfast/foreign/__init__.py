"""Models of other projects behind our own models' interface: a factory's torch module, or a Hugging Face folder.

The evaluation asks a model for `hidden(tokens, dtype)` and `head(hidden)`. A module that has `hidden(tokens)` and
`head(hidden)` apart keeps them; of one that only maps tokens to logits, the logits are the hidden states and the head
does nothing. A module with `stream(tokens, state)`, and one of a Hugging Face folder, can be forwarded as a stream.
Before anything is scored, a few tokens go through the model: it must give finite logits of one vocabulary, and a
changed token must leave the logits before it as they were.
"""

from .calibration import StoredCalibration, read_calibration, with_calibration
from .models import ForeignConfig, ForeignModel, LanguageModel, read_foreign
from .tokenizers import HuggingFaceTokenizer

__all__ = [
    "ForeignConfig",
    "ForeignModel",
    "HuggingFaceTokenizer",
    "LanguageModel",
    "StoredCalibration",
    "read_calibration",
    "read_foreign",
    "with_calibration",
]
