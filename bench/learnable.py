"""What learning gains with a model that was trained on for it, beside one that was trained on as long without.

    python -m bench.learnable --artifact m.slotfast --tokenizer m.model --text train.jsonl.xz --val val.jsonl.xz \
        --how reptile --seconds 1500 --out learnable.jsonl

`reptile` (arXiv 1803.02999): learning runs over a training document from the model's weights on, and the weights move a
share of the way to where it ended; `plain`: they move that share behind every chunk, so that nothing is ever learned
from a document before the next chunk is; `none`: the model as it is. The share rises over the first minute and falls
to nothing by the end. Then the rows are charged on the validation text, which no training sees. A line a run.

    python -m bench.learnable --model FOLDER --calibration its.json --seq-len 1024 --sinks 4 --val val.jsonl.xz \
        --row learn --out learnable.jsonl

charges a Hugging Face model as it is; `python -m bench.finetune` trains one on.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slotfast.data import Tokenizer, read_documents
from slotfast.errors import InputError
from slotfast.eval.inputs import Inputs, Sources, read_inputs
from slotfast.eval.learning import LearningPass, grouped
from slotfast.foreign.models import LanguageModel, language_model
from slotfast.learn import Learning, LearningLoop, OnTop, make_loop, parse_row
from slotfast.model import GPT
from slotfast.slot import Calibration

from .common import append_json, provenance

_LONGEST = 6000  # tokens of a document that are trained on: longer ones would be few steps of the share
_INNER = "learn:what=all,lr=4e-4,betas=0+0.999,eps=1e-5,chunk=64"
_ROW = "learn:what=all,lr=2e-4,betas=0+0.999,eps=1e-5,chunk=32,forget=0.9"


def main() -> None:
    """Train a model on, charge the rows, print and append a line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", help="as of slotfast eval")
    parser.add_argument("--tokenizer", help="as of slotfast eval")
    parser.add_argument("--model", help="as of slotfast eval; --how trains artifacts alone")
    parser.add_argument("--calibration", help="as of slotfast eval")
    parser.add_argument("--seq-len", type=int, help="as of slotfast eval")
    parser.add_argument("--sinks", type=int, default=0, help="as of slotfast eval")
    parser.add_argument("--max-tokens", type=int, help="as of slotfast eval")
    parser.add_argument("--text", help="documents to train on, with --how")
    parser.add_argument("--val", required=True, help="documents to charge")
    parser.add_argument("--how", choices=("reptile", "plain", "none"), default="none")
    parser.add_argument("--seconds", type=float, default=1500.0, help="of training")
    parser.add_argument("--share", type=float, default=0.5, help="of the way that the weights move")
    parser.add_argument("--inner", default=_INNER, help="row that learns while it is trained")
    parser.add_argument("--row", default=_ROW, help="row that is charged, alone and below counts")
    parser.add_argument("--out", required=True, help="file of a line a run; it is appended to")
    options = parser.parse_args()
    try:
        run(options)
    except InputError as error:
        sys.exit(f"learnable: {error}")


def run(options: argparse.Namespace) -> None:
    """Train, charge, print and append; raises InputError on bad input."""
    given = ("artifact", "tokenizer", "model", "calibration", "seq_len", "max_tokens")
    inputs = read_inputs(Sources(text=options.val, **{name: getattr(options, name) for name in given}))
    model, trained = language_model(inputs.artifact.model())[0], {}
    if options.how != "none":
        if options.model or not options.text:
            raise InputError(f"--how {options.how}: takes --artifact and --text")
        documents = list(read_documents(options.text))
        trained = train(model, inputs.tokenizer, documents, parse_row(options.inner), options)
    elif options.model and (made := Path(options.model, "finetune.json")).exists():
        trained = {"finetune": json.loads(made.read_text())}
    where = (options.seq_len or inputs.artifact.config.seq_len, options.sinks)
    line = {"how": options.how, **trained, **charge(model, inputs, options.row, *where)}
    print(line, flush=True)
    append_json(options.out, line | provenance("cpu"))


def train(
    model: GPT, tokenizer: Tokenizer, documents: list[str], row: Learning, options: argparse.Namespace
) -> dict[str, Any]:
    """Move a model's weights, document by document in a random order, for some seconds; what was done."""
    begun, window, seen, count = time.monotonic(), model.config.seq_len, 0, 0
    order = np.random.default_rng(0).permutation(len(documents))
    memory = None
    while (at := time.monotonic() - begun) < options.seconds:
        ids = np.asarray(tokenizer.encode_documents([documents[order[count % len(order)]]])[0], np.int64)[:_LONGEST]
        count += 1
        if len(ids) < 2 * row.chunk:
            continue
        share = options.share * min(1.0, at / 60, 1 - at / options.seconds)
        loop = LearningLoop(model, row, window, bos_id=tokenizer.bos_id)
        if memory is not None:
            loop.load_state_dict({**loop.state_dict(), "optimizer": memory}, _nothing)

        def move(loop: LearningLoop = loop, share: float = share) -> None:
            with torch.no_grad():
                for weight, learned in zip(model.parameters(), loop.state_dict()["learned"], strict=True):
                    weight.lerp_(learned, share)
                    learned.copy_(weight)

        loop.run(lambda a, b, ids=ids: ids[a:b], len(ids) - 1, _nothing, move if options.how == "plain" else None)
        if options.how == "reptile":
            move()
        memory = loop.state_dict()["optimizer"]
        seen += len(ids) - 1
        if count % 100 == 0:
            print(f"{at:.0f} s, {count} documents, {seen} tokens", file=sys.stderr, flush=True)
    return {"inner": options.inner, "share": options.share, "trained_tokens": seen, "seconds": options.seconds}


def _nothing(*_: Any) -> None:
    """What is charged, or read, is not wanted."""


def charge(model: GPT | LanguageModel, inputs: Inputs, name: str, window: int, sinks: int) -> dict[str, Any]:
    """Bits per byte of a text unlearned, with counts, with learning, and with both; the last over the second paired."""
    text, calibration = inputs.text, Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    found: dict[str, Any] = {"row": name, "seq_len": window, "sinks": sinks}
    found |= {"documents": text.documents, "tokens": len(text.stream)}
    nats = {}
    for base, names in (("learn:steps=0", ("none", "causal")), (name, ("learn", "learn+causal"))):
        rows = grouped([parse_row(base), parse_row(f"{base}+causal")], calibration)[0]
        on_top = OnTop.of(rows, window, calibration, text.bos_id)
        loop = make_loop(model, rows[0], window, sinks, text.bos_id, on_top=on_top)
        meter = LearningPass(loop, rows, text).run().meter
        nats |= dict(zip(names, meter.nats[1:], strict=True))
    meter.nats = np.stack(list(nats.values()))
    found["bpb"] = {each: meter.score(number).bpb for number, each in enumerate(nats)}
    for over, under in (("none", "causal"), ("none", "learn"), ("causal", "learn+causal")):
        meter.nats = np.stack([nats[over], nats[under]])
        score = meter.score(1)
        found[f"{under} over {over}"] = {"gain_bpb": score.gain_bpb, "gain_se": score.gain_se}
    return found


if __name__ == "__main__":
    main()
