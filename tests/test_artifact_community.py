"""Other people's files: each generation gives the losses of the model that it was made from; the rest is refused."""

import io
import lzma
import os
import pickle
import zipfile

import brotli
import pytest
import torch

from slotfast.artifact import Artifact, load_artifact, parse_overrides, read_community, write_artifact, write_community
from slotfast.errors import InputError
from slotfast.model import GPT, GPTConfig, rotary_table
from slotfast.quantize import QuantizedMatrix
from tests.community_files import FORMS, baseline, pr1019, pr1179, pr1394, quantized, safetensors, saved

# What PR #1019's line has, and nothing in its files says, is what is assumed of them.
SHAPES = {
    "every part": dict(layers=3, width=32, heads=2, kv_heads=1, bigram_buckets=40, value_width=8, value_layers=(1, 2)),
    "heads alike, deeper": dict(layers=5, width=48, heads=3, kv_heads=3, bigram_buckets=16, value_layers=(3, 4)),
    "skip gates": dict(layers=4, width=32, heads=2, kv_heads=1, bigram_buckets=9, value_layers=(3,), skip_gates=True),
    "no tables": dict(layers=4, width=64, heads=2, kv_heads=2, bigram_buckets=0, value_width=0, value_layers=()),
    "untied": dict(layers=2, width=32, heads=1, kv_heads=1, bigram_buckets=16, value_layers=(1,), tied=False),
}
BASELINE = dict(
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    bigram_buckets=0,
    value_width=0,
    value_layers=(),
    smear=False,
    xsa_layers=0,
    ln_scale=False,
    mlp_slope=0.0,
    rope_dims=8,
    rope_length=1 << 17,
    seq_len=1024,
)


def _model(**settings):
    torch.manual_seed(3)
    small = dict(vocab_size=70, mlp_width=40, bigram_width=8, value_width=8) | settings
    rope = min(16, small["width"] // small["heads"])
    model = GPT(GPTConfig(**dict(rope_dims=rope, xsa_layers=small["layers"]) | small))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model.eval().requires_grad_(False)


def _nll(model):
    tokens = torch.randint(70, (2, 41), generator=torch.Generator().manual_seed(1))
    logits = model.head(model.hidden(tokens[:, :-1]))
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def _with_state(config, state):
    model = GPT(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


CASES = {
    f"{form}, {shape}": (make, SHAPES[shape])
    for form, make in FORMS.items()
    if make is not baseline
    for shape in SHAPES
} | {"the baseline's": (baseline, BASELINE), "a plain checkpoint of the baseline": (safetensors, BASELINE)}


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES.keys())
def test_each_form_gives_the_losses_of_its_model(make, shape, tmp_path):
    model = _model(**shape)
    data, loaded = make(model.state_dict())
    path = tmp_path / "final_model"
    path.write_bytes(data)
    artifact = load_artifact(path)
    unsaid = {key: getattr(artifact.config, key) for key in ("qk_gain", "bigram_width")}  # without effect here
    assert artifact.config == model.config.model_copy(update=unsaid)
    assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
    assert artifact.unigram is None and artifact.metadata["assumed"]["softcap"] == 30.0


def test_codes_stay_codes(tmp_path):
    model = _model(**SHAPES["every part"])
    for make in (pr1019, pr1179, pr1394):
        (tmp_path / "a").write_bytes(make(model.state_dict())[0])
        tensors = load_artifact(tmp_path / "a").tensors
        kinds = {name: t.bits for name, t in tensors.items() if isinstance(t, QuantizedMatrix)}
        assert kinds["blocks.0.mlp.fc.weight"] == 6 and kinds["tok_emb.weight"] == 8
        packed = load_artifact(tmp_path / "a").model("int6")
        assert (_nll(packed) - _nll(load_artifact(tmp_path / "a").model())).abs().max() < 1e-4


def test_a_file_without_codes_cannot_run_on_packed_weights(tmp_path):
    (tmp_path / "a").write_bytes(safetensors(_model(**BASELINE).state_dict())[0])
    with pytest.raises(InputError, match="no linear layer of 6 bits"):
        load_artifact(tmp_path / "a").model("int6")


def test_there_and_back(tmp_path, tiny_model):
    """Ours to PR #1019's form and back: the same codes, the same losses."""
    artifact = Artifact.from_model(tiny_model, {"seed": 1}, torch.rand(64).softmax(0))
    write_community(tmp_path / "a.ptz", artifact)
    raw = torch.load(io.BytesIO(lzma.decompress((tmp_path / "a.ptz").read_bytes())), weights_only=True)
    assert raw["m"]["blocks.0.mlp.fc.weight"] == {"type": "int6"} and raw["m"]["smear.gate"] == "passthrough"
    back = load_artifact(tmp_path / "a.ptz", {"seq_len": 32, "rope_dims": 4, "xsa_layers": 11})
    write_artifact(tmp_path / "b.slotfast", back)
    again = load_artifact(tmp_path / "b.slotfast")
    tokens = torch.arange(32)[None]
    for model in (back.model(), again.model()):
        assert torch.equal(model.hidden(tokens), artifact.model().hidden(tokens))


def test_guesses_can_be_overridden(tmp_path):
    model = _model(**SHAPES["every part"] | {"rope_dims": 4, "xsa_layers": 1, "softcap": 9.0, "value_layers": (0, 2)})
    data, loaded = pr1019(model.state_dict())
    (tmp_path / "a").write_bytes(data)
    for text in (
        "rope_dims=4,xsa_layers=1,softcap=9,value_layers=[0,2]",
        '{"rope_dims": 4, "xsa_layers": 1, "softcap": 9.0, "value_layers": [0, 2]}',
    ):
        artifact = load_artifact(tmp_path / "a", parse_overrides(text))
        assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
        assert {"rope_dims", "softcap"}.isdisjoint(artifact.metadata["assumed"])
    assert not torch.equal(_nll(load_artifact(tmp_path / "a").model()), _nll(_with_state(model.config, loaded)))
    for text, message in (
        ("rope_dim=4", "'rope_dim': no such setting; the nearest is rope_dims"),
        ("rope_dims=5", "rope_dims 5: expected an even number"),
        ("softcap=warm", "expected KEY=VALUE"),
        ("softcap", "expected KEY=VALUE"),
        ("{", "expected KEY=VALUE"),
        ("layers=7", "'skip_weights' has shape"),
        ("width=64", "has shape"),
    ):
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a", parse_overrides(text))
    assert parse_overrides(None) == parse_overrides("") == {}


def test_our_own_files_take_no_settings(tmp_path, tiny_model):
    write_artifact(tmp_path / "a", Artifact.from_model(tiny_model, {}))
    with pytest.raises(InputError, match="says itself what its model is"):
        load_artifact(tmp_path / "a", {"softcap": 3.0})


STRANGERS = {
    "low-rank corrections": ({"tok_emb.weight.lqA_a": torch.zeros(2, dtype=torch.int8)}, {}, "LQER"),
    "8-bit gates": ({"blocks.0.attn.gate.gq": torch.zeros(2, dtype=torch.int8)}, {}, "attention gates"),
    "biases": ({"blocks.0.mlp.fc.bias": torch.zeros(40)}, {}, "a bias"),
    "parts nobody knows": (
        {"jepa.head": torch.zeros(2)},
        {},
        "'jepa.head' has no home in this model: of an unknown part",
    ),
    "another kind of code": ({}, {"tok_emb.weight": "ternary"}, "stored as 'ternary', which has no home"),
    "a correction in the meta": ({}, {"tok_emb.weight": "gptq (int8)+lqer_asym"}, "stored as 'gptq .int8.+lqer_asym'"),
    "a missing tensor": ({}, {"blocks.1.attn_scale": None}, "meta of 'blocks.1.attn_scale'"),
    "a missing matrix": ({}, {"blocks.7.attn.c_q.weight": {"type": "int6"}}, "'blocks.7.attn.c_q.weight.q' is missing"),
    "NaN": ({"smear.gate": torch.full((32,), torch.nan)}, {}, "'smear.gate' holds NaN"),
    "an infinite scale": (
        {"tok_emb.weight.scale": torch.full((70,), torch.inf).half()},
        {},
        "'tok_emb.weight' holds NaN or inf",
    ),
    "codes beyond their bits": (
        {"blocks.0.mlp.fc.weight.q": torch.full((40, 32), 99).char()},
        {},
        "holds codes from 99 to 99",
    ),
    "codes that are floats": ({"tok_emb.weight.q": torch.zeros(70, 32)}, {}, "torch.float32 codes"),
    "scales of another number": (
        {"tok_emb.weight.scale": torch.ones(3).half()},
        {},
        r"\[3\] scales for \[70, 32\] codes",
    ),
}


@pytest.mark.parametrize(("weights", "meta", "message"), STRANGERS.values(), ids=STRANGERS.keys())
def test_what_has_no_home_is_named(weights, meta, message, tmp_path):
    contents, _ = quantized(_model(**SHAPES["every part"]).state_dict())
    contents["w"] |= weights
    contents["m"] |= meta
    (tmp_path / "a").write_bytes(saved(contents))
    with pytest.raises(InputError, match=message) as caught:
        read_community(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_what_plays_no_part_in_scoring_is_left_out(tmp_path):
    model = _model(**SHAPES["every part"])
    state = dict(model.state_dict()) | {"mtp_heads.0.weight": torch.zeros(70, 32)}
    (tmp_path / "a").write_bytes(saved(state))
    artifact = load_artifact(tmp_path / "a")
    assert artifact.metadata["left_out"] == ["mtp_heads.0.weight"]
    assert torch.equal(_nll(artifact.model()), _nll(model))


class _Malice:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickles_are_not_executed(tmp_path):
    touched = tmp_path / "touched"
    for function in (os.system, exec, eval):
        argument = f"touch {touched}" if function is os.system else f"open({str(touched)!r}, 'w')"
        data = saved({"w": {"x": _Malice(function, argument)}, "m": {}})
        for form in (data, lzma.compress(data)):
            (tmp_path / "a").write_bytes(form)
            with pytest.raises(InputError, match=f"its pickle names '[a-z_]+.{function.__name__}': it holds more than"):
                load_artifact(tmp_path / "a")
            assert not touched.exists()
        (tmp_path / "a").write_bytes(pickle.dumps({"x": _Malice(function, argument)}))
        with pytest.raises(InputError):
            load_artifact(tmp_path / "a")
    assert not touched.exists()


def _archive(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _members(contents):
    with zipfile.ZipFile(io.BytesIO(saved(contents))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_sizes_in_pickles_are_held_against_the_archive(tmp_path):
    members = _members({"a": torch.arange(16, dtype=torch.int8)})
    program = members["archive/data.pkl"]
    more = b"J\0\0\x10\0"
    for changed, message in (
        (program.replace(b"cpuq\6K\x10t", b"cpuq\6" + more + b"t"), "a storage of 16 bytes for 1048576 values"),
        (program.replace(b"K\x10\x85", more + b"\x85"), r"a tensor \[1048576\] in a storage of 16 values"),
        (program.replace(b"K\x10\x85q\x08K\1", more + b"\x85q\x08K\0"), r"a tensor \[1048576\] in a storage of 16"),
        (program.replace(b"QK\0K\x10", b"QK\7K\x10"), r"a tensor \[16\] in a storage of 16"),
        (program[:-1], "damaged pickle: .* pickle exhausted before seeing STOP"),
        (b"\x80\2" + b"]" * 100 + b".", "damaged pickle"),
        (b"\x80\2i1\n2\n.", "instruction INST|damaged"),
        (b"\x80\2}" + b")" + b"\x85" * 200_000 + b"K\1s.", "a key of type tuple"),
    ):
        assert changed != program
        (tmp_path / "a").write_bytes(_archive(members | {"archive/data.pkl": changed}))
        with pytest.raises(InputError, match=message) as caught:
            load_artifact(tmp_path / "a")
        assert "\n" not in str(caught.value)


def test_archives_that_torch_does_not_write(tmp_path):
    members = _members({"a": torch.zeros(1 << 16)})
    for data, message in (
        (_archive(members, compression=zipfile.ZIP_DEFLATED), "compressed members"),
        (_archive({"a/data.pkl": b".", "b/data.pkl": b"."}), "2 data.pkl"),
        (_archive({"x": b""}), "0 data.pkl"),
        (_archive({"archive/data.pkl": bytes(1 << 21)}), "a pickle of 2097152 bytes"),
        (_archive(members | {"archive/byteorder": b"big"}), "not little-endian"),
        (saved({"a": torch.zeros(9)})[:-30], "damaged archive"),
        (saved([1, 2]), "holds a list"),
        (saved({"a": 3}), "entry 'a' is no tensor"),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")


def test_safetensors_that_lie(tmp_path):
    data, _ = safetensors(_model(**BASELINE).state_dict())
    for spoilt, message in (
        (data[:-1], "ends behind the file"),
        (data + b"x", "1 bytes behind the last tensor"),
        ((1 << 60).to_bytes(8, "little") + data[8:], "a header of"),
        (data.replace(b'"F32"', b'"X32"', 1), "a header that is none"),
        (data.replace(b'"shape": [70', b'"shape": [71', 1), "at bytes"),
        (data.replace(b'"data_offsets": [0', b'"data_offsets": [9', 1), "at bytes"),
    ):
        assert spoilt != data
        (tmp_path / "a").write_bytes(spoilt)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")


def test_other_files(tmp_path):
    for data, message in (
        (b"", "expected one of"),
        (b"hello, world" * 9, "expected one of"),
        (b"PGRP" + bytes(99), "PR #1855's grouped container"),
        (lzma.compress(b"text"), "holds b'text' compressed as xz"),
        (brotli.compress(b"BSHF\x63" + bytes(50)), "stride of 99"),
        (brotli.compress(b"BSHF"), "stride of 0"),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be read"):
        load_artifact(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        load_artifact(tmp_path)


def test_repeated_layers_are_not_seen_in_the_names(tmp_path):
    """PR #1394's: more skips than the layers alone have, which only --model-config explains."""
    model = _model(**SHAPES["skip gates"] | {"loops": 1, "loop_start": 1, "loop_end": 2})
    data, loaded = pr1394(model.state_dict())
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=r"'skip_weights' has shape \[3, 32\], this model has \[2, 32\]"):
        load_artifact(tmp_path / "a")
    artifact = load_artifact(tmp_path / "a", parse_overrides("loops=1,loop_start=1,loop_end=2"))
    assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))


def test_rotary_frequencies_of_the_published_evaluation(tmp_path):
    """Its model is cast to bfloat16 with its frequencies; inputs that stretch the base compute them anew."""
    model = _model(**SHAPES["every part"])
    (tmp_path / "a").write_bytes(pr1019(model.state_dict())[0])
    plain, rounded = (load_artifact(tmp_path / "a", parse_overrides(text)) for text in (None, "rope_bf16=true"))
    short, long = torch.arange(40)[None], torch.arange(1100)[None] % 70
    assert not torch.equal(plain.model().hidden(short), rounded.model().hidden(short))
    assert torch.equal(plain.model().hidden(long), rounded.model().hidden(long))
    frequency = (10_000 ** (-torch.arange(0, 16, 2) / 16)).bfloat16().float()
    cos, _ = rotary_table(40, rounded.config, torch.arange(40))
    assert (cos - torch.outer(torch.arange(40), frequency).cos()).abs().max() < 1e-5
