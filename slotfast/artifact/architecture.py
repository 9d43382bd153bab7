"""Which model tensors belong to: what their names and shapes say, what has to be told, and what this model lacks."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from torch import Tensor

from ..errors import Fault, InputError
from ..model import GPTConfig
from ..quantize import QuantizedMatrix
from .bounded import unique_json
from .contents import parameter_shapes
from .generations import COMMON, GENERATIONS, Shown, generation_settings, likely_generations, loops_fit

# Parts of other people's models that this one lacks, and why they cannot simply be left out.
_NO_HOME = {
    r".*\.lq[AB]s?(_a)?": "a low-rank correction of a quantised matrix (LQER, PR #1797)",
    r".*\.g[qs]": "attention gates of 8 bits (PR #1855)",
    r".*(gate_proj|attn_gate|gate_w).*": "gated attention: it changes the forward",
    r"smear_(gate|lambda|w).*": "a smear gate that looks at the token (PR #1667): it changes the forward",
    r".*\.bias": "a bias: this model's layers have none",
    r".*lora.*": "adapters of test-time training",
    r"repeat_mlp\..*": "MLPs of repeated layers (PR #1204)",
    r".*(lambda|route|lane).*": "residual lanes: they change the forward",
}
# Parts that play no role in scoring.
_IGNORED = r"mtp_heads\..*|.*rotary\.inv_freq"
# Settings on which losses depend, in which generations differ, and which tensors show in part or not at all.
_UNSAID = (
    "mlp_slope",
    "rope_dims",
    "rope_length",
    "xsa_layers",
    "ln_scale",
    "value_layers",
    "loops",
    "loop_start",
    "loop_end",
    "parallel_from",
)


@dataclass(frozen=True)
class Description:
    """What is known of the model that tensors belong to.

    Args:
        config: its settings; those that are `unsaid` stand for nothing.
        assumed: settings that nothing in the file says: its generation's, or what generations have alike (`COMMON`).
        unsaid: settings on which losses depend and that nothing says.
        shapes: of each parameter of such a model.
        lacks: tensors that this model has no place for, with the reason.
        left_out: tensors that play no part in scoring.
        shown: what the tensors show.
    """

    config: GPTConfig
    assumed: Mapping[str, Any]
    unsaid: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    lacks: Mapping[str, str]
    left_out: tuple[str, ...]
    shown: Shown

    @property
    def known(self) -> dict[str, Any]:
        """Settings that something says."""
        return {key: value for key, value in self.config.model_dump().items() if key not in self.unsaid}

    @property
    def likely(self) -> list[str]:
        """Generations whose files this one resembles most, the likeliest first."""
        return likely_generations(self.shown)

    def missing_parts(self, verb: str) -> list[str]:
        """Each part that this model lacks: one of its tensors, how many others, the verb, and the reason."""
        grouped: dict[str, list[str]] = {}
        for name, why in self.lacks.items():
            grouped.setdefault(why, []).append(name)
        more = {why: f" (and {len(names) - 1} more)" if len(names) > 1 else "" for why, names in grouped.items()}
        return [f"{names[0]!r}{more[why]}{verb}: {why}" for why, names in grouped.items()]

    @property
    def request(self) -> str:
        """What has to be told of the model, and how."""
        first, *others = self.likely
        named = f"--model-config {first}" + (f" (or {', '.join(others)})" if others else "")
        return (
            f"neither the file nor its tensors say {', '.join(self.unsaid)}, on which losses depend: "
            f"name its generation, {named}, or give each as KEY=VALUE"
        )


def describe(
    tensors: Mapping[str, Tensor | QuantizedMatrix], kind: str | None, overrides: Mapping[str, Any], limit: int
) -> Description:
    """What tensors say about their model, together with what is told about it.

    Args:
        tensors: by parameter name.
        kind: how matrices are stored, see `Shown`.
        overrides: settings of GPTConfig that replace others; `generation` names one that gives the rest.
        limit: weights that the model may have.

    Raises:
        InputError: tensors of no such model, or overrides that are wrong.
    """
    shape = {name: _shape(tensor) for name, tensor in tensors.items()}
    shown = _shown(shape, kind)
    given = {key: value for key, value in overrides.items() if key != "generation"}
    for key in given:
        if key not in GPTConfig.model_fields:
            near = difflib.get_close_matches(key, GPTConfig.model_fields, 1)
            raise InputError(
                f"model setting {key!r}: no such setting" + (f"; the nearest is {near[0]}" if near else "")
            )
    told = generation_settings(overrides["generation"], shown) if "generation" in overrides else dict(COMMON)
    said = {**shown.settings, **told, **given}
    unsaid = [key for key in _UNSAID if key not in said]
    if said.get("loops") == 0:
        unsaid = [key for key in unsaid if not key.startswith("loop")]
    nothing: dict[str, Any] = {"mlp_slope": 0.0, "rope_dims": 0, "rope_length": 1, "xsa_layers": 0, "ln_scale": False}
    nothing |= {"value_layers": tuple(range(shown.value_scales)), "loop_end": shown.layers - 1}
    try:
        config = GPTConfig.model_validate({**{key: nothing[key] for key in unsaid if key in nothing}, **said})
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        raise InputError(f"model{' setting ' * bool(fault.where)}{fault.where}: {fault.expected}") from None
    shapes = parameter_shapes(config, limit)
    if "loops" in said and {"loop_start", "loop_end"} & set(unsaid):  # half told, so the skips prove nothing
        shapes |= {name: shape[name] for name in ("skip_weights", "skip_gates") if name in shape and name in shapes}
    strange = [name for name in shape if name not in shapes]
    left_out = tuple(name for name in strange if re.fullmatch(_IGNORED, name))
    lacks = {name: _why(name, shown.layers) for name in strange if name not in left_out}
    assumed = {key: getattr(config, key) for key in told if key not in given}
    return Description(config, assumed, tuple(unsaid), shapes, lacks, left_out, shown)


def _shown(shape: Mapping[str, tuple[int, ...]], kind: str | None) -> Shown:
    for name, dimensions in (("tok_emb.weight", 2), ("blocks.0.attn.c_q.weight", 2), ("blocks.0.attn.c_k.weight", 2)):
        if len(shape.get(name, ())) != dimensions:
            raise InputError(f"tensor {name!r} is missing: not a model of the contest's family")
    if len(shape.get("blocks.0.attn.q_gain", ())) != 1 or len(shape.get("blocks.0.mlp.fc.weight", ())) != 2:
        raise InputError("tensors of block 0 are missing: not a model of the contest's family")
    vocab_size, width = shape["tok_emb.weight"]
    heads = shape["blocks.0.attn.q_gain"][0]
    matrices = (re.fullmatch(r"blocks\.(\d{1,3})\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(fc|proj))\.weight", n) for n in shape)
    layers = 1 + max(int(found[1]) for found in matrices if found)
    value_scales = sum(name.startswith("ve_layer_scales.") for name in shape)
    buckets, bigram_width = _pair(shape.get("bigram.embed.weight", (0, 128)))
    _, value_width = _pair(shape.get("ve_shared.embed.weight", (0, 0)))
    skips, _ = _pair(shape.get("skip_weights", (0, 0)))
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": shape["blocks.0.attn.c_k.weight"][0] // max(width // max(heads, 1), 1),
        "mlp_width": shape["blocks.0.mlp.fc.weight"][0],
        "unet": "skip_weights" in shape,
        "smear": "smear.gate" in shape,
        "bigram_buckets": buckets,
        "bigram_width": bigram_width,
        "value_width": value_width,
        "skip_gates": "skip_gates" in shape,
        "tied": "lm_head.weight" not in shape,
    }
    if value_scales in (0, layers):
        settings["value_layers"] = tuple(range(value_scales))
    if layers == 1 or ("skip_weights" in shape and skips == layers // 2):
        settings |= {"loops": 0, "loop_start": 0, "loop_end": 0}
    return Shown(settings, skips, value_scales, kind)


def _pair(dimensions: tuple[int, ...]) -> tuple[int, int]:
    if len(dimensions) != 2:
        raise InputError("a table is no matrix: not a model of the contest's family")
    return dimensions


def _why(name: str, layers: int) -> str:
    """Why a tensor has no place."""
    block = re.match(r"blocks\.(\d{1,3})\.", name)
    if block and int(block[1]) >= layers:
        return "scales that a repeated layer has to itself (PR #1204)"
    return next((why for pattern, why in _NO_HOME.items() if re.fullmatch(pattern, name)), "of an unknown part")


def check_tensors(tensors: Mapping[str, Tensor | QuantizedMatrix], description: Description) -> None:
    """Check a file's tensors against its model's parameters.

    Raises:
        InputError: tensors without a home, with the reasons; a missing one; one of another shape.
    """
    if description.lacks:
        raise InputError(f"tensor {'; '.join(description.missing_parts(' has no home in this model'))}")
    for name, wanted in description.shapes.items():
        if name not in tensors:
            raise InputError(f"tensor {name!r} is missing")
        shape = _shape(tensors[name])
        if shape != wanted:
            repeats = _repeats(name, shape, wanted, description.shown)
            raise InputError(f"tensor {name!r} has shape {list(shape)}, this model has {list(wanted)}{repeats}")


def _repeats(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], shown: Shown) -> str:
    """How to say which layers repeat, where a file has more skips than its layers need."""
    if name not in ("skip_weights", "skip_gates") or shape[:1] <= wanted[:1]:
        return ""
    fits = [name for name in likely_generations(shown) if loops_fit(generation_settings(name, shown), shown)]
    named = f", and so does --model-config {' or '.join(fits)}" if fits else ""
    return f": its layers repeat; loops=, loop_start=, loop_end= say which{named}"


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Settings from NAME, KEY=VALUE,KEY=VALUE, both, or a JSON object; the name of a generation as `generation`.

    Raises:
        InputError: none of them, or a setting given twice.
    """
    if not text:
        return {}
    try:
        if text.lstrip().startswith("{"):
            return dict(unique_json(text))
        options = [_option(option) for option in re.split(r",(?=\s*[a-z_][a-z_0-9]*\s*(?:=|,|$))", text)]
    except (ValueError, RecursionError):
        raise InputError(
            f"model settings {text!r}: expected KEY=VALUE,KEY=VALUE, a generation ({', '.join(GENERATIONS)}), both of "
            "them, or a JSON object, and nothing twice"
        ) from None
    found = dict(options)
    if len(found) < len(options):
        raise InputError(f"model settings {text!r}: one of them is given twice")
    return found


def _option(option: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals and key in GENERATIONS:
        return "generation", key
    if not key:
        raise ValueError(option)
    words = {"true": "true", "false": "false", "none": "null"}
    return key, json.loads(words.get(value.lower(), value))


def _shape(tensor: Tensor | QuantizedMatrix) -> tuple[int, ...]:
    return tuple(tensor.codes.shape if isinstance(tensor, QuantizedMatrix) else tensor.shape)
