"""What a reader must know to take a result for what it is: a line each, in the table and in the JSON."""

from collections.abc import Mapping

from ..data import RuleFault, TokenStream
from ..foreign import ForeignModel
from ..overlap import MAX_OVERLAP
from ..words import counted
from .inputs import Inputs
from .setup import Setup

_SEEN = {
    "calibration": "`causal` was calibrated on",
    "training": "the model was trained on",
    "ttt": "the model was adapted to",
}


def notes(inputs: Inputs, setup: Setup, seen: Mapping[str, float], n_bytes: int) -> list[str]:
    """All of them, warnings first.

    Args:
        seen: see `slotfast.overlap.seen`.
        n_bytes: that the byte rule counts.
    """
    found = [
        f"warning: {_SEEN.get(name, name)} text that shares about {share:.1%} of its runs of 32 tokens with this one: "
        "no honest score"
        for name, share in seen.items()
        if share > MAX_OVERLAP
    ]
    if fault := inputs.tokenizer.byte_table.fault:
        found += _fault_notes(fault, inputs.stream, n_bytes)
    if inputs.text_bytes is None and (unknown := inputs.stream.count(inputs.tokenizer.unknown_id)):
        found.append(f"warning: {counted(unknown, 'unknown piece')}, for which no byte is counted: bpb is too high")
    if inputs.stream.cut or (inputs.text_bytes and inputs.text_bytes.cut):
        found.append(f"only the first {counted(len(inputs.stream), 'token')} were read (--max-tokens)")
    if inputs.text_bytes and inputs.text_bytes.crlf:
        found.append("lines of the text end in CRLF: each carriage return is a byte that is scored")
    plan, trained = setup.plan, inputs.artifact.config.seq_len
    if plan.seq_len > trained and not isinstance(inputs.artifact, ForeignModel):
        found.append(f"windows have {plan.seq_len:,} positions, and the model was trained on {trained:,} (--seq-len)")
    halved = isinstance(inputs.artifact, ForeignModel) and inputs.artifact.module.stream_window == plan.seq_len
    if halved and plan.seq_len < trained:
        found.append(
            f"windows have {plan.seq_len:,} of the model's {trained:,} positions: a stream starts again where they end"
        )
    last = plan[len(plan) - 1]
    first_scored = last.start + last.context_end
    how = f"chunk={first_scored} or less makes more of it" if first_scored else "it has a single window"
    idle = [row for row in setup.learning if row.keys == "windows" and row.chunk > first_scored]
    for name in {row.alone: row.name for row in reversed(idle)}.values():
        found.append(f"{name} trained nothing: the stream is one chunk, after which none is left to score; {how}")
    return found


def _fault_notes(fault: RuleFault, stream: TokenStream, n_bytes: int) -> list[str]:
    """A warning where the byte rule misjudges tokens that were scored."""
    if fault.excess is None:
        return [f"warning: the byte rule may misjudge this vocabulary: {fault.why}"]
    excess = sum(int(fault.excess[chunk].sum()) for chunk in stream.chunks())
    if not excess:
        return []
    share = (n_bytes - excess) / n_bytes
    return [
        f"warning: the byte rule counts {excess:,} bytes more than the pieces spell: {fault.why}; bpb is about "
        f"{share:.2f} of what it is in bytes of text"
    ]
