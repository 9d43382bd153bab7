"""python -m slotfast.artifact: what it shows, what it converts, how it ends; other people's files in slotfast.eval."""

import json
import sys

import pytest
import torch

from slotfast.artifact import Artifact, __main__, codecs, load_artifact, read_artifact, write_artifact, write_community
from slotfast.audit.setup import read_subject
from slotfast.command.run import run_command
from slotfast.config import AuditSettings
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from slotfast.quantize import QuantizedMatrix
from tests.community_files import pr1394, pr1855, safetensors
from tests.models import randomised


@pytest.fixture
def model():
    """Small, and such as PR #1019 has it."""
    sizes = dict(vocab_size=1024, layers=2, width=16, heads=1, kv_heads=1, mlp_width=24, xsa_layers=2)
    tables = dict(bigram_buckets=16, bigram_width=4, value_width=4, value_layers=(1,))
    return randomised(sizes | tables, seed=1, spread=0.3)


@pytest.fixture
def ours(model, tmp_path):
    path = tmp_path / "a.slotfast"
    write_artifact(path, Artifact.from_model(model, {"seed": 3}, torch.rand(1024).softmax(0)))
    return path


def test_show(ours, capsys):
    __main__.main(["show", str(ours), "--json", str(ours.with_suffix(".json"))])
    text = capsys.readouterr().out
    found = json.loads(ours.with_suffix(".json").read_text())
    assert found["bytes"] == ours.stat().st_size and found["metadata"]["seed"] == 3
    assert found["frequencies"] and not found["calibrated"]
    assert found["weights"] == sum(tensor.numel() for tensor in load_artifact(ours).model().state_dict().values())
    rows = {row["name"]: row for row in found["tensors"]}
    row = rows["tok_emb.weight"]
    assert row["shape"] == [1024, 16] and row["type"] == "int8" and row["codec"] in ("rans", "brotli", "lzma")
    codes = read_artifact(ours).tensors["tok_emb.weight"].codes
    share = torch.bincount(codes.flatten().int() + 128).double() / codes.numel()
    bound = float(-(share * share.clamp_min(1e-30).log2()).sum() / 8 * codes.numel()) + 2 * 1024
    assert row["order0_bytes"] == pytest.approx(bound) and 0.9 * bound < row["bytes"] < 1.1 * bound
    assert rows["smear.gate"]["order0_bytes"] is None and rows["smear.gate"]["type"] == "float"
    (line,) = [line for line in text.splitlines() if line.startswith("tok_emb.weight")]
    assert line.split()[1:3] == ["1024x16", "int8"] and f"{row['bytes']:,}" in line
    assert f"{8 * row['bytes'] / row['weights']:.3f}" in line and f"{8 * bound / row['weights']:.3f}" in line
    assert f"{found['bytes']:,}" in text.splitlines()[-1] and "frequencies" not in text


def test_show_says_what_is_assumed(model, tmp_path, capsys):
    (tmp_path / "a.ptz").write_bytes(pr1394({**model.state_dict(), "mtp_heads.0.weight": torch.zeros(4, 4)})[0])
    __main__.main(["show", str(tmp_path / "a.ptz"), "--model-config", "pr1019,softcap=15"])
    text = capsys.readouterr().out
    assert "form      brotli, shuffled" in text and "assumed   seq_len=2048, mlp_slope=0.5, rope_dims=16" in text
    assert "softcap" not in text and "left out  mtp_heads.0.weight" in text and "no training frequencies" in text
    assert "pr1019 has it so" in text and "unsaid" not in text and "resembles" not in text
    __main__.main(["show", str(tmp_path / "a.ptz"), "--model-config", "pr1218"])
    assert "resembles pr1019 or pr1350 or pr549, not pr1218" in capsys.readouterr().out
    __main__.main(["show", str(tmp_path / "a.ptz"), "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["softcap"] == 30.0 and found["config"]["layers"] == 2 and "mlp_slope" not in found["config"]


def test_what_a_hostile_file_says_is_not_obeyed(model, tmp_path, capsys):
    """Names move no cursor, and our own form's metadata are nothing but shown."""
    state = {**model.state_dict(), "mtp_heads.\33[2J": torch.zeros(4, 4), "x\n\33]0;y\7": torch.zeros(2)}
    (tmp_path / "a.ptz").write_bytes(pr1394(state)[0])
    __main__.main(["show", str(tmp_path / "a.ptz")])
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "mtp_heads.\\x1b[2J" in text and "x\\n\\x1b]0;y\\x07" in text
    metadata = {"assumed": 3, "format": "\33[2J", "generation": 1, "resembles": 2, "left_out": 5}
    write_artifact(tmp_path / "b", Artifact.from_model(model, metadata))
    __main__.main(["show", str(tmp_path / "b")])
    evaluate(["--artifact", str(tmp_path / "b"), "--max-tokens", "80", "--seq-len", "64", "--preset", "none"])
    told = capsys.readouterr()
    assert "\33" not in told.out + told.err and "assumed" not in told.err


def test_show_says_what_the_file_does_not(model, tmp_path, capsys):
    """And what this model lacks; all that the file does hold is shown."""
    (tmp_path / "a.ptz").write_bytes(pr1855({**model.state_dict()})[0])
    __main__.main(["show", str(tmp_path / "a.ptz"), "--json", str(tmp_path / "a.json")])
    lines, found = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "a.json").read_text())
    (unsaid,) = [line for line in lines if line.startswith("unsaid")]
    assert "mlp_slope, rope_dims, rope_length, xsa_layers, ln_scale" in unsaid and "--model-config pr" in unsaid
    lacks = [line for line in lines if line.startswith("lacks")]
    assert any("'blocks.0.attn.attn_gate_w' (and 1 more): gated attention" in line for line in lacks)
    assert any("'smear_gate.weight' (and 1 more): " in line for line in lacks)
    assert any(line.startswith("blocks.0.attn.attn_gate_w") and " 2x12" in line and "int8" in line for line in lines)
    assert found["unsaid"][0] == "mlp_slope" and found["generations"][0].startswith("pr") and found["missing_parts"]
    assert found["config"]["width"] == 16 and not set(found["unsaid"]) & set(found["config"])


def test_convert_there_and_back(ours, tmp_path, capsys):
    ptz, back = tmp_path / "b.ptz", tmp_path / "c.slotfast"
    __main__.main(["convert", str(ours), str(ptz)])
    assert "left out  window length, other metadata and training frequencies" in capsys.readouterr().out
    with pytest.raises(InputError, match="name its generation, --model-config pr1019"):
        __main__.main(["convert", str(ptz), str(back)])
    assert not back.exists()
    __main__.main(["convert", str(ptz), str(back), "--model-config", "pr1019", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert found["out_bytes"] == back.stat().st_size and found["rounded"] == []
    before, after = read_artifact(ours), read_artifact(back)
    assert before.config == after.config and after.metadata["imported"]["format"] == "xz"
    __main__.main(["convert", str(ptz), str(back), "--model-config", "pr1019,softcap=15"])
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("assumed")]
    assert "seq_len=2048" in told and "softcap" not in told
    __main__.main(["convert", str(ptz), str(back), "--model-config", "pr1019"])
    for name, tensor in before.tensors.items():
        other = after.tensors[name]
        if isinstance(tensor, QuantizedMatrix):
            assert torch.equal(tensor.codes, other.codes) and torch.equal(tensor.scale, other.scale)
        else:
            assert torch.equal(tensor, other)


def test_converting_a_checkpoint_rounds_it_and_says_so(model, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(safetensors(model.state_dict())[0])
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.slotfast")]
    __main__.main(["convert", *files, "--model-config", "pr1019"])
    assert "rounded   all " in capsys.readouterr().out
    wanted = Artifact.from_model(model, {}).model()
    tokens = torch.arange(9)[None]
    assert torch.equal(load_artifact(tmp_path / "b.slotfast").model().hidden(tokens), wanted.hidden(tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command '': expected show or convert"),
        (["shwo"], "command 'shwo'"),
        (["show"], "required: FILE"),
        (["show", "none"], "none: cannot be read"),
        (["show", "A", "--jsn", "x"], "the nearest is --json"),
        (["show", "A", "--model-config", "softcap=3"], "says itself what its model is"),
        (["show", "A", "--json", "no/such/x"], "cannot be written"),
        (["convert", "A"], "required: OUT"),
        (["convert", "A", "b.onnx"], "b.onnx: expected a name that ends with .slotfast or .ptz"),
        (["convert", "A", "no/such/b.ptz"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, ours, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["artifact", *(str(ours) if word == "A" else word for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(__main__.main)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and message in line and line.count("\n") == 1 and line.startswith("error: ")


def test_help(capsys):
    __main__.main(["--help"])
    assert "convert" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        __main__.main(["convert", "--help"])
    assert ended.value.code == 0 and "OUT" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing_half_written(ours, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "b.slotfast"
    for place in ((codecs, "encode"), ("os.fsync",)):
        before = sorted(tmp_path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(*place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                __main__.main(["convert", str(ours), str(out)])
        assert sorted(tmp_path.iterdir()) == before and not out.exists()


def test_evaluation_of_other_peoples_files(model, ours, tmp_path, capsys):
    """The same losses as of ours; and the report says what the file cannot."""
    write_community(tmp_path / "final_model.int6.ptz", read_artifact(ours))
    common = ["--max-tokens", "300", "--seq-len", "64", "--preset", "none", "causal", "--json"]
    results = []
    with pytest.raises(InputError, match="neither the file nor its tensors say mlp_slope"):
        evaluate(["--artifact", str(tmp_path / "final_model.int6.ptz"), *common, str(tmp_path / "r.json")])
    for file, told in ((ours, []), (tmp_path / "final_model.int6.ptz", ["--model-config", "pr1019"])):
        evaluate(["--artifact", str(file), *told, *common, str(tmp_path / "r.json")])
        results.append(json.loads((tmp_path / "r.json").read_text()))
        told = capsys.readouterr()
    assert results[0]["base"] == results[1]["base"] and results[0]["adapted"] != results[1]["adapted"]
    assert results[0]["frequencies"] and not results[1]["frequencies"] and not results[1]["calibrated"]
    assert results[1]["model"]["metadata"]["assumed"]["rope_dims"] == 16
    assert "uncalibrated" in told.out and "scale 0.7, k = 2" in told.out
    assert "assumed: seq_len=2048, mlp_slope=0.5" in told.err and "--model-config" in told.err
    assert "looks like" not in told.err
    override = ["--model-config", "pr287,softcap=5,xsa_layers=0"]
    evaluate(["--artifact", str(tmp_path / "final_model.int6.ptz"), *override, *common, str(tmp_path / "r.json")])
    other = json.loads((tmp_path / "r.json").read_text())
    assert "looks like a file of pr1019 or pr1350 or pr549, not of pr287" in capsys.readouterr().err
    assert other["model"]["softcap"] == 5 and other["base"] != results[1]["base"]
    audited = dict(artifact=str(tmp_path / "final_model.int6.ptz"), preset=["none"], seq_len=16)
    with pytest.raises(InputError, match="name its generation"):
        read_subject(AuditSettings(**audited), None)
    subject = read_subject(AuditSettings(**audited, model_config="pr1019,softcap=5"), None)
    assert subject.run.model.config.softcap == 5
    with pytest.raises(InputError, match="no such setting; the nearest is softcap"):
        evaluate(["--artifact", str(tmp_path / "final_model.int6.ptz"), "--model-config", "softcaps=5"])
