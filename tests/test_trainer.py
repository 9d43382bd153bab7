"""The training loop: its schedule, averages and late rounding; a killed run ends with the bits of an unhurt one."""

import copy
import json
import os
import resource
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slotfast import config, flash, train
from slotfast.artifact import read_artifact
from slotfast.command import checkpoint
from slotfast.data import write_shard
from slotfast.errors import InputError
from slotfast.loader import open_loader
from slotfast.model import GPT
from slotfast.optim import WeightAverage
from slotfast.train import Trainer, qat
from slotfast.train.optimizers import build_optimizers
from slotfast.train.schedule import Schedule
from slotfast.train.setup import choose_training, model_shape
from slotfast.train.trainer import evaluate
from tests.arguments import changed
from tests.kills import TIMES, run_and_kill

ROOT = Path(__file__).parents[1]
TOKENIZER = str(resources.files("slotfast") / "demo" / "demo.model")  # 1024 pieces
SMALL = {
    "vocab_size": 300,
    "layers": 4,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "mlp_width": 24,
    "seq_len": 16,
    "bigram_buckets": 32,
    "bigram_width": 8,
    "value_width": 8,
    "steps": 12,
    "seconds": 0.0,
    "batch_windows": 6,
    "rise_steps": 0,
    "warmdown": 8.0,
    "log_every": 1000,
}
EVERYTHING = {
    "loops": 1,
    "loop_start": 1,
    "loop_end": 2,
    "loop_at": 0.3,
    "skips": "gate",
    "smear": "documents",
    "parallel_from": 2,
    "muon": "muoneq-r",
    "newton_schulz": "polar-express",
    "matrix_lr_late": 0.03,
    "muon_momentum_start": 0.8,
    "muon_momentum_steps": 10,
    "average": "ema",
    "ema_decay": 0.8,
    "qat": "soft",
    "qat_from": 0.6,
    "clip_scope": "all",
}
SHARDS = [np.random.default_rng(seed).integers(4, 300, size) for seed, size in enumerate((900, 500, 1300))]


def _settings(**changes):
    return config.TrainSettings(**{**SMALL, **changes})


def _shape(settings, vocab_size):
    bos_id = 1 if settings.smear == "documents" else None
    return model_shape(settings).model_copy(update={"vocab_size": vocab_size, "bos_id": bos_id})


def _trainer(order="shuffle", seed=0, **changes):
    options = {name: changes.pop(name) for name in ("on_save", "on_validate", "log") if name in changes}
    settings = _settings(**changes)
    torch.manual_seed(seed)
    model = GPT(_shape(settings, 300))
    loader = open_loader(order, "abc", SHARDS, settings.seq_len, settings.batch_windows)
    return Trainer(model, loader, choose_training(settings), **{"log": lambda line: None, **options})


def _weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def _equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# schedule


def test_rates_fall_over_the_last_steps():
    schedule = _settings(steps=100, warmdown=40.0, min_lr=0.1).pick(Schedule)
    factors = [schedule.moment(step, 1e9).factor for step in range(101)]
    assert factors[:61] == [1.0] * 61
    assert factors[61:97] == pytest.approx([(100 - step) / 40 for step in range(61, 97)])
    assert factors[97:] == [0.1] * 4
    assert schedule.moment(100, 0.0).left == 0 and schedule.moment(99, 0.0).left == 1


@pytest.mark.parametrize("elapsed", [1.0, 100.0, 200.0, 399.0])
def test_the_demos_rates_go_by_the_share_of_time(elapsed):
    schedule = _settings(steps=None, seconds=400.0, warmdown=0.7, rise_steps=40).pick(Schedule)
    for step in (3, 70):
        now = schedule.moment(step, elapsed)
        progress = elapsed / 400
        assert now.factor == pytest.approx(min(1, (step + 1) / 40, (1 - progress) / 0.7))
        assert now.progress == pytest.approx(progress)
    assert schedule.moment(70, 400.0).left == 0


def test_the_published_warm_down_is_anchored_at_the_clocks_end_and_leaves_the_reserve():
    schedule = _settings(steps=20_000, seconds=600.0, reserve=9.0, warmdown=4000.0).pick(Schedule)
    ms_per_step = 0.0868
    for step in (1, 2000, 3500, 5000, 6800):
        left = (591 - step * ms_per_step) / ms_per_step
        now = schedule.moment(step, step * ms_per_step)
        assert now.left == pytest.approx(left) and now.factor == pytest.approx(min(1, left / 4000))
    assert schedule.moment(6809, 591.1).left == 0


def test_momentum_warms_up():
    schedule = _settings(muon_momentum=0.99, muon_momentum_start=0.92, muon_momentum_steps=1500).pick(Schedule)
    found = [schedule.moment(step, 0.0).momentum for step in (0, 750, 1500, 9000)]
    assert found == pytest.approx([0.92, 0.955, 0.99, 0.99])


# ---------------------------------------------------------------------------------------------------------------------
# steps


def test_every_parameter_has_one_optimiser_and_its_rate():
    trainer = _trainer(matrix_lr=0.1, matrix_lr_late=0.2, embed_lr=0.3, scalar_lr=0.4, skips="gate")
    rates = {}
    for group in (*trainer.muon.param_groups, *trainer.adam.param_groups):
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)] = group["rate"]
    named = {name: rates.pop(id(parameter)) for name, parameter in trainer.model.named_parameters()}
    assert not rates
    assert {named[f"blocks.{i}.attn.c_q.weight"] for i in (0, 1)} == {named["blocks.1.mlp.proj.weight"]} == {0.1}
    assert {named[f"blocks.{i}.mlp.fc.weight"] for i in (2, 3)} == {0.2}
    assert {named[f"{name}.weight"] for name in ("tok_emb", "bigram.embed", "ve_shared.embed")} == {0.3}
    small = ("bigram.proj.weight", "bigram.scale", "blocks.0.resid_mix", "blocks.3.attn.q_gain", "skip_gates")
    assert {named[name] for name in small} == {0.4}


def test_training_learns():
    trainer = _trainer(steps=60, batch_windows=8)
    trainer.loader.shards = [np.tile(np.arange(4, 54), 30)] * 3
    before = trainer.model(*_pair(trainer)).item()
    trainer.run()
    assert trainer.model(*_pair(trainer)).item() < 0.5 * before


def _pair(trainer):
    batch = copy.deepcopy(trainer.loader).next_batch()
    return batch[:, :-1], batch[:, 1:]


def test_a_batch_in_parts_is_the_same_batch():
    whole, parts = _trainer(), _trainer(micro_windows=4)  # the last part is smaller
    for trainer in (whole, parts):
        trainer.run()
    for ours, theirs in zip(_weights(parts), _weights(whole), strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_the_clock_ends_a_run_and_leaves_the_reserve():
    trainer = _trainer(steps=None, seconds=1.5, reserve=1.2, warmdown=0.5, log_every=1)
    trainer.run()
    *before, last = [row["seconds"] for row in trainer.history]
    assert all(seconds <= 0.3 for seconds in before) and last >= 0.3  # milliseconds, rounded
    assert trainer.history[-1]["step"] == trainer.step == len(trainer.history)


def test_warming_up_changes_nothing():
    lines = []
    plain, warmed = _trainer(**EVERYTHING), _trainer(**EVERYTHING, warmup_steps=2, log=lines.append)
    for trainer in (plain, warmed):
        trainer.run()
    assert _equal(_weights(warmed), _weights(plain))
    assert lines[0].startswith("warm-up: 6 steps in")  # once each, looped, and looped with rounding


def test_the_last_layers_are_repeated_from_a_point_on():
    seen = []
    trainer = _trainer(loops=1, loop_start=1, loop_end=2, loop_at=0.5)
    trainer.model.blocks[1].register_forward_hook(lambda *_: seen.append(trainer.step))
    trainer.run()
    assert [seen.count(step) for step in range(12)] == [1] * 6 + [2] * 6
    assert trainer.model.looping


@pytest.mark.parametrize(("average", "decay"), [("ema", 0.7), ("swa", None)])
def test_the_average_is_what_the_model_ends_with(average, decay):
    trainer = _trainer(average=average, ema_decay=0.7, swa_every=2, swa_from=0.8, steps=12, warmdown=10.0)
    taken = []
    expected = WeightAverage(trainer.model.parameters(), decay)
    update = trainer._update

    def watched(batch):
        loss = update(batch)
        factor = min(1, (12 - trainer.step) / 10)
        if average == "ema" or (factor < 0.8 and (trainer.step + 1) % 2 == 0):
            expected.update()
            taken.append(_weights(trainer))
        return loss

    trainer._update = watched
    trainer.run()
    assert _equal(_weights(trainer), expected.mean) and not _equal(_weights(trainer), taken[-1])
    assert len(taken) == (12 if average == "ema" else 4)
    if average == "swa":
        for ours, *rows in zip(_weights(trainer), *taken, strict=True):
            assert (ours - torch.stack(rows).mean(0)).abs().max() < 1e-6


def test_the_forward_compiles_in_one_graph_in_every_form(monkeypatch):
    """As on a GPU with FlashAttention, where the library was found before; forms change as the training goes on."""
    library = SimpleNamespace(flash_attn_func=lambda q, k, v, causal: flash.torch_attention(q, k, v))
    monkeypatch.setitem(sys.modules, flash.MODULES[0], library)
    monkeypatch.setitem(flash._FOUND, "cpu", flash.probe_flash_attention(torch.device("cpu")))
    assert flash.flash_attention(torch.device("cpu")) is not None
    trainer = _trainer(**{**EVERYTHING, "layers": 2, "loop_start": 0, "loop_end": 0, "value_layers": 1})
    model = trainer.model
    for parameter in model.parameters():  # zero-initialised parts would hide a form that does not act
        parameter.data.normal_(0, 0.3)
    compiled, found = torch.compile(model, backend="eager", fullgraph=True), set()
    for looping, rounding in ((False, None), (True, qat.straight_through), (True, trainer.soft)):
        model.looping = looping
        qat.set_rounding(model, rounding)
        loss = compiled(*_pair(trainer), torch.bfloat16).item()
        assert loss == model(*_pair(trainer), torch.bfloat16).item()
        found.add(loss)
    assert len(found) == 3


def test_a_forward_that_does_not_compile_trains_as_it_is(monkeypatch, capsys):
    def fail(model, options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("slotfast.compiled._compiled", fail)
    plain, asked = _trainer(steps=3), _trainer(steps=3, compile="on")
    plain.run()
    asked.run()
    assert _equal(_weights(asked), _weights(plain)) and asked.forward.mode == "off"
    assert capsys.readouterr().err.count("--compile: torch.compile fails here (RuntimeError: no compiler)") == 1


# ---------------------------------------------------------------------------------------------------------------------
# late rounding


def test_rounding_reaches_every_matrix_that_an_artifact_stores_in_6_bits():
    from slotfast.artifact import Artifact

    model = _trainer().model
    stored = Artifact.from_model(model, {}).tensors
    six = {name for name, tensor in stored.items() if getattr(tensor, "bits", 0) == 6}
    rounded = {id(layer) for layer in qat.matrices(model)}
    assert {f"{name}.weight" for name, module in model.named_modules() if id(module) in rounded} == six


def test_straight_through_rounds_forward_and_not_backward():
    """The loss and the gradients are those of a model whose matrices are rounded by hand."""
    trainer = _trainer(qat="straight")
    model = trainer.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    byhand = copy.deepcopy(model)
    for name, parameter in byhand.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight"):
            scale = np.abs(parameter.detach().numpy()).max(1, keepdims=True) / 31
            parameter.data = torch.from_numpy(np.round(parameter.detach().numpy() / scale) * scale)
    plain = model(*_pair(trainer)).item()
    qat.set_rounding(model, qat.straight_through)
    loss, expected = model(*_pair(trainer)), byhand(*_pair(trainer))
    assert abs(loss.item() - expected.item()) < 1e-5 < abs(loss.item() - plain)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), byhand.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max(), name
    qat.set_rounding(model, None)
    assert model(*_pair(trainer)).item() == plain
    assert not any("rounding" in name for name in model.state_dict())


def test_soft_rounding_sharpens_from_smooth_to_rounded():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    hard, soft = qat.straight_through(weight), qat.SoftRound()
    scale = weight.abs().amax(1, keepdim=True) / 31
    distance = []
    for step in (0, 100, 500):
        soft.set_step(step)
        distance.append(float(((soft(weight) - hard) / scale).abs().mean()))
    assert distance[0] > distance[1] > distance[2] > 0 and distance[2] < 0.05
    soft.alpha.fill_(1e-3)
    assert (soft(weight) - weight).abs().max() < 1e-3 * scale.max()
    soft.set_step(0)
    x = weight.double().requires_grad_()
    soft.alpha = soft.alpha.double()
    frozen = x.detach().abs().amax(1, keepdim=True) / 31  # the scale has no gradient
    soft(x).sum().backward()
    r = (x.detach() / frozen) % 1 - 0.5
    expected = 0.5 * soft.alpha * (1 - torch.tanh(soft.alpha * r) ** 2) / torch.tanh(soft.alpha / 2)
    assert (x.grad - expected).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["straight", "soft"])
def test_late_rounding_acts_and_begins_late(how):
    trainer, plain = _trainer(qat=how, qat_from=0.5), _trainer()
    seen = []
    update = trainer._update

    def watched(batch):
        seen.append({layer.rounding is not None for layer in qat.matrices(trainer.model)})
        return update(batch)

    trainer._update = watched
    trainer.run()
    plain.run()
    assert seen == [{step >= 9} for step in range(12)]  # (12 - step) / 8 < 0.5
    assert not _equal(_weights(trainer), _weights(plain))
    assert all(layer.rounding is None for layer in qat.matrices(trainer.model))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ("coprime", EVERYTHING),
        ("shuffle", {**EVERYTHING, "average": "swa", "swa_every": 1, "swa_from": 0.9, "qat": "straight"}),
        ("sequential", {}),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, order, changes):
    straight = _trainer(order, **changes)
    straight.run()
    for stop in (1, 5, 11, 12):
        path = tmp_path / f"{stop}"
        stopped = _trainer(order, **changes, checkpoint_steps=stop)

        def save(state, step, path=path, stop=stop):
            if step == stop:
                checkpoint.save(path, "slotfast.train", {}, state)
                raise KeyboardInterrupt

        stopped.on_save = save
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        resumed = _trainer(order, seed=9, **changes)
        resumed.load_state_dict(checkpoint.load(path, "slotfast.train", {}))
        assert resumed.step == stop
        resumed.run()
        assert _equal(_weights(resumed), _weights(straight))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint():
    saved = []
    trainer = _trainer(checkpoint_steps=3, on_save=lambda state, step: saved.append(step))
    update = trainer._update

    def ruined(batch):
        loss = update(batch)
        if trainer.step == 8:  # the ninth step ruins the weights behind a loss that is still finite
            trainer.model.tok_emb.weight.data[7, 3] = torch.nan
        return loss

    trainer._update = ruined
    with pytest.raises(InputError, match=r"loss nan at step 9: lower .*; the checkpoint of step 6 is kept"):
        trainer.run()
    assert saved == [3, 6]


def test_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c"
    assert checkpoint.load(path, "slotfast.train", {}) is None
    checkpoint.save(path, "slotfast.train", {"width": 16}, {"step": 3})
    assert checkpoint.load(path, "slotfast.train", {"width": 16}) == {"step": 3}
    with pytest.raises(InputError, match="made with width 16, this run has 32"):
        checkpoint.load(path, "slotfast.train", {"width": 32})
    whole = path.read_bytes()
    for content in (b"", b"PK no", whole[: len(whole) // 2], Path(TOKENIZER).read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a checkpoint" if content else "is empty"):
            checkpoint.load(path, "slotfast.train", {})
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint.load(path, "slotfast.train", {})
    checkpoint.save(path, "slotfast.eval", {}, {"step": 3})
    with pytest.raises(InputError, match="not a checkpoint of slotfast.train"):
        checkpoint.load(path, "slotfast.train", {})
    checkpoint.save(path, "slotfast.train", {}, {"step": GPT})  # a class: reading it would run code
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint.load(path, "slotfast.train", {})


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, "slotfast.train", {}, {"weights": torch.arange(300.0)})
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            checkpoint.load(path, "slotfast.train", {})


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_last_one(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, "slotfast.train", {}, {"step": 3})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            checkpoint.save(path, "slotfast.train", {}, {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path, "slotfast.train", {}) == {"step": 3} and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number, shard in enumerate(SHARDS):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", shard)
    write_shard(folder / "fineweb_val_000000.bin", SHARDS[0][:400])
    write_shard(folder / "fineweb_val_bytes_000000.bin", SHARDS[0][:400])  # a sidecar, to be left out
    return folder


def _command(shards, out, *more, **changes):
    small = {name: value for name, value in {**SMALL, **changes}.items() if name not in ("vocab_size", "log_every")}
    flags = [text for name, value in small.items() for text in ("--" + name.replace("_", "-"), str(value))]
    data = ["--data-path", str(shards), "--tokenizer", TOKENIZER, "--out", str(out), "--dtype", "float32"]
    return [*data, *flags, *map(str, more)]


def test_shards_to_artifact_and_summary(shards, tmp_path, capsys):
    out, summary = tmp_path / "m.slotfast", tmp_path / "m.json"
    more = ["--json", summary, "--log-every", "4", "--val-every", "6", "--loader", "coprime"]
    train.main(_command(shards, out, *more, **EVERYTHING))
    printed, found = capsys.readouterr().out, json.loads(summary.read_text())
    assert found["steps"] == 12 and found["tokens_seen"] == 12 * 6 * 16
    assert [row["step"] for row in found["history"]] == [4, 8, 12]
    assert [row["step"] for row in found["measured"]] == [6, 12] and 4 < found["measured"][0]["nats"] < 8
    assert "step:4/12 loss:" in printed and "val step:6 nats:" in printed
    artifact = read_artifact(out)
    assert artifact.config.loops == 1 and artifact.config.bos_id == 1 and artifact.config.skip_gates
    assert found["artifact_bytes"] == out.stat().st_size
    for name in ("float32", "int6"):
        assert 4 < found["val"][name]["nats"] < 8
    stream = train.inputs.TokenStream([SHARDS[0][:400]])
    nats = evaluate(artifact.model(), stream, 16)
    assert found["val"]["int6"]["nats"] == pytest.approx(nats / 399, rel=1e-6)
    assert float(artifact.unigram[5]) == pytest.approx(sum((s == 5).sum() for s in SHARDS) / 2700, rel=1e-5)


def test_json_to_standard_output_is_alone_there(shards, tmp_path, capsys):
    train.main(_command(shards, tmp_path / "m", "--json", "-", steps=2))
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 2 and "held-out" in captured.err


def test_the_plot_is_a_picture(shards, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot`")
    more = ["--plot", tmp_path / "m.png", "--log-every", "1", "--val-every", "2"]
    train.main(_command(shards, tmp_path / "m", *more, steps=3))
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


WRONG = {
    "heads": (["--heads", "3"], "width 16 is not a multiple of heads 3"),
    "loops": (["--loops", "1", "--loop-end", "9"], "loop 3..9: expected layers of 0..3"),
    "no tokenizer": (["--tokens", "TRAIN", "--tokenizer"], "--tokens .*: needs the --tokenizer that made them"),
    "no shard": (["--tokens", "nowhere*.bin"], "--tokens nowhere.*: no such file"),
    "no shard to measure with": (["--val-tokens", "nowhere*.bin"], r"--val-tokens nowhere\*.bin: no such file"),
    "two inputs": (["--tokens", "TRAIN", "--text", "x"], "--tokens and --text: give one of them"),
    "endless": (["--seconds", "0", "--steps"], "--seconds 0 without --steps"),
    "no time": (["--seconds", "5", "--reserve", "5"], "--reserve 5: leaves nothing of --seconds 5"),
    "resume what": (["--resume"], "--resume: needs --checkpoint FILE"),
    "one file for two": (["--json", "OUT"], "--out and --json: both are"),
    "long windows": (["--seq-len", "1300"], "1300 tokens in the longest shard; one training window needs 1301"),
    "small tokenizer": (["--tokens", "BAD"], "token id 2000 in .*the tokenizer has 1024 pieces"),
    "preset": (["--preset", "pr9"], "--preset 'pr9': expected 'demo', 'baseline'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line(shards, tmp_path, arguments, message):
    write_shard(tmp_path / "bad.bin", np.full(600, 2000))
    command = _command(shards, tmp_path / "m")
    places = {"TRAIN": shards / "fineweb_train_*.bin", "BAD": tmp_path / "bad.bin", "OUT": tmp_path / "m"}
    more = [str(places.get(argument, argument)) for argument in arguments]
    command = changed(command, more)
    command = command[:-1] if more[-1] in ("--tokenizer", "--steps") else command  # not given at all
    with pytest.raises(InputError, match=message) as caught:
        train.main(command)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_a_truncated_shard_is_named(shards, tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes((shards / path.name).read_bytes()[:-10])
    with pytest.raises(InputError, match="fineweb_train_000000.bin: .* bytes, expected"):
        train.main(_command(tmp_path, tmp_path / "m"))


def test_a_hole_among_the_shards_is_named(shards, tmp_path):
    for number in (0, 2):
        (tmp_path / f"fineweb_train_{number:06}.bin").symlink_to(shards / f"fineweb_train_{number:06}.bin")
    with pytest.raises(InputError, match="fineweb_train_000001.bin is missing between the first shard and the last"):
        train.main(_command(tmp_path, tmp_path / "m"))
    picked = ["--tokens", shards / "fineweb_train_00000[02].bin", "--val-tokens", shards / "fineweb_val_0*.bin"]
    train.main(_command(shards, tmp_path / "m", *picked, steps=1))


def test_a_checkpoint_is_not_overwritten_and_not_used_for_another_run(shards, tmp_path):
    saving = ["--checkpoint", tmp_path / "c"]
    train.main(_command(shards, tmp_path / "m", *saving, steps=2))
    with pytest.raises(InputError, match="exists; add --resume"):
        train.main(_command(shards, tmp_path / "m", *saving, steps=2))
    with pytest.raises(InputError, match="made with width 16, this run has 32"):
        train.main(_command(shards, tmp_path / "m", *saving, "--resume", steps=2, width=32))
    (tmp_path / "other").mkdir()
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        (tmp_path / "other" / name).write_bytes((shards / name).read_bytes())
    with pytest.raises(InputError, match="made with data '"):
        train.main(_command(tmp_path / "other", tmp_path / "m", *saving, "--resume", steps=2))


def test_a_resumed_run_on_text_keeps_its_tokenizer(tmp_path, capsys):
    text, small = tmp_path / "t.jsonl", "--layers 1 --width 16 --heads 2 --kv-heads 1 --mlp-width 16 --seq-len 32"
    text.write_text("\n".join(json.dumps({"text": f"some words to learn from, number {n} " * 9}) for n in range(40)))
    command = ["--text", str(text), "--out", str(tmp_path / "m"), "--checkpoint", str(tmp_path / "c"), *small.split()]
    command += "--vocab-size 300 --steps 3 --seconds 0 --dtype float32".split()
    train.main(command)
    whole, written = read_artifact(tmp_path / "m"), (tmp_path / "m.model").stat().st_mtime_ns
    train.main([*command, "--resume"])
    assert "step:3 resumed from" in capsys.readouterr().out
    assert (tmp_path / "m.model").stat().st_mtime_ns == written
    assert _same_model(tmp_path / "m", whole)


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_killed_at_any_point_and_resumed_ends_with_the_same_bits(shards, tmp_path):
    """Once, or as often as SLOTFAST_KILLS says."""
    long = {**EVERYTHING, "steps": max(150, 25 * TIMES), "warmdown": 80.0}
    train.main(_command(shards, tmp_path / "whole", **long))
    saving = ["--checkpoint", tmp_path / "c", "--checkpoint-steps", "7", "--resume"]
    command = [sys.executable, "-m", "slotfast.train", *_command(shards, tmp_path / "m", *saving, **long)]
    run_and_kill([*map(str, command)], tmp_path / "c", longest=0.2, env=ENV)
    train.main([*map(str, command[3:])])
    assert _same_model(tmp_path / "m", read_artifact(tmp_path / "whole"))


def _same_model(ours, theirs):
    ours, theirs = read_artifact(ours).tensors, theirs.tensors
    leaves = [
        (getattr(ours[name], part, ours[name]), getattr(theirs[name], part, theirs[name]))
        for name in ours
        for part in ("codes", "scale")
    ]
    return ours.keys() == theirs.keys() and all(torch.equal(a, b) for a, b in leaves)


def test_two_ranks_train_like_one(shards, tmp_path):
    """The clip is of each rank's own gradients, so it is off; sums round differently, so steps are few."""
    flags = {"steps": 6, "clip": 0.0, "average": "ema", "ema_decay": 0.5, "loader": "coprime"}
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        more = ["--json", f"{out}.json", "--val-every", "3", "--ttt", "pr1351", "--ttt-epochs", "2"]
        # the second rank has no window in the last step
        more += ["--ttt-tokens", str(shards / "*_000001.bin"), "--ttt-batch-windows", str(6 // processes)]
        command = [sys.executable, *launcher, "-m", "slotfast.train", *_command(shards, out, *more, **flags)]
        if processes == 1:
            train.main(command[3:])
        else:
            subprocess.run(command, env=ENV, check=True, timeout=120, capture_output=True)
        results.append(json.loads(Path(f"{out}.json").read_text()))
    assert [found["ranks"] for found in results] == [1, 2]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], abs=1e-4)
    assert results[1]["val"]["float32"]["nats"] == pytest.approx(results[0]["val"]["float32"]["nats"], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# presets

PARAMETERS = {"baseline": 17_059_912, "pr1019": 27_067_484, "pr1350": 26_993_756}


@pytest.mark.parametrize("preset", config.TrainSettings.PRESETS)
def test_presets_are_models_that_can_be_built(preset):
    settings, sources = config.load(config.TrainSettings, "train", "about", ["--preset", preset, "--seed", "3"])
    assert sources["seed"] == "flag" and sources["out"] == "default"
    assert all(sources[name] == "preset" for name in config.TrainSettings.PRESETS[preset])
    with torch.device("meta"):
        model = GPT(_shape(settings, 1024))
        build_optimizers(model, choose_training(settings).optimization, torch.float32, None)
    if preset in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]


def test_flags_and_variables_override_a_preset(monkeypatch):
    monkeypatch.setenv("QK_GAIN_INIT", "5.25")
    settings, sources = config.load(config.TrainSettings, "train", "a", ["--preset", "pr1217", "--muon", "muon"])
    assert (settings.qk_gain, settings.muon, settings.bigram_width) == (5.25, "muon", 160)
    assert (sources["qk_gain"], sources["muon"], sources["bigram_width"]) == ("QK_GAIN_INIT", "flag", "preset")


@pytest.mark.parametrize("extra", [{}, {"loops": 2, "skips": "gate", "parallel_from": 7, "smear": "documents"}])
def test_full_size_goes_forward_and_backward(extra):
    settings = config.TrainSettings(**{**config.TrainSettings.PRESETS["pr1350"], **extra})
    model = GPT(_shape(settings, 1024))
    tokens = torch.randint(0, 1024, (1, 33), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert abs(loss.item() - np.log(1024)) < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
