"""The command: a stored model and held-out text to the same model, calibrated."""

import sys

from .. import config
from ..artifact import read_artifact, write_artifact
from ..data import Text, Tokenizer, TokenStream, read_documents
from ..errors import InputError
from ..eval.inputs import check_tokenizer
from ..overlap import MAX_OVERLAP, seen
from ..words import counted
from .fit import calibrate, calibrated, summary

_FEWEST_TOKENS = 1000


def run(settings: config.CalibrateSettings) -> None:
    """Calibrate a stored model and write it; raises InputError on bad input."""
    for name in ("artifact", "tokenizer", "text", "out"):
        if getattr(settings, name) is None:
            raise InputError(f"--{name}: needed")
    config.check_outputs(settings)
    artifact, tokenizer = read_artifact(settings.artifact), Tokenizer(settings.tokenizer)
    check_tokenizer(tokenizer, artifact)
    ids, _ = tokenizer.encode_documents(read_documents(settings.text), settings.max_tokens)
    documents = int((ids == tokenizer.bos_id).sum())
    if documents < 2 or len(ids) < _FEWEST_TOKENS:
        raise InputError(
            f"{settings.text}: {counted(documents, 'document')}, {counted(len(ids), 'token')}; calibration needs 2 and "
            f"{_FEWEST_TOKENS:,}"
        )
    stream = TokenStream([ids])
    if (share := seen(stream, artifact.metadata).get("training", 0.0)) > MAX_OVERLAP:
        print(
            f"warning: the text shares about {share:.1%} with the one that the model was trained on",
            file=sys.stderr,
        )
    text = Text(stream, tokenizer.byte_table, tokenizer.bos_id)
    found = calibrate(artifact.model(), text, artifact.unigram)
    print(summary(found), flush=True)
    size = write_artifact(settings.out, calibrated(artifact, found, stream))
    print(f"{settings.out}: {size:,} bytes")
