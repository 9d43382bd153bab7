"""Settings: flags before variables before defaults, and errors that name what is right."""

import json
import re
import typing

import pytest

from slotfast import config
from slotfast.errors import InputError

CLASSES = [*config.Settings.__subclasses__(), config.ConvertSettings]


def load(*argv):
    return config.load(config.EvalSettings, "eval", "about", argv)


def test_flags_come_before_variables_before_defaults(monkeypatch):
    monkeypatch.setenv("EVAL_STRIDE", "32")
    monkeypatch.setenv("EVAL_SEQ_LEN", "256")
    settings, sources = load("--seq-len", "128", "--preset", "none", "pr1350:ridge=3,focal=96", "--json", "-")
    assert (settings.seq_len, settings.stride, settings.json_) == (128, 32, "-")
    assert settings.preset == ["none", "pr1350:ridge=3,focal=96"]
    assert (sources["seq_len"], sources["stride"], sources["dtype"]) == ("flag", "EVAL_STRIDE", "default")
    shown = config.show(settings, sources)
    assert "EVAL_STRIDE" in shown and "--seq-len" in shown and len(shown.splitlines()) == len(sources)
    monkeypatch.setenv("SLOT_STEPS", "3")
    assert "SLOT_STEPS" in config.show(settings, sources)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--strid", "3"], "--strid: no such flag; the nearest is --stride"),
        (["--strid=3"], "the nearest is --stride"),
        (["--zzzzzz"], "see --help"),
        (["--stride", "x"], "--stride 'x': expected a whole number$"),
        (["--stride", "0"], "--stride '0': expected at least 1$"),
        (["--backend", "cuda"], "--backend 'cuda': expected 'auto', 'triton' or 'torch'"),
        (["--stride"], "--stride: expected one argument"),
        (["--stride", "1.5"], "--stride '1.5': expected a whole number$"),
        (["--budget", "0"], "--budget '0': expected more than 0.0$"),
        (["--budget", "soon"], "--budget 'soon': expected a number$"),
        (["--ttt-momentum", "1"], "--ttt-momentum '1': expected less than 1.0$"),
        (["--seq-len", "1" * 5000], "expected a whole number"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(InputError, match=message):
        load(*argv)


@pytest.mark.parametrize("cls", config.Settings.__subclasses__(), ids=lambda cls: cls.__name__)
def test_a_flag_of_one_value_is_not_given_twice(cls):
    for name, field in cls.model_fields.items():
        flag = "--" + name.strip("_").replace("_", "-")
        if (
            field.json_schema_extra["positional"]
            or field.annotation is bool
            or typing.get_origin(field.annotation) is list
        ):
            continue
        with pytest.raises(InputError, match=f"^{flag}: given twice, '1' and '2'; it takes one$"):
            config.load(cls, "prog", "", [flag, "1", f"{flag}=2"])
    assert load("--stride", "8", "--stride=8")[0].stride == 8


def test_no_setting_answers_in_the_phrases_of_a_library():
    """Every kind of value, each wrong in every way that it can be."""
    wrong = ["x", "-1", "0", "1e999", "1.5", "nan", "99999999999999999999", ""]
    for cls in set(config.Settings.__subclasses__()) - {config.ShowSettings}:  # whose settings are names alone
        for name, field in cls.model_fields.items():
            if field.json_schema_extra["positional"] or field.annotation is bool:
                continue
            for value in wrong:
                try:
                    config.load(cls, "", "", [f"--{name.strip('_').replace('_', '-')}={value}"])
                except InputError as error:
                    assert re.search(": expected (?!.*(Input|String|should))", str(error)), error


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF", "n", "f", " 0", "0\r"])
def test_a_switch_is_turned_off(text, monkeypatch):
    monkeypatch.setenv("SLOT_ENABLED", text)
    assert config.switch("SLOT_ENABLED", True) is False


def test_a_switch_is_on_off_or_refused(monkeypatch):
    assert config.switch("SLOT_ENABLED", True) is True
    for text in ("1", "true", "yes", "ON", "t", "y"):
        monkeypatch.setenv("SLOT_ENABLED", text)
        assert config.switch("SLOT_ENABLED", False) is True
    for text in ("disabled", "none", "2", "-"):
        monkeypatch.setenv("SLOT_ENABLED", text)
        with pytest.raises(InputError, match=f"^SLOT_ENABLED '{text}': expected 1, 0, true, false"):
            config.switch("SLOT_ENABLED", True)


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("EVAL_STRIDE", "many")
    with pytest.raises(InputError, match="EVAL_STRIDE 'many'"):
        load()


def test_unread_variables_are_warned_about(monkeypatch, capsys):
    monkeypatch.setenv("SLOT_STEP", "3")
    monkeypatch.setenv("SLOT_CLAMP", "3")
    monkeypatch.setenv("QK_GAIN_INIT", "5")
    config.warn_unread_variables()
    assert capsys.readouterr().err == (
        "warning: nothing reads the environment variable SLOT_STEP; the nearest that is read is SLOT_STEPS\n"
    )


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "run.toml").write_text(text)
        return str(tmp_path / "run.toml")

    return write


def test_a_file_comes_after_flags_and_variables_and_before_a_preset(file, monkeypatch):
    path = file(
        'stride = 16\nseq-len = 128\nttt = true\nttt-lr = 1\npreset = ["none", "causal:k=3"]\njson = "r.json"\n'
    )
    monkeypatch.setenv("EVAL_SEQ_LEN", "256")
    settings, sources = load("--config", path, "--json", "-")
    assert (settings.stride, settings.seq_len, settings.json_, settings.ttt) == (16, 256, "-", True)
    assert settings.ttt_lr == 1.0 and settings.preset == ["none", "causal:k=3"]
    assert [sources[n] for n in ("stride", "seq_len", "json_", "dtype")] == [path, "EVAL_SEQ_LEN", "flag", "default"]
    assert re.search(rf"^--stride +16 +{re.escape(path)}$", config.show(settings, sources), re.M)
    path = file('preset = "pr1350"\nlayers = 3\n')
    settings, sources = config.load(config.TrainSettings, "", "", ["--config", path, "--width", "64"])
    assert (settings.preset, settings.layers, settings.width, settings.heads) == ("pr1350", 3, 64, 8)
    assert (sources["layers"], sources["heads"]) == (path, "preset")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_flag_can_be_a_line_of_a_file(cls, file):
    """Its default, where that is a value; the file that says it is named."""
    given, lines = [], []
    for name, field in cls.model_fields.items():
        key = name.strip("_").replace("_", "-")
        if field.json_schema_extra["positional"] and typing.get_origin(field.annotation) is not list:
            given.append("x")
        elif name != "config_" and field.default is not None:
            lines.append(f"{key} = {json.dumps(field.default)}")
    path = file("\n".join(lines))
    settings, sources = config.load(cls, "", "", [*given, "--config", path])
    assert list(sources.values()).count(path) == len(lines) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("strid = 3", "run.toml: strid: no such flag; the nearest is stride$"),
        ("seq_len = 3", "run.toml: seq_len: no such flag; the nearest is seq-len$"),
        ('config = "x"', "run.toml: config: no such flag; see --help$"),
        ("stride = 0", "run.toml: stride 0: expected at least 1$"),
        ('stride = "x"', "run.toml: stride 'x': expected a whole number$"),
        ("stride = true", "run.toml: stride True: expected no true or false$"),
        ("stride = [3]", r"run.toml: stride \[3\]: expected one value$"),
        ("ttt = 1", "run.toml: ttt 1: expected true or false$"),
        ('preset = "none"', "run.toml: preset 'none': expected a list$"),
        ("preset = [3]", "run.toml: preset 3: expected text$"),
        ("[eval]\nstride = 3", "run.toml: eval: no such flag; see --help$"),
        ("[stride]", "run.toml: stride {}: expected one value$"),
        ("stride: 3", "--config '.*run.toml': expected a TOML file: .* line 1"),
        ("stride = 3\nstride = 4", "--config '.*run.toml': expected a TOML file: Cannot overwrite a value"),
        ("text = 1979-05-27", r"run.toml: text .*: expected text$"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(file, text, message):
    with pytest.raises(InputError, match=message):
        load("--config", file(text))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(InputError, match="--config 'nowhere.toml': expected a TOML file: No such file"):
        load("--config", "nowhere.toml")


def test_the_file_is_never_written_over(file):
    settings, _ = load("--force", "--config", file("stride = 3"), "--json", file("stride = 3"))
    with pytest.raises(InputError, match="--config and --json: both are"):
        config.check_outputs(settings)
