"""Generations of the contest's scripts: what their files leave unsaid, and the traces that tell them apart.

Settings are those of the scripts as they were run for their entries. A file shows some of them in its tensors; the
rest depends on the generation, which somebody who knows it has to name.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

_PR1019 = {
    "seq_len": 2048,
    "mlp_slope": 0.5,
    "rope_dims": 16,
    "rope_length": 1024,
    "xsa_layers": 11,
    "ln_scale": True,
    "value_layers": (9, 10),
    "softcap": 30.0,
    "rope_base": 10_000.0,
    "loops": 0,
    "loop_start": 0,
    "loop_end": 0,
    "parallel_from": None,
}
_PR1394 = _PR1019 | {"rope_length": 2048, "loops": 2, "loop_start": 4, "loop_end": 5}
_WHOLE_HEAD = 1 << 16  # more than any head has
_SETTINGS: dict[str, dict[str, Any]] = {
    "pr1019": _PR1019,
    "pr1350": _PR1019,
    "pr549": _PR1019 | {"xsa_layers": 4},
    "pr287": _PR1019 | {"mlp_slope": 0.0, "rope_dims": _WHOLE_HEAD, "xsa_layers": 4, "ln_scale": False},
    "pr1217": _PR1019,
    "pr1179": _PR1019,
    "pr1204": _PR1019,
    "pr1218": _PR1019 | {"rope_length": 2048},
    "pr1394": _PR1394,
    "pr1413": _PR1394,
    "pr1493": _PR1394 | {"loop_start": 3, "parallel_from": 7},
    "baseline": _PR1019
    | {
        "seq_len": 1024,
        "mlp_slope": 0.0,
        "rope_dims": _WHOLE_HEAD,
        "rope_length": 1 << 17,  # it never stretches the base
        "xsa_layers": 0,
        "ln_scale": False,
    },
}
GENERATIONS = ("baseline", *sorted(set(_SETTINGS) - {"baseline"}, key=lambda name: int(name[2:])))
# What need not be given with settings one by one: the same in every generation or, as the window's length, no part of
# the model.
COMMON = {key: _PR1019[key] for key in ("seq_len", "softcap", "rope_base")}

# How a file's matrices are stored.
CODES, WORDS, PER_ROW = "codes", "codes, described in words", "per row"
# What a generation's files show: kind of codes, smear gate, value table, skip gates; and, where the model has the
# entry's size, skips, rows and width of the bigram table, vocabulary.
_TRACES: dict[str, tuple[tuple[str, bool, bool, bool], tuple[int, int, int, int]]] = {
    "pr1019": ((CODES, True, True, False), (5, 3072, 112, 1024)),
    "pr1350": ((CODES, True, True, False), (5, 2048, 128, 1024)),
    "pr549": ((CODES, True, True, False), (5, 1536, 128, 1024)),
    "pr287": ((CODES, True, False, False), (5, 2048, 128, 1024)),
    "pr1217": ((CODES, True, True, True), (5, 2816, 160, 1024)),
    "pr1179": ((CODES, True, True, True), (5, 2816, 160, 1024)),
    "pr1204": ((CODES, True, True, True), (6, 2816, 112, 1024)),
    "pr1218": ((CODES, False, True, True), (5, 0, 128, 4096)),
    "pr1394": ((WORDS, False, False, True), (7, 0, 128, 8192)),
    "pr1413": ((WORDS, False, False, True), (7, 0, 128, 8192)),
    "pr1493": ((WORDS, False, False, True), (8, 0, 128, 8192)),
    "baseline": ((PER_ROW, False, False, False), (4, 0, 128, 1024)),
}


@dataclass(frozen=True)
class Shown:
    """What a file shows about its model.

    Args:
        settings: of GPTConfig, by the tensors' names and shapes.
        skips: rows of the skip weights.
        value_scales: layers that get value embeddings.
        kind: how matrices are stored: CODES, WORDS, PER_ROW; None where they are plain numbers.
    """

    settings: Mapping[str, Any]
    skips: int
    value_scales: int
    kind: str | None

    @property
    def layers(self) -> int:
        return self.settings["layers"]


def generation_settings(name: Any, shown: Shown) -> dict[str, Any]:
    """The settings of a generation that a model's file does not show.

    Raises:
        InputError: no such generation.
    """
    if name not in GENERATIONS:
        near = difflib.get_close_matches(str(name), GENERATIONS, 1)
        expected = f"the nearest is {near[0]}" if near else f"expected one of {', '.join(GENERATIONS)}"
        raise InputError(f"generation {str(name)!r}: no such generation; {expected}")
    settings = dict(_SETTINGS[name])
    head_width = shown.settings["width"] // max(shown.settings["heads"], 1)
    settings["rope_dims"] = min(settings["rope_dims"], head_width // 2 * 2)
    settings["xsa_layers"] = min(settings["xsa_layers"], shown.layers)
    if len(settings["value_layers"]) != shown.value_scales or max(settings["value_layers"]) >= shown.layers:
        # a model of another depth: its last layers, like the entry's
        settings["value_layers"] = tuple(range(shown.layers - shown.value_scales, shown.layers))
    if not loops_fit(settings, shown):
        settings |= {"loops": 0, "loop_start": 0, "loop_end": 0}
    return {key: value for key, value in settings.items() if key not in shown.settings}


def loops_fit(settings: Mapping[str, Any], shown: Shown) -> bool:
    """Whether layers that repeat as the settings say have as many skips as the file."""
    start, end = settings["loop_start"], settings["loop_end"]
    return end < shown.layers and (shown.layers + settings["loops"] * (end + 1 - start)) // 2 == shown.skips


def likely_generations(shown: Shown) -> list[str]:
    """Generations whose files are most like a file, the likeliest first."""
    has = shown.settings
    shape = (shown.kind, has["smear"], bool(has["value_width"]), has["skip_gates"])
    sizes = (shown.skips, has["bigram_buckets"], has["bigram_width"], has["vocab_size"])

    def unlike(name: str) -> tuple[int, int]:
        its_shape, its_sizes = _TRACES[name]
        return (
            sum(mine not in (None, its) for mine, its in zip(shape, its_shape, strict=True)),
            sum(mine != its for mine, its in zip(sizes, its_sizes, strict=True)),
        )

    ranked = sorted(_TRACES, key=unlike)
    return [name for name in ranked if unlike(name)[0] == unlike(ranked[0])[0]]
