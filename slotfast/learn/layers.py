"""Finds the layers of a model that LoRA goes beside, by the names that families of models give their projections."""

from collections.abc import Sequence

from torch import nn

from ..errors import InputError
from ..model import GPT

# Of every block; `head` is the output matrix. Tables' own projections are no part of a block, and stay.
_OURS = {
    "q": "attn.c_q",
    "k": "attn.c_k",
    "v": "attn.c_v",
    "o": "attn.proj",
    "up": "mlp.fc",
    "down": "mlp.proj",
}
_ALL = {*_OURS, "head"}
PROJECTIONS = (*_OURS, "attn", "mlp", "head")  # attn, mlp: beside the whole of it; with slots alone

_THEIRS = {
    "q": ("q_proj", "c_q", "query", "q_lin", "wq"),
    "k": ("k_proj", "c_k", "key", "k_lin", "wk"),
    "v": ("v_proj", "c_v", "value", "v_lin", "wv"),
    "o": ("o_proj", "out_lin", "wo"),
    "up": ("up_proj", "gate_proj", "gate_up_proj", "c_fc", "fc", "fc1", "fc_in", "dense_h_to_4h", "lin1", "w1", "w3"),
    "down": ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2", "w2"),
    "head": ("lm_head", "embed_out", "output", "head", "unembed"),
}
_JOINT = ("c_attn", "query_key_value", "qkv_proj", "qkv", "wqkv", "in_proj")  # queries, keys and values in one matrix
_OUT_OF_EITHER = ("c_proj", "proj", "out_proj", "dense")  # of attention or of the MLP: the module around it says which


def linear_layers(model: nn.Module, projections: Sequence[str]) -> list[nn.Module]:
    """Linear layers of the chosen kinds; in somebody else's model, all of them where every kind is chosen.

    The output matrix of this package's models is a table's, and no layer.

    Args:
        projections: some of `PROJECTIONS`.

    Raises:
        InputError: somebody else's model, with no layer of a kind that is asked for.
    """
    if isinstance(model, GPT):
        return [block.get_submodule(_OURS[name]) for block in model.blocks for name in projections if name in _OURS]
    layers = [(path, module) for path, module in model.named_modules() if is_linear(module)]
    if _ALL <= set(projections):
        chosen, missing = [module for _, module in layers], [] if layers else ["linear layer"]
    else:
        kinds = [_kinds(path) for path, _ in layers]
        chosen = [module for (_, module), kind in zip(layers, kinds, strict=True) if kind & set(projections)]
        missing = [name for name in projections if not any(name in kind for kind in kinds)]
    if missing:
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path, _ in layers)) or "none"
        raise InputError(f"projections: the model has no {missing[0]!r} by any name known; its linear layers: {names}")
    return chosen


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix: torch's linear layer, or GPT-2's, which is stored transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def widths(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    n_out, n_in = layer.get_parameter("weight").shape
    return (n_out, n_in) if isinstance(layer, nn.Linear) else (n_in, n_out)


def _kinds(path: str) -> set[str]:
    around, _, name = path.lower().rpartition(".")
    if name in _JOINT:
        return {"q", "k", "v"}
    if name in _OUT_OF_EITHER:
        return {"o" if "att" in around else "down"}
    return {kind for kind, names in _THEIRS.items() if name in names}
