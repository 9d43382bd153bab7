"""What rows that learn gain on long documents: each against the same forward unlearned, paired token by token.

    python -m bench.bench_learn --model FOLDER --text FILE --rows learn learn:lr=1e-3 --out rows.jsonl

One stream of the text's long documents, each cut to the same number of tokens, through keys and values of the last
--seq-len tokens and of the stream's first --sinks, by whatever model `slotfast eval --model` takes, or the shipped one.
The file has a line a row; it is appended to, and rows that it holds already are not run again.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from slotfast.data import Text, Tokenizer, TokenStream, read_documents
from slotfast.errors import InputError
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.eval.learning import UNLEARNED, LearningPass, grouped
from slotfast.foreign.models import language_model
from slotfast.learn import FrozenLoop, OnTop, make_loop, parse_row
from slotfast.slot import Calibration

from .common import append_json, provenance

_BLOCK = 256  # of the unlearned forward


def main() -> None:
    """Run the rows, print and append a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="as of slotfast eval; the shipped model by default")
    parser.add_argument("--tokenizer", help="as of slotfast eval")
    parser.add_argument("--text", required=True, help="as of slotfast eval")
    parser.add_argument("--rows", nargs="+", default=["learn"], help="presets that learn, NAME:key=value,...")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--skip", type=int, default=0, help="long documents that are left out first")
    parser.add_argument("--every", type=int, default=1, help="take one long document of so many")
    parser.add_argument("--tokens", type=int, default=3072, help="of each document; shorter ones are left out")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens that one attends to")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=1, help="that learn apart, as on so many ranks; here in turn")
    parser.add_argument("--out", help="file of a line a row")
    options = parser.parse_args()
    try:
        run(options)
    except InputError as error:
        sys.exit(f"bench_learn: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure the rows that the file does not hold yet; raises InputError on bad input."""
    inputs = read_inputs(Sources(model=options.model, tokenizer=options.tokenizer, text=options.text, max_tokens=64))
    text = long_documents(inputs.tokenizer, options)
    model, _ = language_model(inputs.artifact.model())
    where = (options.seq_len, options.sinks)
    key = {
        "model": type(model.module).__name__ if options.model else "shipped",
        "text": Path(options.text).name,
        "sha256": text.stream.sha256(),
        "documents": text.documents,
        "tokens": options.tokens,
        "seq_len": options.seq_len,
        "sinks": options.sinks,
        "pieces": options.pieces,
    }
    lines = known(options.out, key)
    if None not in lines:
        frozen = LearningPass(FrozenLoop(model, *where, block=_BLOCK), [UNLEARNED], text).run()
        found = {"bpb": frozen.meter.score(1).bpb, "seconds": frozen.seconds["unlearned"], "block": _BLOCK}
        lines[None] = key | {"row": None} | found | {"nats": frozen.meter.nats[1].tolist()}
        put(options.out, lines[None])
    calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    missing = [parse_row(name).model_copy(update={"name": name}) for name in options.rows if name not in lines]
    for same in grouped(missing, calibration):
        on_top = OnTop.of(same, options.seq_len, calibration, text.bos_id)
        parts = []
        for number in range(options.pieces):
            loop = make_loop(model, same[0], *where, text.bos_id, on_top=on_top and on_top.fresh())
            parts.append(LearningPass(loop, same, text, rank=number, world=options.pieces).run())
        passed = functools.reduce(joined, parts)
        if "unlearned" not in passed.seconds:
            passed.compare(np.array(lines[None]["nats"]), lines[None]["seconds"])
        for number, row in enumerate(same, 1):
            put(options.out, key | {"row": row.name} | figures(passed, number))


def long_documents(tokenizer: Tokenizer, options: argparse.Namespace) -> Text:
    """The documents that the options choose, each cut to the same number of tokens, its BOS among them."""
    chosen, passed = [], 0
    for document in read_documents(options.text):
        if len(chosen) == options.documents:
            break
        if len(document) < options.tokens:  # no token of less than a character is worth trying
            continue
        ids, _ = tokenizer.encode_documents([document])
        if len(ids) < options.tokens:
            continue
        if passed >= options.skip and (passed - options.skip) % options.every == 0:
            chosen.append(ids[: options.tokens])
        passed += 1
    if len(chosen) < options.documents:
        raise InputError(f"{options.text}: {len(chosen)} of {options.documents} documents of {options.tokens} tokens")
    return Text(TokenStream([np.concatenate(chosen)]), tokenizer.byte_table, tokenizer.bos_id)


def known(path: str | None, key: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    """Lines of the file that were measured in the same way, by row; that of the unlearned forward by None."""
    if path is None or not Path(path).exists():
        return {}
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {line["row"]: line for line in lines if key.items() <= line.items()}


def joined(passed: LearningPass, part: LearningPass) -> LearningPass:
    """The first of two passes with the sums of both; its seconds are those of the slower one."""
    for mine, other in ((passed.meter, part.meter), (passed.along, part.along)):
        for name in ("tokens", "bytes", "nats"):
            getattr(mine, name).__iadd__(getattr(other, name))
    for phase, seconds in part.seconds.items():
        passed.seconds[phase] = max(passed.seconds[phase], seconds)
    return passed


def figures(passed: LearningPass, number: int) -> dict[str, Any]:
    """What a row of a pass came to."""
    score, meter, seconds = passed.meter.score(number), passed.meter, passed.seconds
    gained = (meter.nats[0] - meter.nats[number]) / np.log(2) / meter.bytes
    taken = seconds["learned"] + (seconds["on top"] if passed.rows[number - 1].top else 0)
    return {
        "bpb": score.bpb,
        "gain_bpb": score.gain_bpb,
        "gain_se": score.gain_se,
        "by_document": [round(each, 4) for each in gained],
        "forwards": passed.forwards,
        "seconds": taken,
        "times_unlearned": taken / seconds["unlearned"],
    }


def put(path: str | None, line: dict[str, Any]) -> None:
    """Print a line, and append it, with what it is worth nothing without."""
    shown = ("row", "bpb", "gain_bpb", "gain_se", "by_document", "forwards", "seconds", "times_unlearned")
    print(json.dumps({name: line[name] for name in shown if name in line}), flush=True)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        append_json(path, line | provenance("cpu"))


if __name__ == "__main__":
    main()
