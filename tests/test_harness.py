"""slotfast as a model of lm-evaluation-harness: the harness's own numbers, and those of `slotfast eval`."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from slotfast import __version__, shipped
from slotfast.data import Tokenizer
from slotfast.errors import InputError
from slotfast.eval.__main__ import main as evaluate

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # read when they are imported
pytest.importorskip("lm_eval", reason="the model of lm-evaluation-harness needs lm_eval (the extra harness)")

from slotfast.harness import SlotfastLM, main
from slotfast.harness.model import ARGUMENTS, TailPlan

from .folders import V, write_folder

LENGTH = 16  # positions of the tiny model, which the harness fills
WORDS = "the quick brown fox jumps over the lazy dog and naïve people of 日本 watch".split()
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/texts.jsonl
output_type: {kind}
test_split: test
{body}
metric_list:
  - metric: {metric}
"""
ROLLING = 'doc_to_text: ""\ndoc_to_target: "{{text}}"'
CHOICES = 'doc_to_text: "{{text}}"\ndoc_to_target: 1\ndoc_to_choice: ["the dog", "fox", "of 日本"]'


@dataclass
class Request:
    """As the harness has them, as far as a model looks at it."""

    args: tuple


def texts():
    """Documents of every length around a window's, in bytes: a token each."""
    rng = np.random.default_rng(0)
    long = [" ".join(rng.choice(WORDS, count)) for count in (1, 3, 9, 40)]
    return [*long, "a" * (LENGTH - 1), "b" * LENGTH, "c" * (LENGTH + 1), "d" * (3 * LENGTH), " x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts())
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, kind, body, metric in (
        ("rolling", "loglikelihood_rolling", ROLLING, "bits_per_byte"),
        ("choices", "multiple_choice", CHOICES, "acc"),
    ):
        text = TASK.format(name=name, folder=folder, kind=kind, body=body, metric=metric)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """A Hugging Face folder: GPT-2, random, a token a byte."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return write_folder(folder / "model", transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


def run(folder, name, lm, **options):
    """A metric of one task, by the harness."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    values = [value for key, value in found["results"][name].items() if key.endswith(",none") and "stderr" not in key]
    return values[0], [sample["resps"] for sample in found["samples"][name]]


@pytest.fixture(scope="module")
def theirs(model):
    """The harness's own model of the folder."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the harness's model needs accelerate")
    return huggingface.HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=1)


def test_disjoint_windows_are_the_harness_s_own_number(folder, model, theirs):
    expected, _ = run(folder, "rolling", theirs)
    found, _ = run(folder, "rolling", "slotfast", model_args={"model": model})
    assert found == pytest.approx(expected, rel=1e-6)
    # by its bytes, not by the tokens: a word has some of more than one byte
    count = sum(len(text.encode()) for text in texts())
    by_hand = sum(SlotfastLM(model=model).loglikelihood_rolling([Request((text,)) for text in texts()], True))
    assert found == pytest.approx(-by_hand / math.log(2) / count, rel=1e-9)


@pytest.mark.parametrize("stride", [1, 5, LENGTH])
def test_windows_are_laid_as_the_harness_lays_them(stride):
    """The same tokens are read, and the same charged, as by the harness's windows with so much context."""
    from lm_eval.utils import get_rolling_token_windows

    for count in range(1, 4 * LENGTH):
        tokens = list(range(1, count + 1))
        plan = TailPlan(count, LENGTH, stride)
        text = [0, *tokens]
        mine = []
        for index in range(len(plan)):
            window = plan[index]
            stop = window.start + window.scored_end
            mine.append((text[window.start : stop], text[window.start + window.context_end + 1 : stop + 1]))
        assert mine == list(get_rolling_token_windows(tokens, 0, LENGTH, LENGTH - stride + 1)), count


def test_a_stride_gives_every_token_the_losses_of_its_window(model, theirs):
    """By the harness's model, given the windows with context: the sum of what it says of each window's new tokens."""
    from lm_eval.utils import get_rolling_token_windows

    lm = SlotfastLM(model=model, stride=5)
    for text in texts()[2:5]:
        ids = theirs.tok_encode(text)
        windows = list(get_rolling_token_windows(ids, theirs.prefix_token_id, LENGTH, LENGTH - 5 + 1))
        parts = [(None, given[: len(given) - (len(new) - 1)], new) for given, new in windows]
        expected = sum(value for value, _ in theirs._loglikelihood_tokens(parts, disable_tqdm=True))
        assert lm.loglikelihood_rolling([Request((text,))], True) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize(
    ("forward", "preset"),
    [("windows", "none"), ("windows", "causal"), ("stream", "causal"), ("stream", "learn:chunk=8+causal")],
)
def test_joined_documents_are_those_of_an_evaluation(folder, capsys, forward, preset):
    """Every document's sum of the losses that `slotfast eval` writes, BOS left out."""
    shared = {"seq_len": 32, "stride": 32, "forward": forward}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in shared.items()]
    rows = folder / "rows.npz"
    evaluate(["--text", str(folder / "texts.jsonl"), *flags, "--preset", "none", preset, "--per-token", str(rows)])
    capsys.readouterr()
    with np.load(rows) as stored:
        token, nll = stored["token"], stored["adapted_nll"].astype(np.float64)
    bos = Tokenizer(shipped.TOKENIZER).bos_id
    document = np.cumsum(token == bos)  # the first one's stands at position 0, which is not among the rows
    expected = np.bincount(document[token != bos], nll[token != bos], len(texts()))
    lm = SlotfastLM(preset=preset, documents="joined", **shared)
    found = lm.loglikelihood_rolling([Request((text,)) for text in texts()], True)
    assert found == pytest.approx((-expected).tolist(), rel=1e-5)


def test_documents_apart_leave_each_other_alone():
    lm = SlotfastLM(preset="causal", seq_len=32, stride=8, forward="stream")
    requests = [Request((text,)) for text in texts()]
    alone = [lm.loglikelihood_rolling([request], True)[0] for request in requests]
    assert lm.loglikelihood_rolling(requests, True) == alone
    repeated = lm.loglikelihood_rolling([Request((texts()[3],))] * 2, True)
    lm.joined = True
    first, second = lm.loglikelihood_rolling([Request((texts()[3],))] * 2, True)
    assert repeated[0] == repeated[1] and second > first + 10  # the preset has seen it before


def test_choices_are_the_harness_s_own(folder, model, theirs):
    expected, their_answers = run(folder, "choices", theirs)
    found, answers = run(folder, "choices", "slotfast", model_args={"model": model, "add_bos_token": False})
    assert found == expected
    for mine, their in zip(answers, their_answers, strict=True):
        assert [value for ((value, _),) in mine] == pytest.approx([value for ((value, _),) in their], abs=1e-4)
        assert [greedy for ((_, greedy),) in mine] == [greedy for ((_, greedy),) in their]


def test_the_likeliest_continuation_is_greedy():
    lm = SlotfastLM(seq_len=64)
    ids = lm.tok_encode("The value of the")
    with torch.inference_mode():
        best = lm._model.head(lm._model.hidden(torch.tensor([ids]))).argmax(-1)[0, -1].item()
    assert [greedy for _, greedy in lm._loglikelihood_tokens([(None, ids, [token]) for token in (best, best - 1)])] == [
        True,
        False,
    ]


def test_text_is_not_generated():
    with pytest.raises(InputError, match="scores texts and generates none"):
        SlotfastLM().generate_until([Request(("a", {}))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strid": 3}, f"strid: no such model argument; expected some of documents, {', '.join(ARGUMENTS)}$"),
        ({"text": "x"}, "text: no such model argument"),
        ({"stride": 0}, "--stride '0': expected"),
        ({"documents": "all"}, "documents=all: expected apart or joined"),
        ({"preset": "pr1350"}, "preset 'pr1350' is not causal"),
        ({"preset": "nothing"}, "preset 'nothing': no such preset"),
        ({"model": "nowhere"}, "no such folder"),
        ({"artifact": "a", "model": "b"}, "give one of them"),
        ({"device": "tpu"}, "--device tpu: expected auto, cpu"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        SlotfastLM(**arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """To find all of the harness's tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda *args, **given: original(*args, **given, include_defaults=False)
    )


def test_the_command_is_the_harness_s_with_our_model(folder, own_tasks_alone, capsys):
    common = ["--tasks", "rolling", "--include_path", str(folder), "--batch_size", "auto"]
    main(["run", "--model", "slotfast", "--model_args", "seq_len=64,stride=16,preset=causal", *common])
    assert "bits_per_byte" in capsys.readouterr().out
    # one with commas
    row = json.dumps({"seq_len": 64, "preset": "causal:scale=0.5,decay=0.99"})
    main(["run", "--model", "slotfast", "--model_args", row, *common])
    assert "causal:scale=0.5,decay=0.99" in capsys.readouterr().out
    with pytest.raises(InputError, match="--stride '?0'?: expected"):
        main(["run", "--model", "slotfast", "--model_args", "stride=0", *common])


def test_the_command_has_our_version_and_waits_for_no_torch():
    code = "import sys; from slotfast.harness import main; main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"slotfast {__version__}", "False"]
