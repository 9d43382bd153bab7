"""The few numbers of `learn`, chosen for a model on held-out documents, within a number of trials."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..command.progress import Progress
from ..data import Text
from ..errors import InputError
from ..eval.forward import block_that_fits
from ..eval.learning import UNLEARNED, LearningPass, grouped
from ..foreign import LanguageModel
from ..learn import CALIBRATED, LEARNING, FrozenLoop, Learning, OnTop, make_loop, parse_row
from ..model import GPT
from ..score import Meter, Score
from ..slot import Adaptation, Calibration
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
    row: str = "learn",
    calibration: Calibration | None = None,
    sinks: int = 0,
    worker: Worker = ALONE,
    shown: bool = False,
) -> dict[str, Any]:
    """What learns, rate, chunk, rank and decay of `learn`, by one pass over the text for each trial, or nothing.

    What learns, and what of it is forgotten where documents begin, is tried first, then one number after the other is
    doubled or halved as long as that helps. What gains most alone is often not what adds most below counts, which find
    some of it for themselves.

    Args:
        model: as it will be evaluated, on the worker's device; left as it was.
        text: documents held out from training; never the text to be scored.
        trials: passes at most, >= 1, besides the unlearned one.
        window, sinks, worker: of the passes.
        row: that the numbers are to serve, `learn` or `learn+ROW`; its gain is over the same without learning, chunks
            as long, at whose ends counts are renewed.
        calibration: of what is on top.
        shown: say on standard error how far it is.

    Returns:
        The numbers by their keys, with `steps` 0, nothing is learned, unless the best row gains more than two standard
        errors, clustered by document; what that gained on these very documents, and its error; trials and seconds.
    """
    begun = time.perf_counter()
    start = LEARNING["learn"].model_copy(update={"chunk": min(LEARNING["learn"].chunk, window)})
    trial = _Trial(model, text, parse_row(row).top, calibration, start, window, sinks, worker, shown)
    tried: dict[Learning, Score | None] = {}

    def gain(numbers: Learning) -> float:
        """Of a row that is tried now, or was; a row that comes to no numbers has lost everything."""
        if numbers not in tried:
            tried[numbers] = trial(numbers)
        score = tried[numbers]
        return float("-inf") if score is None else score.gain_bpb

    best = start
    for changes in _BEGINNINGS:
        other = start.model_copy(update=changes | ({"forget": 0.0} if text.bos_id is None else {}))
        if len(tried) < trials and gain(other) > gain(best):
            best = other
    improved = True
    while improved and len(tried) < trials:
        improved = False
        for other in _neighbours(best, window):
            if other not in tried and len(tried) < trials and gain(other) > gain(best):
                best, improved = other, True
                break
    score = tried[best] if tried[best] is None else trial.beside_its_chunks(best)
    chosen = {key: getattr(best, key) for key in CALIBRATED if key in best.options}
    worth = score is not None and score.gain_se is not None and score.gain_bpb > 2 * score.gain_se
    return {
        "row": row,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()},
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
        {"decay": min(100.0, 2 * row.decay or 0.5)},
        *([{"forget": 0.0}] if row.forget else []),
        *([{"rank": min(1024, 2 * row.rank)}, {"rank": max(1, row.rank // 2)}] if row.what == "lora" else []),
    ):
        yield row.model_copy(update=changes)


class _Trial:
    """Passes over a text, each by the numbers that it is given, beside one without learning.

    Args:
        top: the row on top, its numbers out of `calibration`.
        start: where the search begins; the pass without learning has its chunks.
        text, window, sinks, worker, shown: of every pass.
    """

    def __init__(
        self,
        model: GPT | LanguageModel,
        text: Text,
        top: Adaptation | None,
        calibration: Calibration | None,
        start: Learning,
        window: int,
        sinks: int,
        worker: Worker,
        shown: bool,
    ):
        self.model, self.text, self.worker, self.shown = model, text, worker, shown
        self.top, self.calibration, self.where = top, calibration or Calibration(), (window, sinks)
        self.start, self.meters = start, dict[Learning, Meter]()  # no passes: each holds what it has learned
        self.own = False  # whether passes run the same forwards unlearned too, as with a model that keeps nothing
        self.unlearned: dict[int, np.ndarray] = {}  # sums by document, by the tokens of a chunk

    def __call__(self, numbers: Learning) -> Score | None:
        """A row's score beside the same without learning; None where its losses are no numbers."""
        try:
            passed = self._run(numbers)
        except InputError:  # the rate is too high, or the model has no layers of those that would learn
            return None
        self.meters[numbers], self.own = passed.meter, "unlearned" in passed.seconds
        return self._beside(passed.meter, self.start.chunk)

    def beside_its_chunks(self, numbers: Learning) -> Score:
        """The score of numbers that were tried, beside chunks as long without learning."""
        return self._beside(self.meters[numbers], self.start.chunk if self.top is None else numbers.chunk)

    def _beside(self, meter: Meter, chunk: int) -> Score:
        if self.top is not None or not self.own:
            if chunk not in self.unlearned:
                numbers = self.start.model_copy(update={"what": "all", "steps": 0, "chunk": chunk})
                self.unlearned[chunk] = self._run(UNLEARNED if self.top is None else numbers).meter.nats[1]
            meter.nats[0] = self.unlearned[chunk]
        return meter.score(1)

    def _run(self, numbers: Learning) -> LearningPass:
        (window, sinks), worker, text = self.where, self.worker, self.text
        (rows,) = grouped([numbers.model_copy(update={"top": self.top})], self.calibration)
        what = "tokens unlearned"
        if numbers is UNLEARNED:
            block = block_that_fits(len(text.byte_table.base), worker.on_gpu)
            loop: Any = FrozenLoop(self.model, window, sinks, worker.dtype, block)
        else:
            on_top = OnTop.of(rows, window, self.calibration, text.bos_id)
            loop = make_loop(self.model, numbers, window, sinks, text.bos_id, worker.dtype, on_top=on_top)
            if numbers.steps:
                what = f"tokens of what={numbers.what}, lr={numbers.lr:g}, chunk={numbers.chunk}"
        passed = LearningPass(loop, rows, text)
        with Progress(len(passed.span), 0, what, silent=not self.shown) as progress:
            passed.run(progress)
        return passed


def learning_summary(found: dict[str, Any]) -> str:
    """What was chosen, in a line."""
    cost = f"{found['trials']} trials, {found['seconds']:.0f} s"
    if found["gain_bpb"] is None:
        return f"learning: off, no trial came to numbers; {cost}"
    spread = "n/a" if found["gain_se"] is None else f"{found['gain_se']:.4f}"
    gained = f"{found['gain_bpb']:+.4f} ± {spread} bpb for {found['row']} here"
    numbers = ", ".join(f"{key} {value}" for key, value in found.items() if key in CALIBRATED and key != "steps")
    return f"learning: {'on' if found['steps'] else 'off'}, {numbers}: {gained}; {cost}"
