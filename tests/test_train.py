"""Training: the corpus keeps its promise, and the command writes an artifact that evaluates."""

import json
import signal

import pytest
import torch

from slotfast import corpus, train
from slotfast.artifact import read_artifact
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from slotfast.train.trainer import Trainer


def test_training_text_shares_no_eight_words_with_any_page():
    held_out = [corpus.shingles(page) for page in corpus.language_reference().values()]
    modules = corpus.standard_library()[::12]
    documents = list(corpus.training_documents(modules))
    assert len(documents) > 20
    learned = set().union(*(corpus.shingles(paragraph) for text in documents for paragraph in text.split("\n\n")))
    assert all(learned.isdisjoint(page) for page in held_out)


def test_test_pages_do_not_repeat_one_another():
    seen: set[int] = set()
    for page in sorted(corpus.test_documents(), key=len):
        own = corpus.shingles(page)
        assert len(own & seen) < 0.05 * len(own)
        seen |= own


def test_prose_of_a_module(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""A module that does a thing which is described here at length."""\n'
        "# A comment of two lines that together\n# say something about the code below.\n"
        "x = 1  # trailing comments are not prose, however long they may turn out to be\n"
        'def f():\n    """Explain the function in words that are long enough to keep."""\n'
    )
    assert corpus._prose(path) == [
        "A module that does a thing which is described here at length.",
        "A comment of two lines that together\nsay something about the code below.",
        "Explain the function in words that are long enough to keep.",
    ]
    path.write_text("def broken(:")
    assert corpus._prose(path) == []


def test_training_learns_and_writes_an_artifact(tmp_path, capsys):
    text = tmp_path / "t.jsonl"
    lines = [
        json.dumps({"text": f"Document {n} says that the cat number {n % 7} sat on the mat. " * 6}) for n in range(70)
    ]
    text.write_text("\n".join(lines))
    out = tmp_path / "m.slotfast"
    small = "--layers 2 --width 32 --heads 2 --kv-heads 1 --mlp-width 32 --seq-len 64 --vocab-size 300".split()
    train.main(["--text", str(text), "--out", str(out), "--seconds", "8", "--batch-windows", "4", *small])
    printed = capsys.readouterr().out
    artifact = read_artifact(out)
    assert artifact.config.seq_len == 64 and artifact.metadata["steps"] > 5
    assert float(artifact.unigram.sum()) == pytest.approx(1, abs=1e-5)
    bpb = [float(line.split()[-2]) for line in printed.splitlines() if line.startswith("held-out")]
    assert bpb[0] < 4.0 and abs(bpb[1] - bpb[0]) < 0.2  # guessing among 300 pieces costs over 5
    stored = ["--artifact", str(out), "--tokenizer", str(out.with_suffix(".model"))]
    evaluate([*stored, "--text", str(text), "--max-tokens", "600", "--preset", "none", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["base"]["bpb"] < 4.0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words to learn from, number {n} " * 9}) for n in range(40)))
    small = "--layers 1 --width 16 --heads 2 --kv-heads 1 --mlp-width 16 --seq-len 32 --vocab-size 300".split()
    command = ["--text", str(text), "--out", str(tmp_path / "m"), "--embed-lr", "1e30", "--seconds", "5", *small]
    with pytest.raises(InputError, match="loss .* at step"):
        train.main(command)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("given", [[], ["--resume"]], ids=["first", "resumed"])
def test_an_interrupt_saves_the_step_that_it_came_in(tmp_path, monkeypatch, capsys, interruptible, given):
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words to learn from, number {n} " * 9}) for n in range(40)))
    small = "--layers 1 --width 16 --heads 2 --kv-heads 1 --mlp-width 16 --seq-len 32 --vocab-size 300".split()
    command = ["--text", str(text), "--seconds", "0", "--steps", "4", "--dtype", "float32", "--calibrate", "no", *small]
    train.main([*command, "--out", str(tmp_path / "straight.slotfast")])
    command += ["--out", str(tmp_path / "m.slotfast"), "--checkpoint", str(tmp_path / "c")]
    update = Trainer._update

    def press(trainer, batch):
        if trainer.step == 1:
            signal.raise_signal(signal.SIGINT)
        return update(trainer, batch)

    said = "c holds what is done; the same command" + " with --resume" * (not given) + " goes on from there"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match=said):
        patched.setattr(Trainer, "_update", press)
        train.main([*command, *given])
    assert not (tmp_path / "m.slotfast").exists()
    train.main([*command, "--resume"])
    assert "step:2 resumed" in capsys.readouterr().out
    straight, resumed = (read_artifact(tmp_path / f"{name}.slotfast").model() for name in ("straight", "m"))
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


CYRILLIC = "".join(map(chr, range(0x410, 0x450))) + " слово за словом, пока не станет довольно"


@pytest.mark.parametrize(
    ("words", "size", "message"),
    [
        (CYRILLIC, 300, "--vocab-size 300: the characters of the text and 256 bytes need at least 3[0-9]+ pieces"),
        ("some words", 5000, "--vocab-size 5000: the text is enough for [0-9]+ pieces"),
        (" ", 300, "--vocab-size 300: there is no text to train a tokenizer on"),
    ],
)
def test_a_vocabulary_that_the_text_does_not_fit_names_the_size_that_does(words, size, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        train.train_tokenizer([words] * 20, size)


WRONG = {
    "sizes that do not fit": (["--width", "100", "--heads", "6"], "width 100 is not a multiple of heads 6"),
    "a seed beyond 63 bits": (["--seed", "9" * 23], "--seed"),
    "no folder to write to": (["--out", "nowhere/a.slotfast"], "its folder does not exist"),
    "one name for two files": (["--out", "same.model"], "the tokenizer is written there"),
    "no name": (["--out", ""], "--out '': expected at least 1 character"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_settings_are_refused_before_the_work(arguments, message):
    with pytest.raises(InputError, match=message):
        train.main(arguments)
