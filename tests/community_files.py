"""Files as other people's scripts write them, made here from any model, each by the rules of its generation."""

import io
import json
import lzma
import zlib

import brotli
import torch

CONTROL = (
    "attn_scale",
    "mlp_scale",
    "resid_mix",
    "q_gain",
    "skip_weights",
    "smear",
    "ve_layer_scales",
    "ve_shared.scale",
)
KEPT = 300  # values up to which a tensor is stored as it is; 65,536 in the scripts, whose models are larger


def rows(weight, limit):
    """Codes and a float16 scale for each row, by the largest magnitude."""
    scale = (weight.abs().amax(1) / limit).clamp_min(1e-7).half()
    return (weight / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8), scale


def quantized(state, words=False):
    """PR #1019's dictionaries (PR #1394's with words), and the state dict that its loader would make of them."""
    weights, meta, loaded = {}, {}, {}
    for name, tensor in state.items():
        if tensor.numel() <= KEPT or tensor.ndim != 2:
            weights[name], meta[name] = tensor.half(), "passthrough (float16)" if words else "passthrough"
            loaded[name] = tensor.half().float()
        elif any(part in name for part in CONTROL):
            weights[name], meta[name] = tensor.float(), "passthrough_ctrl"
            loaded[name] = tensor.float()
        else:
            bits = 6 if ".mlp." in name or ".attn." in name else 8
            weights[f"{name}.q"], weights[f"{name}.scale"] = codes, scale = rows(tensor, 2 ** (bits - 1) - 1)
            meta[name] = f"gptq (int{bits})" if words else {"type": f"int{bits}"}
            loaded[name] = codes.float() * scale.float()[:, None]
    return {"w": weights, "m": meta}, loaded


def saved(contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def shuffled(data, header):
    return header + b"".join(data[offset::2] for offset in range(2))


def pr1019(state):
    contents, loaded = quantized(state)
    return lzma.compress(saved(contents), preset=6), loaded


def pr1179(state):
    contents, loaded = quantized(state)
    return brotli.compress(shuffled(saved(contents), b"BSHF\2\0"), quality=5), loaded


def pr1394(state):
    contents, loaded = quantized(state, words=True)
    return brotli.compress(shuffled(saved(contents), b"BSHF\2"), quality=5), loaded


def baseline(state):
    quantized_, scales, kept, loaded = {}, {}, {}, {}
    for name, tensor in state.items():
        if tensor.numel() <= KEPT or tensor.ndim != 2:
            kept[name] = tensor.float() if any(part in name for part in CONTROL) else tensor.half()
            loaded[name] = kept[name].float()
        else:
            quantized_[name], scales[name] = codes, scale = rows(tensor, 127)
            loaded[name] = codes.float() * scale.float()[:, None]
    contents = {
        "__quant_format__": "int8_clean_per_row_v1",
        "quantized": quantized_,
        "scales": scales,
        "dtypes": dict.fromkeys(quantized_, "float32"),
        "passthrough": kept,
        "qmeta": {name: {"scheme": "per_row", "axis": 0} for name in quantized_},
        "passthrough_orig_dtypes": dict.fromkeys(kept, "float32"),
    }
    return zlib.compress(saved(contents), 9), loaded


def banked(state):
    """The training form: all layers' matrices of a kind in one tensor."""
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    kinds = {
        "qo_bank": ("attn.c_q", "attn.proj"),
        "kv_bank": ("attn.c_k", "attn.c_v"),
        "mlp_up_bank": ("mlp.fc",),
        "mlp_down_bank": ("mlp.proj",),
    }
    rest = dict(state)
    banks = {
        bank: torch.stack([rest.pop(f"blocks.{layer}.{part}.weight") for part in parts for layer in range(layers)])
        for bank, parts in kinds.items()
    }
    return {**banks, **rest}


def checkpoint(state):
    return saved({"step": 7, "model_state_dict": {f"module.{name}": value for name, value in state.items()}}), state


def bank_checkpoint(state):
    return saved(banked(state)), state


def safetensors(state):
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data, state


FORMS = {
    "final_model.int6.ptz of PR #1019": pr1019,
    "final_model.int6.ptz of PR #1179": pr1179,
    "final_model.int6.ptz of PR #1394": pr1394,
    "final_model.int8.ptz of the baseline": baseline,
    "checkpoint.pt": checkpoint,
    "final_model.pt in banks": bank_checkpoint,
    "model.safetensors": safetensors,
}
