"""Settings: flags before variables before defaults, and errors that name what is right."""

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
        (["--stride", "x"], "--stride 'x': Input should be a valid integer"),
        (["--stride", "0"], "--stride '0': Input should be greater than or equal to 1"),
        (["--backend", "cuda"], "--backend 'cuda': Input should be 'auto', 'triton' or 'torch'"),
        (["--stride"], "--stride: expected one argument"),
    ],
)
def test_wrong_flags(argv, message):
    with pytest.raises(InputError, match=message):
        load(*argv)


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
