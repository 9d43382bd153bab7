"""Test-time training of weights: the recipes act on all that they name; streams that give answers away are refused."""

import math
from importlib import resources

import numpy as np
import pytest
import torch

from slotfast import train
from slotfast.artifact import read_artifact
from slotfast.data import TokenStream, write_shard
from slotfast.errors import InputError
from slotfast.model import GPT, GPTConfig
from slotfast.overlap import seen
from slotfast.train import prequant_ttt

SEQ = 16
SHARDS = [np.random.default_rng(seed).integers(4, 300, size) for seed, size in enumerate((900, 500))]


@pytest.fixture
def model():
    torch.manual_seed(0)
    parts = {"bigram_buckets": 32, "bigram_width": 8, "value_width": 8, "value_layers": (2, 3)}
    sizes = {"layers": 4, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "seq_len": SEQ}
    return GPT(GPTConfig(vocab_size=300, rope_dims=8, xsa_layers=4, **sizes, **parts))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, shard in enumerate(SHARDS):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", shard)
    write_shard(folder / "fineweb_val_000000.bin", SHARDS[0][:400])
    return folder


def _stream(*arrays):
    return TokenStream(arrays)


def test_the_recipe_is_adamw_as_written(model):
    """Windows in order, cosine by epoch to a tenth, clip at 1, no decay: against torch's own loop over one group."""
    stream = _stream(SHARDS[1][:170])  # ten windows: steps of four, four and two
    naive = GPT(model.config)
    naive.load_state_dict(model.state_dict())
    prequant_ttt.adapt(model, stream, prequant_ttt.Recipe(epochs=3, batch_windows=4), SEQ, log=lambda line: None)
    optimizer = torch.optim.AdamW(naive.parameters(), 5e-4, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=5e-5)
    windows = torch.from_numpy(np.stack([SHARDS[1][i * SEQ : (i + 1) * SEQ + 1] for i in range(10)]))
    for _ in range(3):
        for batch in windows.split(4):
            optimizer.zero_grad()
            naive(batch[:, :-1], batch[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
            optimizer.step()
        scheduler.step()
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_frozen_blocks_stay_with_their_matrices(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stream = _stream(SHARDS[1])
    recipe = prequant_ttt.Recipe(
        epochs=3, frozen_blocks=2
    )  # zero-initialised parts pass gradients on from the second step on
    prequant_ttt.adapt(model, stream, recipe, SEQ, log=lambda line: None)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("blocks.0.", "blocks.1."))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_discriminative_rates_reach_the_matrices(model):
    rates = {}
    for group in prequant_ttt.parameter_groups(model, prequant_ttt.RECIPES["pr1351"]):
        rates |= {id(parameter): group["rate"] for parameter in group["params"]}
    named = {name: rates[id(parameter)] / 5e-4 for name, parameter in model.named_parameters()}
    for block, share in enumerate((0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1.0)):
        for name in ("attn.c_q.weight", "mlp.proj.weight", "resid_mix"):
            assert named[f"blocks.{block}.{name}"] == pytest.approx(share)
    assert named["tok_emb.weight"] == 1.0


def _adapted(shards, out, *more):
    tokenizer = resources.files("slotfast") / "demo" / "demo.model"
    files = ["--data-path", shards, "--tokenizer", tokenizer, "--out", out]
    small = "--layers 3 --width 16 --heads 2 --mlp-width 8 --seq-len 16 --steps 2 --dtype float32".split()
    return list(map(str, [*files, *small, "--ttt", "pr1306", "--ttt-epochs", "1", *more]))


def test_validation_text_is_refused_without_the_flag_and_named_with_it(shards, tmp_path, capsys):
    copy = tmp_path / "innocent.bin"
    copy.write_bytes((shards / "fineweb_val_000000.bin").read_bytes())
    with pytest.raises(InputError, match=r"innocent.bin: shares 100.0% with the text that measures the training; .*"):
        train.main(_adapted(shards, tmp_path / "m", "--ttt-tokens", copy))
    with pytest.raises(InputError, match="fineweb_val_0.*learned validation text have no honest score"):
        train.main(_adapted(shards, tmp_path / "m", "--ttt-tokens", shards / "fineweb_val_0*.bin"))
    write_shard(copy, SHARDS[0][200:400])  # of the part that is not measured on
    with pytest.raises(InputError, match="innocent.bin: shares 100.0%"):
        train.main(_adapted(shards, tmp_path / "m", "--ttt-tokens", copy, "--max-val-tokens", 100))
    train.main(_adapted(shards, tmp_path / "m", "--ttt-tokens", copy, "--allow-noncausal"))
    assert "NOT an honest score" in capsys.readouterr().out
    label = read_artifact(tmp_path / "m").metadata["ttt"]
    assert (label["recipe"], label["stream"], label["validation_overlap"]) == ("pr1306", "innocent.bin", 1.0)


def test_another_stream_is_learned_and_named(shards, tmp_path, capsys):
    stream = shards / "fineweb_train_000001.bin"
    train.main(_adapted(shards, tmp_path / "m", "--ttt-tokens", stream))
    printed = capsys.readouterr().out
    assert "ttt epoch:1/1 loss:" in printed and "NOT an honest" not in printed
    metadata = read_artifact(tmp_path / "m").metadata
    label = metadata["ttt"]
    assert seen(_stream(SHARDS[1]), metadata) == {"training": 1.0, "ttt": 1.0}
    assert seen(_stream(SHARDS[0][:100]), metadata)["ttt"] == 0
    assert label["validation_overlap"] == 0 and label["tokens"] == 500 and label["frozen_blocks"] == 2
    assert label["stream_sha256"] == _stream(SHARDS[1]).sha256()


@pytest.mark.parametrize("arguments", [["--ttt", "pr1306"], ["--ttt-text", "x"]])
def test_half_a_request_is_refused(tmp_path, arguments):
    with pytest.raises(InputError, match="goes with one of --ttt-text and --ttt-tokens"):
        train.main(["--out", str(tmp_path / "m"), *arguments])


def test_rates_follow_the_cosine(model):
    lines = []
    prequant_ttt.adapt(model, _stream(SHARDS[1]), prequant_ttt.Recipe(epochs=4), SEQ, log=lines.append)
    found = [float(line.split("lr_scale:")[1]) for line in lines]
    assert found == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * e / 4)) for e in range(4)], abs=1e-3)
    assert float(lines[-1].split("loss:")[1].split()[0]) < float(lines[0].split("loss:")[1].split()[0])
