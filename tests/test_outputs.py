"""What a command writes destroys nothing: every command, every pair of flags that name files."""

import itertools
import json
import os
import shutil
import typing
from importlib import resources

import numpy as np
import pytest

from slotfast import artifact, audit, bundle, calibrate, config, eval, record, train  # noqa: F401
from slotfast.artifact.__main__ import main as convert
from slotfast.audit.__main__ import main as run_audit
from slotfast.bundle.__main__ import main as run_bundle
from slotfast.config import outputs
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate
from tests.arguments import changed

PRECIOUS = b"the only copy of this text\n"
COMMANDS = {
    config.EvalSettings: (evaluate, []),
    config.AuditSettings: (run_audit, []),
    config.CalibrateSettings: (calibrate.main, []),
    config.TrainSettings: (train.main, []),
    config.BundleSettings: (run_bundle, []),
    config.RecordSettings: (record.main, []),
    config.ShowSettings: (convert, ["show"]),
    config.ConvertSettings: (convert, ["convert"]),
}
# Settings that are text and name no file that is read or written.
WORDS = set("model_config_ preset show_preset score byte_rule device name author github_id blurb kernels".split())
SETTINGS_FILE = {"config_"}  # is read before all others: tests/test_config.py


def _all(cls):
    return {cls, *(each for below in cls.__subclasses__() for each in _all(below))}


def _files(cls):
    """Settings of a command that name files: what is read, what is written."""
    extra = {n: field.json_schema_extra for n, field in cls.model_fields.items() if n not in SETTINGS_FILE}
    return [n for n in extra if extra[n]["reads"]], [n for n in extra if extra[n]["writes"]]


def _text(annotation):
    return annotation is str or (any(map(_text, typing.get_args(annotation))) and "Literal" not in str(annotation))


def _arguments(cls, values):
    """Flags first, then what has none, in its order."""
    flags, rest = [], []
    for name, field in cls.model_fields.items():
        if name in values and field.json_schema_extra["positional"]:
            rest.append(str(values[name]))
        elif name in values:
            flags += ["--" + name.strip("_").replace("_", "-"), str(values[name])]
    return [*COMMANDS[cls][1], *rest, *flags]


def test_every_command_is_here_and_declares_its_files():
    assert _all(config.Settings) - {config.Settings} == set(COMMANDS)
    for cls in COMMANDS:
        reads, writes = _files(cls)
        text = {name for name, field in cls.model_fields.items() if _text(field.annotation)}
        assert text - WORDS - SETTINGS_FILE == {*reads, *writes}, cls


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_no_pair_of_flags_may_name_one_file(cls, tmp_path, monkeypatch):
    """As it is spelt, through a symbolic link, and by another name of the same file."""
    monkeypatch.chdir(tmp_path)
    reads, writes = _files(cls)
    others = {name: f"else-{name}{cls.model_fields[name].json_schema_extra['writes'].suffix}" for name in writes}
    others |= {name: f"else-{name}" for name in reads}
    pairs = [*itertools.combinations(writes, 2), *itertools.product(reads, writes)]
    assert len(pairs) >= len(writes)
    for (first, second), way in itertools.product(pairs, ("spelt", "symbolic", "hard")):
        folder = tmp_path / f"{first}-{second}-{way}"
        folder.mkdir()
        file = folder / "fineweb_val_000000.bin"
        file.write_bytes(PRECIOUS)
        other = folder / "other"
        if way == "spelt":
            other = f"./{folder.name}/../{folder.name}/{file.name}"
        elif way == "symbolic":
            other.symlink_to(file)
        else:
            os.link(file, other)
        named = {**others, first: folder if first == "data_path" else file, second: other}
        with pytest.raises(InputError, match="both are"):
            COMMANDS[cls][0](_arguments(cls, named))
        assert file.read_bytes() == PRECIOUS
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} <= set(reads + writes)


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_a_file_of_another_kind_is_not_overwritten(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reads, writes = _files(cls)
    for name in writes:
        kind = cls.model_fields[name].json_schema_extra["writes"]
        if kind in (outputs.PROGRESS, outputs.FOLDER):  # read and refused; never overwritten
            continue
        file = tmp_path / f"mine{kind.suffix}"
        file.write_bytes(PRECIOUS)
        named = {each: f"else-{each}" for each in reads} | ({"out": "else"} if "out" in writes else {})
        arguments = _arguments(cls, {**named, name: file})
        with pytest.raises(InputError, match=f"exists, and is not {kind.name}; --force overwrites it"):
            COMMANDS[cls][0](arguments)
        assert file.read_bytes() == PRECIOUS
        settings, _ = config.load(cls, "", "", [*arguments[len(COMMANDS[cls][1]) :], "--force"])
        config.check_outputs(settings)


def test_kinds_know_their_own_from_others(tmp_path):
    files = {
        "json": json.dumps({"a": 1}, indent=2),
        "jsonl": json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}),
        "one line": json.dumps({"text": "a"}),
        "text": "import nothing from it",
        "script": "import torch\nprint(torch)\n",
        "words": "words\n",
        "picture": b"\x89PNG\r\n",
        "artifact": (resources.files("slotfast") / "demo" / "demo.slotfast").read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    np.savez(tmp_path / "rows.npz", position=np.arange(3))
    shutil.make_archive(tmp_path / "archive", "zip", tmp_path, "text")
    expected = {"JSON": "json", "SCRIPT": "script", "PICTURE": "picture", "MODEL": "artifact", "ROWS": "rows.npz"}
    for kind, own in expected.items():
        for file in tmp_path.iterdir():
            assert getattr(outputs, kind).matches(file) == (file.name == own), (kind, file)


def test_names_that_promise_something_else_are_refused(tmp_path):
    for flag, path, suffix in (("--plot", "x.txt", ".png"), ("--per-token", "x.csv", ".npz")):
        with pytest.raises(
            InputError, match=f"{flag} .*{path}: is to be an? .*: expected a name that ends with {suffix}"
        ):
            evaluate([flag, str(tmp_path / path)])


def test_files_in_a_folder_that_is_read_are_inputs(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{\n}")
    with pytest.raises(InputError, match="--tokenizer and --json: both are"):
        evaluate(["--tokenizer", str(tmp_path), "--json", str(tmp_path / "tokenizer.json")])
    (tmp_path / "result.json").write_text('{\n  "presets": []}')
    (tmp_path / "submission.json").write_text("{\n}")  # of an earlier call, beside the result as the contest has it
    for name, message in (("result.json", "RUN and --submission: both are"), ("submission.json", "not a result")):
        with pytest.raises(InputError, match=message):
            record.main([str(tmp_path), "--submission", str(tmp_path / name)])


def test_devices_are_written_as_often_as_wanted():
    config.check_outputs(config.EvalSettings(json="/dev/null", per_token="/dev/null", text="/dev/null"))


SMALL = (
    "--layers 1 --width 16 --heads 2 --kv-heads 1 --mlp-width 16 --seq-len 32 --vocab-size 300 --steps 1 --seconds 0"
)


def test_training_does_not_overwrite_a_tokenizer_that_is_not_its_own(tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words to learn from, number {n} " * 9}) for n in range(40)))
    beside, command = tmp_path / "m.model", ["--text", str(text), "--out", str(tmp_path / "m.slotfast"), *SMALL.split()]
    command += ["--seconds", "0", "--dtype", "float32", "--calibrate", "no"]
    theirs = (resources.files("slotfast") / "demo" / "demo.model").read_bytes()
    beside.write_bytes(theirs)
    message = "the tokenizer .*m.model: exists, and is not what --out was trained with"
    with pytest.raises(InputError, match=message):
        train.main(command)
    saving = ["--checkpoint", str(tmp_path / "c"), "--resume"]
    with pytest.raises(InputError, match="m.model: exists, and this run makes another one"):
        train.main([*command, *saving])
    assert beside.read_bytes() == theirs and not (tmp_path / "m.slotfast").exists()
    train.main([*command, "--force"])
    own = beside.read_bytes()
    assert own != theirs
    train.main(command)  # the artifact there was trained with it
    (tmp_path / "m.slotfast").unlink()
    train.main([*command, *saving])  # what a killed run had written is written again, the same
    assert beside.read_bytes() == own


def _full(*_, **__):
    raise InputError("No space left on device")


def test_an_interrupted_training_leaves_files_as_they_were(tmp_path, monkeypatch):
    """No tokenizer that the same command would refuse; an earlier model keeps the one that it was trained with."""
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"some words to learn from, number {n} " * 9}) for n in range(40)))
    command = ["--text", str(text), "--out", str(tmp_path / "m.slotfast"), *SMALL.split()]
    command += ["--dtype", "float32", "--calibrate", "no"]

    def interrupted(arguments):
        def interrupt(self):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("slotfast.train.trainer.Trainer.run", interrupt)
            train.main(arguments)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    assert set(interrupted(command)) == {"t.jsonl"}
    train.main(command)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"t.jsonl", "m.model", "m.slotfast"}
    (tmp_path / "m.slotfast").unlink()
    (tmp_path / "m.model").unlink()
    for save in (["--checkpoint", str(tmp_path / "c"), "--checkpoint-steps", "1"], []):  # each on a full disk
        with monkeypatch.context() as patched, pytest.raises(InputError, match="No space"):
            for place in ("slotfast.train.program.write_artifact", "slotfast.command.checkpoint.atomic_write"):
                patched.setattr(place, _full)
            train.main([*command, *save])
        assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl"}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    assert interrupted(changed(command, ["--vocab-size", "310"])) == made
