"""What a calibration of another project's model is worth, on text that did not choose it.

    python -m bench.calibration --model FOLDER --calibration FILE --text FILE [--seq-len N] [--out FILE]

One stream, every token forwarded once, and three rows of `causal` on the same logits: uncalibrated, with the counted
frequencies alone, and with all of the file that `slotfast calibrate --model` wrote. Gains are in bits per byte, their
standard errors clustered by document.
"""

import argparse
import json
import sys

import numpy as np

from bench.common import provenance, write_json
from slotfast.command.progress import Progress
from slotfast.command.run import run_command
from slotfast.eval import SlidingPass, Streaming
from slotfast.eval.forward import block_that_fits
from slotfast.eval.inputs import Inputs, Sources, read_inputs
from slotfast.overlap import MAX_OVERLAP, seen
from slotfast.score import Meter
from slotfast.slot import Adapter, Calibration, parse_preset
from slotfast.windows import Plan


def compare(inputs: Inputs, length: int, stride: int) -> dict:
    """Gains of the rows over none, and of each over the one before it."""
    share = seen(inputs.stream, inputs.artifact.metadata)["calibration"]
    if share > MAX_OVERLAP:
        print(f"warning: the text shares about {share:.1%} with the one of the calibration", file=sys.stderr)
    stored = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    calibrations = {"uncalibrated": Calibration(), "frequencies": Calibration(stored.frequency), "calibrated": stored}
    adapters = [
        Adapter(parse_preset("causal").model_copy(update={"name": name}), given, inputs.text.bos_id)
        for name, given in calibrations.items()
    ]
    plan, batch = Plan(len(inputs.stream) - 1, length, stride), 4
    streaming = Streaming(0, block_that_fits(inputs.artifact.config.vocab_size, False))
    passed = SlidingPass(inputs.artifact.model(), inputs.text, plan, adapters, batch_windows=batch, streaming=streaming)
    with Progress(len(plan), 0, "windows") as progress:
        passed.run(on_windows=progress)
    names, meter = ["none", *calibrations], passed.meter
    return {
        "text": inputs.source,
        "shared_with_calibration": share,
        "documents": len(meter.tokens),
        "tokens": int(meter.tokens.sum()),
        "bytes": int(meter.bytes.sum()),
        "plan": {"forward": "stream", "seq_len": length, "stride": stride},
        "calibration": dict(inputs.artifact.metadata["calibration"]),
        "bpb": {name: meter.score(row).bpb for row, name in enumerate(names)},
        "gain_over_none": {name: _gain(meter, 0, row) for row, name in enumerate(names) if row},
        "gain_over_row_before": {name: _gain(meter, row - 1, row) for row, name in enumerate(names) if row > 1},
        "calibrated_over_uncalibrated": _gain(meter, 1, 3),
        "seconds": {name: round(value, 1) for name, value in passed.seconds.items()},
    }


def _gain(meter: Meter, base: int, row: int) -> dict[str, float | None]:
    """Bits per byte that a row gains over another, and the standard error, by document."""
    pair = Meter([meter.rows[base], meter.rows[row]], len(meter.tokens))
    pair.tokens, pair.bytes, pair.nats = meter.tokens, meter.bytes, np.stack([meter.nats[base], meter.nats[row]])
    score = pair.score(1)
    return {"bpb": score.gain_bpb, "se": score.gain_se}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="package.module:factory, or a Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="what slotfast calibrate --model wrote")
    parser.add_argument("--text", required=True, help=".txt or .jsonl, also compressed: not the calibration's")
    parser.add_argument("--seq-len", type=int, help="tokens that one attends to; default: the training length")
    parser.add_argument("--stride", type=int, default=64, help="tokens between two refreshes of the rates")
    parser.add_argument("--max-tokens", type=int, help="score only the start")
    parser.add_argument("--out", help="where the JSON goes")
    args = parser.parse_args()
    wanted = {name: getattr(args, name) for name in ("model", "calibration", "text", "seq_len", "max_tokens")}
    inputs = read_inputs(Sources(**wanted))
    found = {
        **provenance("cpu"),
        "model": inputs.artifact.config.model_dump(),
        **compare(inputs, args.seq_len or inputs.artifact.config.seq_len, args.stride),
    }
    write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
