"""Rows that learn, killed and started again: the same bits; and on several ranks: those of each piece by itself."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import published_lora
from slotfast.artifact import load_artifact
from slotfast.command import checkpoint
from slotfast.config import EvalSettings
from slotfast.data import ByteTable, Text, Tokenizer, TokenStream, read_documents
from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.eval.learning import LearningPass, piece
from slotfast.eval.loop import PIECES
from slotfast.eval.setup import choose_learning
from slotfast.foreign.models import language_model
from slotfast.learn import FrozenLoop, OnTop, learn, make_loop, parse_row
from slotfast.shipped import TOKENIZER

from .arguments import changed
from .models import random_model, write_tiny
from .test_foreign_stream import LONGEST, build
from .test_learn import BOS, WINDOW, _tokens
from .test_learn_eval import _args, small  # noqa: F401

BYTES = ByteTable(np.arange(97) % 5, np.arange(97) % 3 == 0, np.arange(97) < 4)
ROWS = (
    "learn:chunk=8,lr=0.02,rank=2,steps=2+causal",
    "learn:chunk=8,lr=0.02,what=all,optimizer=sgd,momentum=0.9",
    "learn:chunk=7,lr=0.02,what=norms,scope=document+causal-window",
    "learn:chunk=8,lr=0.02,rank=2,scope=document+causal-bigram",
)


class _Killed(Exception):
    pass


def _killed_and_gone_on(path, fresh, chunks):
    """A pass that is killed behind so many chunks, and one that ran to its end from what the first had saved."""
    killed, left = fresh(), iter(range(chunks - 1))

    def kill():
        if next(left, None) is None:
            checkpoint.save(path, "slotfast.eval", {}, killed.state_dict())
            raise _Killed

    with pytest.raises(_Killed):
        killed.run(on_chunk=kill)
    going = fresh()
    going.load_state_dict(checkpoint.load(path, "slotfast.eval", {}))
    return killed, going.run()


def _text():
    return Text(TokenStream([_tokens().numpy()]), BYTES, BOS)


def _pass(model, row, rank=0, world=1):
    row = parse_row(row)
    loop = make_loop(model, row, WINDOW, 2, BOS, on_top=OnTop.of([row], WINDOW, bos_id=BOS))
    return LearningPass(loop, [row], _text(), True, rank, world)


def _same(passed, whole):
    assert np.array_equal(passed.nll, whole.nll) and passed.forwards == whole.forwards
    assert min(passed.spent.min(), 0) == 0 < passed.spent.sum()
    for mine, other in ((passed.meter, whole.meter), (passed.along, whole.along)):
        assert np.array_equal(mine.nats, other.nats) and np.array_equal(mine.bytes, other.bytes)


@pytest.mark.parametrize(
    ("of", "row"), [*(("ours", row) for row in ROWS), ("transformers", ROWS[0]), ("transformers", ROWS[2])]
)
def test_a_pass_that_goes_on_ends_with_the_same_bits(tmp_path, of, row):
    if of == "ours":
        model = random_model(layers=2, value_layers=(1,))
    else:
        library = pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")
        model = language_model(build(library, "Llama"))[0]
        assert LONGEST == 64 > len(_tokens()) > LONGEST - WINDOW  # it starts again from position 0 within
    whole = _pass(model, row).run()
    for chunks in (1, 5):
        _, going = _killed_and_gone_on(tmp_path / "c", lambda: _pass(model, row), chunks)
        _same(going, whole)
    fresh = _pass(model, row)
    fresh.load_state_dict(_pass(model, row).state_dict())  # saved before it began
    _same(fresh.run(), whole)


def test_chunks_that_are_handed_out_together_share_their_seconds(monkeypatch):
    monkeypatch.setattr("slotfast.learn.charged._SECONDS", np.inf)
    passed = _pass(random_model(layers=2, value_layers=(1,)), ROWS[1]).run()
    ends = np.append(np.arange(8, 57, 8), 57)
    share = np.bincount(ends * PIECES // 58, np.diff(ends, prepend=0), PIECES) / 57
    np.testing.assert_allclose(passed.spent, passed.seconds["learned"] * share, rtol=1e-9)


SLOTS = "chunk=4,lr=0.02,rank=2,slots=2"


@pytest.mark.parametrize(
    "row",
    [
        f"lora-doc:{SLOTS}",
        f"lora-doc:{SLOTS},keys=stale,steps=2,start=warm+causal",
        f"lora-doc:{SLOTS},keys=refresh,every=2,start=fresh,optimizer=sgd,momentum=0.5",
        f"lora-1855:{SLOTS},phases=2,prefix=4,piece=8",
    ],
)
def test_documents_in_slots_that_go_on_end_with_the_same_bits(tmp_path, row):
    model = random_model(layers=2, value_layers=(1,))
    whole = _pass(model, row).run()
    for sweeps in (1, 4, 6, 8):  # within documents, between them, behind phases
        killed, going = _killed_and_gone_on(tmp_path / "c", lambda: _pass(model, row), sweeps)
        assert 0 < killed.loop.ledger["charged"] < 57
        _same(going, whole)
    ended, again = _pass(model, row), _pass(model, row)
    ended.run()
    again.load_state_dict(ended.state_dict())
    _same(again.run(), whole)


def _result(path):
    found = json.loads(path.read_text())
    for row in found["presets"]:
        row.get("cost", {}).clear()
    for name in ("seconds", "windows_per_second", "peak_memory_bytes", "config"):
        del found[name]
    return found


@pytest.mark.parametrize("way", ["windows", "stream"])
def test_the_command_goes_on_where_it_was_killed(small, tmp_path, monkeypatch, way):  # noqa: F811
    monkeypatch.setattr("slotfast.eval.resume._SECONDS", 0)
    monkeypatch.setattr("slotfast.eval.resume._SHARE", 0)
    monkeypatch.chdir(tmp_path)
    rows = ["learn:chunk=16,lr=0.01+causal", "learn:chunk=32,lr=0.01,what=norms,scope=document"]
    rows[1:] = rows[1:] if way == "stream" else ["ttt-549:chunk=128,steps=1+causal"]
    args = _args(small, "--preset", *rows, "--forward", way, "--json", "j", "--per-token", "t.npz")
    main(args)
    expected, losses = _result(tmp_path / "j"), dict(np.load("t.npz"))
    saves, save, last = [0], checkpoint.save, [None]

    def dying(*arguments):
        save(*arguments)
        saves[0] += 1
        if saves[0] == last[0]:
            raise _Killed

    monkeypatch.setattr("slotfast.command.checkpoint.save", dying)
    main([*args, "--resume", "whole"])
    assert _result(tmp_path / "j") == expected
    last[0], saves[0] = round(0.8 * saves[0]), 0  # within the second row that learns
    with pytest.raises(_Killed):
        main([*args, "--resume", "c"])
    last[0] = None
    main([*args, "--resume", "c"])
    assert _result(tmp_path / "j") == expected
    again = np.load("t.npz")
    assert all(np.array_equal(again[name], losses[name]) for name in losses)


# several ranks


def test_pieces_are_whole_chunks_or_documents():
    text = _text()
    for row, borders in (("learn:chunk=8", range(0, 57, 8)), ("learn:scope=document", (0, 21, 24, 40))):
        for world in (1, 2, 3, 5):
            pieces = [piece(parse_row(row), text, rank, world) for rank in range(world)]
            assert [at for part in pieces for at in part] == list(range(57))
            assert all(part.start in borders for part in pieces if part)


def test_a_piece_sees_what_is_before_it_by_the_weights_that_it_starts_from():
    model, row = random_model(layers=2, value_layers=(1,)), parse_row("learn:chunk=8,lr=0.02,rank=2")
    frozen = FrozenLoop(model, WINDOW, 2)
    plain = LearningPass(frozen, [row], _text(), True).run().nll
    for world in (2, 3):
        for rank in range(world):
            passed = _pass(model, "learn:chunk=8,lr=0.02,rank=2", rank, world).run()
            part = passed.span
            first = slice(part.start, part.start + 8)
            np.testing.assert_allclose(passed.nll[:, :8], plain[:, first], rtol=0, atol=1e-10)
            assert not np.allclose(passed.nll[:, 8:], plain[:, part.start + 8 : part.stop])


def test_documents_alone_charge_the_same_on_any_number_of_ranks():
    """In slots: nothing is shared between them."""
    model, row = random_model(layers=2, value_layers=(1,)), "learn:chunk=8,scope=document,slots=2,rank=2,keys=recompute"
    whole = _pass(model, row).run().nll
    parts = [_pass(model, row, rank, 3).run() for rank in range(3)]
    nll = np.concatenate([part.nll for part in parts if part.charged], 1)
    np.testing.assert_allclose(nll, whole, rtol=0, atol=1e-9)


AGAIN = ("learn:chunk=8,lr=0.02,rank=2,keys=recompute", "learn:chunk=8,lr=0.02,rank=2,keys=refresh,every=2+causal")


@pytest.mark.parametrize("row", AGAIN)
def test_windows_of_a_piece_reach_back_before_it(row):
    """A piece's first chunk is charged as the unlearned whole is where each chunk has its window again; so are all of
    its chunks where its own have that. Learned, later ones follow from what it learned itself."""
    model = random_model(layers=2, value_layers=(1,))

    def losses(row, rank=0, world=1):
        parts, passed = [], _pass(model, row, rank, world)
        passed.loop.run(_text().stream.read, passed.span, parts.append)
        assert [part.start for part in parts] == list(range(passed.span.start, passed.span.stop, 8))
        return [torch.cat([getattr(part, name) for part in parts]) for name in ("nll", "unlearned")]

    learned, plain = losses(row)[0], losses(AGAIN[0])[1]
    for rank in range(3):
        span = _pass(model, row, rank, 3).span
        own, unlearned = losses(row, rank, 3)
        same = slice(None) if "recompute" in row else slice(8)
        torch.testing.assert_close(unlearned[same], plain[span.start : span.stop][same], rtol=0, atol=1e-10)
        assert torch.equal(own[:8], unlearned[:8]) and float((own - unlearned)[8:].abs().min()) > 1e-9
        assert (rank == 0) == torch.allclose(own[8:], learned[span.start + 8 : span.stop], rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", AGAIN)
def test_a_piece_that_goes_on_ends_with_the_same_bits(tmp_path, row):
    model = random_model(layers=2, value_layers=(1,))
    whole = _pass(model, row, 1, 2).run()
    assert whole.span.start > WINDOW
    for chunks in (1, 2, 3):
        _, going = _killed_and_gone_on(tmp_path / "c", lambda: _pass(model, row, 1, 2), chunks)
        _same(going, whole)


def test_longest_first_each_rank_orders_its_own_documents():
    """As if these were all that there is."""
    model, row = random_model(layers=2, value_layers=(1,)), "lora-1530:chunk=8,rank=2,slots=2"
    text, order = _text(), []
    for rank in range(2):
        passed = _pass(model, row, rank, 2)
        own = text.stream.read(passed.span.start, passed.span.stop + 1)
        loop = make_loop(model, parse_row(row), WINDOW, 2, text.bos_id)
        alone = LearningPass(loop, [parse_row(row)], Text(TokenStream([own]), text.byte_table, text.bos_id), True).run()
        order.append(passed.run().nll)
        np.testing.assert_allclose(order[-1], alone.nll, rtol=0, atol=1e-12)
    whole = _pass(model, row).run().nll
    assert np.concatenate(order, 1).shape == whole.shape and not np.allclose(np.concatenate(order, 1), whole)


DEALT = (
    f"lora-1855:{SLOTS.replace('slots=2', 'slots=1')},phases=2,prefix=2,piece=8",
    f"lora-doc:{SLOTS},phases=1,prefix=2,piece=8,start=warm+causal",
)


def _dealt(model, row, rank):
    row = parse_row(row)
    top = OnTop.of([row], WINDOW, bos_id=BOS)
    loop = make_loop(model, row, WINDOW, 2, BOS, on_top=top, rank=rank, world=2)
    return LearningPass(loop, [row], _text(), True, rank, 2)


@pytest.mark.parametrize("row", DEALT)
def test_ranks_with_phases_go_on_each_from_where_it_was(tmp_path, row):
    """One before a phase, one behind it, or both within their documents: none of them waits for another."""
    model = random_model(layers=2, value_layers=(1,))
    for rank in range(2):
        whole, places = _dealt(model, row, rank), []
        whole.run(on_chunk=lambda whole=whole, places=places: places.append(whole.loop.state_dict()["at"]["phase"]))
        assert set(places) >= {0, 1}
        for sweeps in (1, places.index(1) + 1, len(places)):
            _, going = _killed_and_gone_on(tmp_path / "c", lambda rank=rank: _dealt(model, row, rank), sweeps)
            _same(going, whole)


def test_rows_that_need_the_stream_in_order_are_refused_on_several_ranks():
    with pytest.raises(InputError, match="on 2 processes: what is on top needs the stream in order"):
        choose_learning(EvalSettings(), [parse_row("ttt-549+causal")], 2)
    for row in ("lora-1530", "lora-1855", "ttt-549", "ttt-549+causal-window", *AGAIN):
        assert choose_learning(EvalSettings(), [parse_row(row)], 2)[1] == [parse_row(row)]


def test_two_ranks_are_two_pieces(small, tmp_path, capsys):  # noqa: F811
    """But for a row whose ranks train one model together: it gives what one process does with larger batches."""
    rows = ["learn:chunk=16,lr=0.01,rank=2", "learn:chunk=16,lr=0.01,what=norms,scope=document+causal"]
    together = "ttt-549:chunk=64,lr=0.05,steps=1,batch={}+causal-window"
    args = _args(
        small, "--preset", *rows, together.format(1), "--dtype", "float64", "--json", "j", "--per-token", "t.npz"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "slotfast.eval", *args]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    *found, trained = json.loads((tmp_path / "j").read_text())["presets"][1:]
    main(_args(small, "--preset", together.format(2), "--forward", "windows", "--dtype", "float64", "--json", "-"))
    none, alone = json.loads(capsys.readouterr().out)["presets"]
    assert trained["adapted"]["nats"] == pytest.approx(alone["adapted"]["nats"], rel=1e-9)
    assert trained["cost"]["forwards"] == alone["cost"]["forwards"] and alone["adapted"] != none["adapted"]
    losses = np.load(tmp_path / "t.npz")
    model, tokenizer = load_artifact(small / "m").model().double(), Tokenizer(TOKENIZER)
    ids, _ = tokenizer.encode_documents(read_documents(str(small / "t.jsonl")))
    text = Text(TokenStream([ids]), tokenizer.byte_table, tokenizer.bos_id)
    for number, (name, result) in enumerate(zip(rows, found, strict=True)):
        row, parts = parse_row(name), []
        for rank in range(2):
            top = OnTop.of([row], 64, bos_id=text.bos_id)
            loop = make_loop(copy.deepcopy(model), row, 64, 0, text.bos_id, on_top=top)
            parts.append(LearningPass(loop, [row], text, True, rank, 2).run())
        nll = np.concatenate([part.nll[0] for part in parts])
        key = f"adapted_nll:{name}" if number else "adapted_nll"
        np.testing.assert_allclose(losses[key], nll, rtol=1e-6)  # kept in float32
        assert result["adapted"]["nats"] == pytest.approx(nll.sum(), rel=1e-9)
        assert result["unlearned"]["gain_bpb"] > 0 and 1.8 < result["cost"]["forwards"] < 2


def test_two_ranks_deal_documents_out_and_train_in_phases_alike(small, tmp_path):  # noqa: F811
    """As published ones that take turns; without phases, and with A drawn alike, as one process."""
    rows = ["lora-1855:chunk=16,lr=0.01,rank=2,slots=1,prefix=2,phases=1,piece=16,phase_lr=0.1"]
    rows.append("lora-1855:chunk=16,lr=0.01,rank=2,slots=1,phases=0,start=cold")
    tokenizer = Tokenizer(TOKENIZER)
    write_tiny(tmp_path / "m", bos_id=tokenizer.bos_id)  # as published, documents of a phase see nothing of each other
    args = _args(small, "--preset", *rows, "--allow-noncausal", "--dtype", "float64", "--json", "j")
    args = changed([*args, "--per-token", "t.npz", "--resume", "c"], ["--artifact", "m"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def run():
        command = [*launcher, "-m", "slotfast.eval", *args]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return _result(tmp_path / "j"), dict(np.load(tmp_path / "t.npz"))

    result, losses = run()
    model = load_artifact(tmp_path / "m").model().double()
    ids, _ = tokenizer.encode_documents(read_documents(str(small / "t.jsonl")))
    phased, alone = (parse_row(row) for row in rows)
    tokens, draw = torch.from_numpy(ids.astype(np.int64)), published_lora.drawing(model, phased)
    turns, one = (published_lora.run(model, tokens, phased, 64, tokenizer.bos_id, draw, world) for world in (2, 1))
    assert float((turns - one).abs().max()) > 1e-3
    cold = learn(model, tokens, alone, window=64, bos_id=tokenizer.bos_id).nll
    expected = {"adapted_nll": turns, f"adapted_nll:{rows[1]}": cold}
    for (name, nll), row in zip(expected.items(), result["presets"][1:], strict=True):
        np.testing.assert_allclose(losses[name], nll.numpy(), rtol=1e-6)  # kept in float32
        assert row["adapted"]["nats"] == pytest.approx(float(nll.sum()), rel=1e-9)
    (tmp_path / "c.rank1").unlink()  # that rank starts again, its phase too, and the other has nothing left to do
    again, found = run()
    assert again == result and all(np.array_equal(found[name], losses[name]) for name in losses)
