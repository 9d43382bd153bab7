"""The few numbers of `learn`, chosen for a model on held-out documents, within a number of trials."""

import time
from collections.abc import Iterator
from typing import Any

from ..command.progress import Progress
from ..data import Text
from ..errors import InputError
from ..eval.forward import block_that_fits
from ..eval.learning import UNLEARNED, LearningPass
from ..foreign import LanguageModel
from ..learn import CALIBRATED, LEARNING, FrozenLoop, Learning, make_loop
from ..model import GPT
from ..score import Score
from ..worker import ALONE, Worker

# Where the search begins: what learns, and rates that suit it.
_BEGINNINGS: tuple[dict[str, Any], ...] = (
    {},
    {"what": "all", "lr": 2e-4, "betas": (0.0, 0.999), "eps": 1e-5, "forget": 0.9},
    {"what": "all", "optimizer": "sgd", "lr": 0.02},
    {"what": "norms", "lr": 2e-3},
)


def calibrate_learning(
    model: GPT | LanguageModel,
    text: Text,
    *,
    trials: int,
    window: int,
    sinks: int = 0,
    worker: Worker = ALONE,
    shown: bool = False,
) -> dict[str, Any]:
    """What learns, rate, chunk, rank and decay of `learn`, by one pass over the text for each trial, or nothing.

    What learns, and what of it is forgotten where documents begin, is tried first, then one number after the other is
    doubled or halved as long as that helps.

    Args:
        model: as it will be evaluated, on the worker's device; left as it was.
        text: documents held out from training; never the text to be scored.
        trials: passes at most, >= 1, besides the unlearned one.
        window, sinks, worker: of the passes.
        shown: say on standard error how far it is.

    Returns:
        The numbers by their keys, with `steps` 0, nothing is learned, unless the best row gains more than two standard
        errors, clustered by document; what that gained on these very documents, and its error; trials and seconds.
    """
    begun, vocab_size = time.perf_counter(), len(text.byte_table.base)
    block = block_that_fits(vocab_size, worker.on_gpu)
    frozen = LearningPass(FrozenLoop(model, window, sinks, worker.dtype, block), [UNLEARNED], text)
    with Progress(len(frozen.span), 0, "tokens unlearned", silent=not shown) as progress:
        frozen.run(progress)
    start = LEARNING["learn"]
    if window < start.chunk:
        start = start.model_copy(update={"chunk": window})
    tried: dict[Learning, Score | None] = {}

    def gain(row: Learning) -> float:
        """Of a row that is tried now, or was; a row that comes to no numbers has lost everything."""
        if row not in tried:
            tried[row] = _score(model, row, text, window, sinks, worker, frozen, shown)
        score = tried[row]
        return float("-inf") if score is None else score.gain_bpb

    best = start
    for changes in _BEGINNINGS:
        row = start.model_copy(update=changes | ({"forget": 0.0} if text.bos_id is None else {}))
        if len(tried) < trials and gain(row) > gain(best):
            best = row
    improved = True
    while improved and len(tried) < trials:
        improved = False
        for row in _neighbours(best, window):
            if row not in tried and len(tried) < trials and gain(row) > gain(best):
                best, improved = row, True
                break
    score = tried[best]
    worth = score is not None and score.gain_se is not None and score.gain_bpb > 2 * score.gain_se
    return {
        **{key: getattr(best, key) for key in CALIBRATED if key in best.options},
        "steps": best.steps if worth else 0,
        "gain_bpb": None if score is None else score.gain_bpb,
        "gain_se": None if score is None else score.gain_se,
        "trials": len(tried),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _neighbours(row: Learning, window: int) -> Iterator[Learning]:
    """Rows that differ in one number: the rate, by which most is gained and lost, first."""
    for changes in (
        {"lr": min(10.0, 2 * row.lr)},
        {"lr": row.lr / 2},
        {"chunk": max(1, row.chunk // 2)},
        {"chunk": min(window, 2 * row.chunk)},
        {"decay": 2 * row.decay or 0.5},
        *([{"forget": 0.0}] if row.forget else []),
        *([{"rank": 2 * row.rank}, {"rank": max(1, row.rank // 2)}] if row.what == "lora" else []),
    ):
        yield row.model_copy(update=changes)


def _score(
    model: GPT | LanguageModel,
    row: Learning,
    text: Text,
    window: int,
    sinks: int,
    worker: Worker,
    frozen: LearningPass,
    shown: bool,
) -> Score | None:
    """A row's score beside the unlearned forward; None where its losses are no numbers."""
    loop = make_loop(model, row, window, sinks, text.bos_id, worker.dtype)
    passed = LearningPass(loop, [row], text)
    what = f"tokens of what={row.what}, lr={row.lr:g}, chunk={row.chunk}"
    try:
        with Progress(len(passed.span), 0, what, silent=not shown) as progress:
            passed.run(progress)
    except InputError:  # the rate is too high
        return None
    passed.compare(frozen.meter.nats[1], frozen.seconds["unlearned"])
    return passed.meter.score(1)


def learning_summary(found: dict[str, Any]) -> str:
    """What was chosen, in a line."""
    cost = f"{found['trials']} trials, {found['seconds']:.0f} s"
    if found["gain_bpb"] is None:
        return f"learning: off, no trial came to numbers; {cost}"
    spread = "n/a" if found["gain_se"] is None else f"{found['gain_se']:.4f}"
    gained = f"{found['gain_bpb']:+.4f} ± {spread} bpb here"
    numbers = ", ".join(f"{key} {value}" for key, value in found.items() if key in CALIBRATED and key != "steps")
    return f"learning: {'on' if found['steps'] else 'off'}, {numbers}: {gained}; {cost}"
