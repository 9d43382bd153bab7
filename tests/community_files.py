"""Files as other people's scripts write them, made here from any model, each by the rules of its generation."""

import io
import json
import lzma
import zlib

import brotli
import torch
import zstandard

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


def quantized(state, words=False, mlp_bits=6):
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
            bits = mlp_bits if ".mlp." in name else 6 if ".attn." in name else 8
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


def pr287(state):
    contents, loaded = quantized(state)
    return zstandard.ZstdCompressor(level=5).compress(saved(contents)), loaded


def mixed(state):
    """March's: five bits in the MLPs."""
    contents, loaded = quantized(state, mlp_bits=5)
    return zstandard.ZstdCompressor(level=5).compress(saved(contents)), loaded


def corrected(state, asymmetric=True, rank=2, group=4):
    """PR #1797's dictionaries: three matrices with low-rank corrections of their rounding errors."""
    contents, loaded = quantized(state, words=True)
    for name in ("blocks.0.attn.c_q.weight", "blocks.1.mlp.fc.weight", "tok_emb.weight"):
        u, s, v = torch.linalg.svd(state[name] - loaded[name], full_matrices=False)
        a, b = u[:, :rank] * s[:rank], v[:rank]
        if asymmetric:  # two bits with one scale, four bits with a scale for every `group` values
            a_scale = (a.abs().max() / 1.5).half()
            b_scale = (b.reshape(-1, group).abs().amax(1) / 7.5).half()
            codes_a = (a / a_scale.float()).round().clamp(-2, 1).char()
            codes_b = (b.reshape(-1, group) / b_scale.float()[:, None]).round().clamp(-8, 7).char()
            low = codes_a.float() * a_scale.float()
            high = (codes_b.float() * b_scale.float()[:, None]).reshape(b.shape)
            codes_b, end = codes_b.reshape(b.shape), "_a"
        else:
            (codes_a, a_scale), (codes_b, b_scale), end = rows(a, 7), rows(b, 7), ""
            low, high = codes_a.float() * a_scale.float()[:, None], codes_b.float() * b_scale.float()[:, None]
        parts = {"lqA": codes_a, "lqAs": a_scale, "lqB": codes_b, "lqBs": b_scale}
        contents["w"] |= {f"{name}.{part}{end}": value for part, value in parts.items()}
        contents["m"][name] += "+lqer_asym" if asymmetric else "+lqer"
        loaded[name] = loaded[name] + low @ high
    return contents, loaded


def pr1797(state):
    contents, loaded = corrected(state)
    return brotli.compress(shuffled(saved(contents), b"BSHF\2"), quality=5), loaded


def pr1855(state):
    """Its brotli form: corrections, gates of eight bits, a smear gate that looks at the token, residual lanes."""
    contents, loaded = corrected(state)
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for layer in range(layers):
        name, gate = f"blocks.{layer}.attn.attn_gate_w", torch.randn(2, 12)
        contents["w"][f"{name}.gq"], contents["w"][f"{name}.gs"] = codes, scale = rows(gate, 127)
        contents["m"][name], loaded[name] = "gate_int8_row", codes.float() * scale.float()[:, None]
    for name, size in {
        "smear_gate.weight": (1, 12),
        "smear_lambda": (1,),
        "parallel_post_lambdas": (layers, 2, 2),
        "parallel_resid_lambdas": (layers, 2),
    }.items():
        contents["w"][name], contents["m"][name] = torch.ones(size).half(), "passthrough (float16)"
        loaded[name] = torch.ones(size)
    return brotli.compress(shuffled(saved(contents), b"BSHF\2"), quality=5), loaded


def packed(state, kind):
    """The ternary entries' dictionaries: packed trits, float8 or two values in a byte."""
    contents = {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or kind == "fp16":
            contents[name] = {"type": "fp16", "data": tensor.half()}
        elif kind == "fp8":
            contents[name] = {"type": kind, "data": tensor.to(torch.float8_e4m3fn)}
        elif kind == "fp4":
            half = torch.zeros(tensor.numel() // 2, dtype=torch.uint8)
            contents[name] = {"type": kind, "packed": half, "scale": tensor[:, 0].half(), "shape": list(tensor.shape)}
        else:
            trits = bytes(range(256)) * (tensor.numel() // 1280 + 1)
            contents[name] = {"type": kind, "packed": trits, "scale": tensor[:, 0].half(), "n_trits": tensor.numel()}
    return lzma.compress(saved(contents), preset=6)


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
    "final_model.int6.ptz of PR #287": pr287,
    "final_model.int6.ptz of five and six bits": mixed,
    "final_model.int6.ptz of PR #1797": pr1797,
    "final_model.int8.ptz of the baseline": baseline,
    "checkpoint.pt": checkpoint,
    "final_model.pt in banks": bank_checkpoint,
    "model.safetensors": safetensors,
}
