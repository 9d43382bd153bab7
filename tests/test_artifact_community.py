"""Other people's files: each generation gives the losses of the model that it was made from; the rest is refused."""

import io
import lzma
import zlib

import pytest
import torch
import zstandard

from slotfast.artifact import Artifact, load_artifact, parse_overrides, read_community, write_artifact, write_community
from slotfast.artifact.community import decode_community
from slotfast.errors import InputError
from slotfast.model import GPT, rotary_table
from slotfast.quantize import QuantizedMatrix
from tests.community_files import (
    FORMS,
    baseline,
    corrected,
    pr1019,
    pr1179,
    pr1394,
    pr1855,
    quantized,
    safetensors,
    saved,
)
from tests.models import randomised

# All else is as PR #1019 has it.
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
    small = dict(vocab_size=70, mlp_width=40, bigram_width=8, value_width=8) | settings
    rope = min(16, small["width"] // small["heads"])
    return randomised(dict(rope_dims=rope, xsa_layers=small["layers"]) | small, seed=3)


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
    generation = "baseline" if shape is BASELINE else "pr1019"
    artifact = load_artifact(path, {"generation": generation})
    unsaid = {key: getattr(artifact.config, key) for key in ("qk_gain", "bigram_width")}  # without effect here
    assert artifact.config == model.config.model_copy(update=unsaid)
    assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
    assert artifact.unigram is None and artifact.metadata["assumed"]["softcap"] == 30.0
    assert artifact.metadata["generation"] == generation


def test_codes_stay_codes(tmp_path):
    model = _model(**SHAPES["every part"])
    for make in (pr1019, pr1179, pr1394):
        (tmp_path / "a").write_bytes(make(model.state_dict())[0])
        artifact = load_artifact(tmp_path / "a", {"generation": "pr1019"})
        kinds = {name: t.bits for name, t in artifact.tensors.items() if isinstance(t, QuantizedMatrix)}
        assert kinds["blocks.0.mlp.fc.weight"] == 6 and kinds["tok_emb.weight"] == 8
        assert (_nll(artifact.model("int6")) - _nll(artifact.model())).abs().max() < 1e-4


def test_a_file_without_codes_cannot_run_on_packed_weights(tmp_path):
    (tmp_path / "a").write_bytes(safetensors(_model(**BASELINE).state_dict())[0])
    with pytest.raises(InputError, match="no linear layer of 6 bits"):
        load_artifact(tmp_path / "a", {"generation": "baseline"}).model("int6")


def test_there_and_back(tmp_path, tiny_model):
    """Ours to PR #1019's form and back: the same codes, the same losses."""
    artifact = Artifact.from_model(tiny_model, {"seed": 1}, torch.rand(64).softmax(0))
    write_community(tmp_path / "a.ptz", artifact)
    raw = torch.load(io.BytesIO(lzma.decompress((tmp_path / "a.ptz").read_bytes())), weights_only=True)
    assert raw["m"]["blocks.0.mlp.fc.weight"] == {"type": "int6"} and raw["m"]["smear.gate"] == "passthrough"
    back = load_artifact(tmp_path / "a.ptz", parse_overrides("pr1019,seq_len=32,rope_dims=4,xsa_layers=11"))
    write_artifact(tmp_path / "b.slotfast", back)
    again = load_artifact(tmp_path / "b.slotfast")
    tokens = torch.arange(32)[None]
    for model in (back.model(), again.model()):
        assert torch.equal(model.hidden(tokens), artifact.model().hidden(tokens))


def test_a_generation_can_be_overridden(tmp_path):
    model = _model(**SHAPES["every part"] | {"rope_dims": 4, "xsa_layers": 1, "softcap": 9.0, "value_layers": (0, 2)})
    data, loaded = pr1019(model.state_dict())
    (tmp_path / "a").write_bytes(data)
    for text in (
        "pr1019,rope_dims=4,xsa_layers=1,softcap=9,value_layers=[0,2]",
        "rope_dims=4, xsa_layers=1, value_layers=[0,2], pr1019, softcap=9",
        '{"rope_dims": 4, "xsa_layers": 1, "softcap": 9.0, "value_layers": [0, 2], "generation": "pr1019"}',
    ):
        artifact = load_artifact(tmp_path / "a", parse_overrides(text))
        assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
        assert {"rope_dims", "softcap"}.isdisjoint(artifact.metadata["assumed"])
    plain = load_artifact(tmp_path / "a", {"generation": "pr1019"})
    assert not torch.equal(_nll(plain.model()), _nll(_with_state(model.config, loaded)))
    for text, message in (
        ("rope_dim=4", "'rope_dim': no such setting; the nearest is rope_dims"),
        ("rope_dims=5", "rope_dims 5: expected an even number"),
        ("softcap=warm", "expected KEY=VALUE"),
        ("softcap", "expected KEY=VALUE"),
        ("{", "expected KEY=VALUE"),
        ("pr1018", "expected KEY=VALUE,KEY=VALUE, a generation .baseline, pr287, pr549"),
        ('{"generation": "pr1018"}', "'pr1018': no such generation; the nearest is pr"),
        ("xsa_layers=1,rope_bf16=true,xsa_layers=2", "given twice"),
        ('{"xsa_layers": 1, "xsa_layers": 2}', "nothing twice"),
        ("pr1019,pr549", "given twice"),
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
    "a tensor beside its codes": ({"tok_emb.weight": torch.zeros(70, 32)}, {}, "'tok_emb.weight' is stored twice"),
    "packed weights": ({}, {"tok_emb.weight": "fp8"}, "no home in this model: packing is not supported"),
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
    artifact = load_artifact(tmp_path / "a", {"generation": "pr1019"})
    assert artifact.metadata["left_out"] == ["mtp_heads.0.weight"]
    assert torch.equal(_nll(artifact.model()), _nll(model))


def test_repeated_layers_are_not_seen_in_the_names(tmp_path):
    """More skips than the layers alone have, which only --model-config explains."""
    model = _model(**SHAPES["skip gates"] | {"loops": 1, "loop_start": 1, "loop_end": 2})
    data, loaded = pr1394(model.state_dict())
    (tmp_path / "a").write_bytes(data)
    message = (
        r"'skip_weights' has shape \[3, 32\], this model has \[2, 32\]: .*loops=, loop_start=, loop_end= say which"
    )
    for told in ({}, {"generation": "pr1019"}, {"loops": 0}):
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a", told)
    artifact = load_artifact(tmp_path / "a", parse_overrides("pr1019,loops=1,loop_start=1,loop_end=2"))
    assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))


def test_rotary_frequencies_of_the_published_evaluation(tmp_path):
    """Its model is cast to bfloat16 with its frequencies; inputs that stretch the base compute them anew."""
    model = _model(**SHAPES["every part"])
    (tmp_path / "a").write_bytes(pr1019(model.state_dict())[0])
    plain, rounded = (
        load_artifact(tmp_path / "a", parse_overrides(text)) for text in ("pr1019", "pr1019,rope_bf16=true")
    )
    short, long = torch.arange(40)[None], torch.arange(1100)[None] % 70
    assert not torch.equal(plain.model().hidden(short), rounded.model().hidden(short))
    assert torch.equal(plain.model().hidden(long), rounded.model().hidden(long))
    frequency = (10_000 ** (-torch.arange(0, 16, 2) / 16)).bfloat16().float()
    cos, _ = rotary_table(40, rounded.config, torch.arange(40))
    assert (cos - torch.outer(torch.arange(40), frequency).cos()).abs().max() < 1e-5


@pytest.mark.parametrize("asymmetric", [True, False])
def test_low_rank_corrections_are_added(asymmetric, tmp_path):
    model = _model(**SHAPES["every part"])
    contents, loaded = corrected(model.state_dict(), asymmetric)
    (tmp_path / "a").write_bytes(saved(contents))
    artifact = load_artifact(tmp_path / "a", {"generation": "pr1019"})
    assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
    rounded = _with_state(model.config, quantized(model.state_dict(), words=True)[1])
    assert not torch.equal(_nll(artifact.model()), _nll(rounded))
    end = "_a" if asymmetric else ""
    for part, spoilt in (
        (f"lqA{end}", torch.zeros(3, 2, dtype=torch.int8)),
        (f"lqB{end}", torch.zeros(64, dtype=torch.int8)),
        (f"lqBs{end}", torch.zeros(0).half()),
        (f"lqBs{end}", torch.ones(7).half()),
        (f"lqAs{end}", torch.ones(7).half()),
    ):
        changed = {"w": contents["w"] | {f"tok_emb.weight.{part}": spoilt}, "m": contents["m"]}
        (tmp_path / "a").write_bytes(saved(changed))
        with pytest.raises(InputError, match="'tok_emb.weight': its correction, .* does not fit"):
            load_artifact(tmp_path / "a", {"generation": "pr1019"})


def test_parts_that_the_model_lacks_are_all_named(tmp_path):
    """PR #1855's brotli form: decoded, and not evaluated."""
    model = _model(**SHAPES["skip gates"])
    data, loaded = pr1855(model.state_dict())
    (tmp_path / "a").write_bytes(data)
    decoded = decode_community(tmp_path / "a")
    for name, wanted in loaded.items():
        tensor = decoded.tensors[name]
        assert torch.equal(tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else tensor.float(), wanted)
    assert decoded.tensors.keys() == loaded.keys()
    for told in ({}, {"generation": "pr1019"}):
        with pytest.raises(InputError) as caught:
            load_artifact(tmp_path / "a", told)
        for part in ("'blocks.0.attn.attn_gate_w' (and 3 more)", "'smear_gate.weight'", "'parallel_post_lambdas'"):
            assert part in str(caught.value)


def test_formats_of_the_baselines_line(tmp_path):
    """The same layout under names of fewer bits is read, a layout that nobody knows is named."""
    model = _model(**BASELINE)
    data, loaded = baseline(model.state_dict())
    contents = torch.load(io.BytesIO(zlib.decompress(data)), weights_only=True)
    for name in ("int6_clean_per_row_v1", "int5_int6_clean_per_row_v1"):
        (tmp_path / "a").write_bytes(zstandard.compress(saved(contents | {"__quant_format__": name})))
        artifact = load_artifact(tmp_path / "a", {"generation": "baseline"})
        assert torch.equal(_nll(artifact.model()), _nll(_with_state(model.config, loaded)))
    (tmp_path / "a").write_bytes(saved(contents | {"__quant_format__": "int6_rans_per_row_v1"}))
    with pytest.raises(InputError, match="packed as 'int6_rans_per_row_v1': such packing is not supported"):
        load_artifact(tmp_path / "a")
    twice = contents | {"passthrough": contents["passthrough"] | {"tok_emb.weight": torch.zeros(70, 32)}}
    (tmp_path / "a").write_bytes(saved(twice))
    with pytest.raises(InputError, match="'tok_emb.weight' is stored twice"):
        load_artifact(tmp_path / "a")


def test_a_repeated_layers_own_scales_are_no_layer(tmp_path):
    """PR #1204's: blocks behind the last one that have scales and no matrices."""
    state = dict(_model(**SHAPES["skip gates"]).state_dict())
    (tmp_path / "a").write_bytes(saved(state | {"blocks.4.attn_scale": torch.ones(32)}))
    with pytest.raises(
        InputError, match="'blocks.4.attn_scale' has no home in this model: scales that a repeated layer"
    ):
        load_artifact(tmp_path / "a", {"generation": "pr1204"})
