"""Which model tensors belong to: what their names and shapes say, and what has to be assumed."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

import pydantic
from torch import Tensor

from ..errors import InputError
from ..model import GPTConfig
from ..quantize import QuantizedMatrix

# Parts of other people's models that this one lacks, with the reason why they cannot just be left out.
_NO_HOME = {
    r".*\.lq[AB]s?(_a)?": "a low-rank correction of a quantised matrix (LQER, PR #1797)",
    r".*\.g[qs]": "attention gates of 8 bits (PR #1855)",
    r".*(gate_proj|attn_gate|gate_w).*": "gated attention: it changes the forward",
    r".*\.bias": "a bias: this model's layers have none",
    r".*lora.*": "adapters of test-time training",
    r".*(lambda|route|lane).*": "residual lanes: they change the forward",
}
# What plays no part in scoring.
_IGNORED = r"mtp_heads\..*|.*rotary\.inv_freq"


def guess_config(
    tensors: Mapping[str, Tensor | QuantizedMatrix], baseline: bool, overrides: Mapping[str, Any]
) -> tuple[GPTConfig, dict[str, Any]]:
    """The model that tensors belong to.

    Args:
        tensors: by parameter name.
        baseline: whether they come from the contest's baseline, rather than from PR #1019's line.
        overrides: settings of GPTConfig that replace what is guessed.

    Returns:
        The settings, and those of them that nothing in the file says.

    Raises:
        InputError: tensors of no such model, or overrides that are wrong.
    """
    shape = {name: _shape(tensor) for name, tensor in tensors.items()}
    for name, dimensions in (("tok_emb.weight", 2), ("blocks.0.attn.c_q.weight", 2), ("blocks.0.attn.c_k.weight", 2)):
        if len(shape.get(name, ())) != dimensions:
            raise InputError(f"tensor {name!r} is missing: not a model of the contest's family")
    if len(shape.get("blocks.0.attn.q_gain", ())) != 1 or len(shape.get("blocks.0.mlp.fc.weight", ())) != 2:
        raise InputError("tensors of block 0 are missing: not a model of the contest's family")
    vocab_size, width = shape["tok_emb.weight"]
    heads = shape["blocks.0.attn.q_gain"][0]
    head_width = width // max(heads, 1)
    layers = 1 + max(int(name.split(".")[1]) for name in shape if re.match(r"blocks\.\d{1,3}\.", name))
    value_scales = sum(name.startswith("ve_layer_scales.") for name in shape)
    buckets, bigram_width = shape.get("bigram.embed.weight", (0, 128))
    _, value_width = shape.get("ve_shared.embed.weight", (0, 0))
    found = {
        "vocab_size": vocab_size,
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": shape["blocks.0.attn.c_k.weight"][0] // max(head_width, 1),
        "mlp_width": shape["blocks.0.mlp.fc.weight"][0],
        "unet": "skip_weights" in shape,
        "smear": "smear.gate" in shape,
        "bigram_buckets": buckets,
        "bigram_width": bigram_width,
        "value_width": value_width,
        "skip_gates": "skip_gates" in shape,
        "tied": "lm_head.weight" not in shape,
    }
    assumed = {
        "seq_len": 1024 if baseline else 2048,
        "mlp_slope": 0.0 if baseline else 0.5,
        "rope_dims": head_width if baseline else min(16, head_width // 2 * 2),
        "rope_length": 1 << 17 if baseline else 1024,  # the baseline never stretches the base
        "xsa_layers": 0 if baseline else layers,
        "ln_scale": not baseline,
        "value_layers": tuple(range(layers - value_scales, layers)),
        "softcap": 30.0,
    }
    for key in overrides:
        if key not in GPTConfig.model_fields:
            near = difflib.get_close_matches(key, GPTConfig.model_fields, 1)
            raise InputError(
                f"model setting {key!r}: no such setting" + (f"; the nearest is {near[0]}" if near else "")
            )
    try:
        config = GPTConfig.model_validate({**found, **assumed, **overrides})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"model{' setting ' + where if where else ''}: {first['msg']}") from None
    return config, {key: value for key, value in assumed.items() if key not in overrides}


def check_names(names: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Hold a file's tensors against a model's parameters.

    Args:
        names: the file's tensors.
        wanted: shape of each parameter.

    Returns:
        Names of tensors that play no part in scoring and are left out.

    Raises:
        InputError: a tensor without a home, with the reason; a missing one; one of another shape.
    """
    ignored = []
    for name, tensor in names.items():
        if name not in wanted:
            if re.fullmatch(_IGNORED, name):
                ignored.append(name)
                continue
            why = next((why for pattern, why in _NO_HOME.items() if re.fullmatch(pattern, name)), "of an unknown part")
            raise InputError(f"tensor {name!r} has no home in this model: {why}")
        if _shape(tensor) != wanted[name]:
            raise InputError(f"tensor {name!r} has shape {list(_shape(tensor))}, this model has {list(wanted[name])}")
    for name in wanted:
        if name not in names:
            raise InputError(f"tensor {name!r} is missing")
    return ignored


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Settings from KEY=VALUE,KEY=VALUE or a JSON object.

    Raises:
        InputError: neither of them.
    """
    if not text:
        return {}
    try:
        if text.lstrip().startswith("{"):
            return dict(json.loads(text))
        found = {}
        for option in re.split(r",(?=\s*[a-z_]+=)", text):
            key, equals, value = option.strip().partition("=")
            if not equals:
                raise ValueError(option)
            found[key] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        return found
    except (ValueError, RecursionError):
        raise InputError(f"model settings {text!r}: expected KEY=VALUE,KEY=VALUE or a JSON object") from None


def _shape(tensor: Tensor | QuantizedMatrix) -> tuple[int, ...]:
    return tuple(tensor.codes.shape if isinstance(tensor, QuantizedMatrix) else tensor.shape)
