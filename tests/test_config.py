"""Settings: flags before variables before defaults, and errors that name what is right."""

import re
import typing

import pytest

from slotfast import config
from slotfast.errors import InputError


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
