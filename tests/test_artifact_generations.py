"""What a file leaves unsaid of its model has to be told: no number without it, the right one with it."""

import re

import pytest
import torch

from slotfast.artifact import load_artifact, parse_overrides
from slotfast.artifact.community import decode_community
from slotfast.artifact.generations import GENERATIONS
from slotfast.config import ConvertSettings, EvalSettings, ShowSettings
from slotfast.errors import InputError
from slotfast.model import GPTConfig
from tests.community_files import baseline, pr287, pr1019, pr1179, pr1394, safetensors
from tests.models import randomised

# Each generation's small likeness: its parts and settings, from the published descriptions, and the form of its files.
SMALL = dict(vocab_size=70, layers=11, width=32, heads=2, kv_heads=1, mlp_width=24, rope_dims=16, seq_len=2048)
TABLES = dict(bigram_buckets=16, bigram_width=4, value_width=4, value_layers=(9, 10))
BARE = dict(bigram_buckets=0, value_width=0, value_layers=(), smear=False)
LATE = dict(**BARE, skip_gates=True, xsa_layers=11, rope_length=2048)
LIKENESSES = {
    "baseline": (
        dict(BARE, xsa_layers=0, ln_scale=False, mlp_slope=0.0, rope_length=1 << 17, seq_len=1024),
        baseline,
        ["baseline"],
    ),
    "pr287": (
        dict(TABLES, value_width=0, value_layers=(), xsa_layers=4, ln_scale=False, mlp_slope=0.0),
        pr287,
        ["pr287"],
    ),
    "pr549": (dict(TABLES, xsa_layers=4), pr1019, ["pr1019", "pr1350", "pr549"]),
    "pr1019": (TABLES, pr1019, ["pr1019", "pr1350", "pr549"]),
    "pr1350": (TABLES, pr1019, ["pr1019", "pr1350", "pr549"]),
    "pr1179": (dict(TABLES, skip_gates=True), pr1179, ["pr1217", "pr1179", "pr1204"]),
    "pr1204": (dict(TABLES, skip_gates=True), pr1179, ["pr1217", "pr1179", "pr1204"]),
    "pr1217": (dict(TABLES, skip_gates=True), pr1179, ["pr1217", "pr1179", "pr1204"]),
    "pr1218": (dict(LATE, value_width=4, value_layers=(9, 10)), pr1179, ["pr1218"]),
    "pr1394": (dict(LATE, loops=2, loop_start=4, loop_end=5), pr1394, ["pr1394", "pr1413"]),
    "pr1413": (dict(LATE, loops=2, loop_start=4, loop_end=5), pr1394, ["pr1394", "pr1413"]),
    "pr1493": (dict(LATE, loops=2, loop_start=3, loop_end=5, parallel_from=7), pr1394, ["pr1493"]),
}


def _model(settings, state=None):
    model = randomised(SMALL | settings, seed=5)
    if state is not None:
        model.load_state_dict(state)
    return model


def _nll(model):
    """Longer than 1,024 positions, from where on some generations stretch their rotary base."""
    tokens = torch.randint(70, (1, 1101), generator=torch.Generator().manual_seed(1))
    logits = model.head(model.hidden(tokens[:, :-1]))
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By generation: a file, and the losses of the model that was built directly."""
    folder, found = tmp_path_factory.mktemp("generations"), {}
    for name, (settings, make, _) in LIKENESSES.items():
        data, loaded = make(_model(settings).state_dict())
        (folder / name).write_bytes(data)
        found[name] = folder / name, _nll(_model(settings, loaded))
    return found


@pytest.mark.parametrize("name", LIKENESSES)
def test_no_number_before_the_generation_is_named_and_the_right_one_after(name, files):
    path, losses = files[name]
    with pytest.raises(InputError) as caught:
        load_artifact(path)
    message = str(caught.value)
    offered = re.findall(r"\b(?:baseline|pr\d+)\b", message.removeprefix(str(path)))
    likely = LIKENESSES[name][2]
    assert offered == likely and "--model-config" in message and len(message) - len(str(path)) < 302
    artifact = load_artifact(path, parse_overrides(name))
    assert torch.equal(_nll(artifact.model()), losses)
    assert artifact.metadata["generation"] == name and artifact.config.seq_len == (1024 if name == "baseline" else 2048)


def test_a_generation_of_another_kind_gives_other_losses(files):
    """So the name decides, and nothing beneath it."""
    path, losses = files["pr549"]
    assert not torch.equal(_nll(load_artifact(path, {"generation": "pr1019"}).model()), losses)
    told = parse_overrides("pr1019,xsa_layers=4")
    assert torch.equal(_nll(load_artifact(path, told).model()), losses)


@pytest.mark.parametrize("name", ["pr287", "pr549", "pr1493"])
def test_settings_one_by_one_are_enough_when_none_is_missing(name, files):
    path, losses = files[name]
    config = _model(LIKENESSES[name][0]).config
    unsaid = decode_community(path).describe().unsaid
    told = {key: getattr(config, key) for key in unsaid}
    assert torch.equal(_nll(load_artifact(path, told).model()), losses)
    for key in unsaid:
        rest = {other: value for other, value in told.items() if other != key}
        message = "'skip_weights' has shape" if key == "loops" else f"tensors say {key}, on which"
        with pytest.raises(InputError, match=message):
            load_artifact(path, rest)


def test_every_setting_on_which_losses_depend_is_shown_or_asked_for(files):
    """A setting that comes to the model later has to be decided on here."""
    path, _ = files["pr1019"]
    description = decode_community(path).describe()
    decided = {*description.shown.settings, *description.unsaid, *description.assumed}
    left = {"qk_gain", "bos_id", "rope_bf16"}  # a start value; what no generation has; a matter of the last digits
    assert decided | left == set(GPTConfig.model_fields)


def test_a_checkpoint_is_asked_for_too(files, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(_model(TABLES).state_dict())[0])
    with pytest.raises(InputError, match="--model-config pr1019 .or pr1350, pr549.,"):
        load_artifact(path)


def test_tables_of_the_entrys_size_decide_which_comes_first(tmp_path):
    for buckets, width, first in ((1536, 128, "pr549"), (2048, 128, "pr1350"), (3072, 112, "pr1019")):
        model = _model(TABLES | {"bigram_buckets": buckets, "bigram_width": width})
        (tmp_path / "a").write_bytes(safetensors(model.state_dict())[0])
        with pytest.raises(InputError, match=f"--model-config {first} "):
            load_artifact(tmp_path / "a")


def test_loops_are_asked_for_with_the_generations_that_have_as_many_skips(files):
    for name in ("pr1394", "pr1493"):
        with pytest.raises(
            InputError, match=r"its layers repeat; loops=, loop_start=, loop_end= say which, and so does"
        ):
            load_artifact(files[name][0], {"generation": "pr1218"})


@pytest.mark.parametrize("settings", [EvalSettings, ShowSettings, ConvertSettings])
def test_help_lists_the_generations(settings):
    about = settings.model_fields["model_config_"].description
    assert tuple(re.findall(r"\b(?:baseline|pr\d+)\b", about)) == GENERATIONS == tuple(sorted(LIKENESSES, key=_number))


def _number(name):
    return int(name.removeprefix("pr")) if name != "baseline" else 0
