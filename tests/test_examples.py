"""The examples do what they say: every token once, plain losses as torch computes them, and nothing that leaks."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from examples import nanochat, nanogpt
from examples.evaluate import losses
from slotfast import shipped
from slotfast.audit import Hints, audit
from slotfast.data import Tokenizer, read_documents
from slotfast.errors import InputError
from slotfast.eval.__main__ import main

VOCAB = 257


def _models():
    torch.manual_seed(0)
    gpt = nanogpt.GPT(nanogpt.GPTConfig()).eval()
    return {"nanogpt": lambda idx: gpt(idx, idx)[0], "nanochat": nanochat.Chat(nanochat.ChatConfig()).eval()}


@pytest.mark.parametrize("example", [nanogpt, nanochat])
def test_an_example_runs_and_gains(example, capsys):
    example.main()
    plain, adapted = map(
        float, re.fullmatch(r"plain ([\d.]+) bpb\nadapted ([\d.]+) bpb\n", capsys.readouterr().out).groups()
    )
    assert 0 < adapted < plain - 1  # of random weights


@pytest.mark.parametrize("name", ["nanogpt", "nanochat"])
@pytest.mark.parametrize("count", [2, 30, 65, 66, 81, 82, 300])
def test_every_token_is_scored_once_with_its_own_window(name, count):
    model = _models()[name]
    tokens = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(count))
    plain, adapted = losses(model, tokens, length=64, stride=16, preset="none", batch=3)
    assert len(plain) == count - 1 and torch.equal(plain, adapted)
    for place in {1, min(64, count - 1), count - 1}:  # windows end at position 64, 80, ... and at the end
        end = max(64, 64 + 16 * -(-(place - 64) // 16))
        start = end - 64
        window = F.pad(tokens, (0, 128))[start:end][None]
        logits = model(window)[0, place - 1 - start]
        torch.testing.assert_close(plain[place - 1].float(), F.cross_entropy(logits, tokens[place]), atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"A ship, {n} kings, and the sea. " * 6}) for n in range(3)))
    return path


def _evaluate(capsys, text, name, *arguments):
    """The result of `slotfast eval` on a model of the examples, as it is."""
    main(["--model", f"examples.{name}:untrained", "--text", str(text), *arguments, "--json", "-"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("example", [nanogpt, nanochat])
def test_the_command_scores_a_model_of_that_form_as_it_is(example, text, capsys):
    """In windows like the loop of the examples, adapted too; and it learns."""
    name = example.__name__.removeprefix("examples.")
    found = _evaluate(capsys, text, name, "--stride", "16", "--preset", "causal", "learn:chunk=16,lr=0.01")
    assert found["plan"]["seq_len"] == 64 and found["model"]["vocab_size"] == 1024
    tokenizer, model = Tokenizer(shipped.TOKENIZER), example.untrained().eval()
    tokens = torch.from_numpy(tokenizer.encode_documents(read_documents(text))[0]).long()
    whole = (lambda idx: model(idx, idx)[0]) if example is nanogpt else model
    plain, adapted = losses(whole, tokens, length=64, stride=16, bos_id=tokenizer.bos_id)
    none, causal, learned = found["presets"]
    assert none["adapted"]["nats"] == pytest.approx(float(plain.sum()), rel=1e-5)
    assert causal["adapted"]["nats"] == pytest.approx(float(adapted.sum()), rel=1e-5)
    assert learned["unlearned"]["gain_bpb"] > 0.03


def test_a_stream_reads_as_a_band_does(text, capsys):
    model = nanochat.untrained().eval()
    tokens = torch.randint(1024, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens)  # longer than its window: each token sees 64
        for sizes in ([150], [1] * 150, [64, 1, 85], [7, 143]):
            state, parts = None, []
            for part in tokens.split(sizes, 1):
                logits, state = model.stream(part, state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
            assert state[0] == 150 and all(each.shape[2] == 63 for past in state[1] for each in past)
    found = _evaluate(capsys, text, "nanochat", "--forward", "stream", "--preset", "causal", "--block-tokens", "50")
    assert found["forward"] == "stream" and found["adapted"]["gain_bpb"] > 0.1


def test_a_stream_of_a_model_without_one_is_refused(text, capsys):
    with pytest.raises(InputError, match=r"examples.nanogpt:untrained has no stream\(tokens, state\)"):
        _evaluate(capsys, text, "nanogpt", "--forward", "stream")


def test_the_loop_is_clean():
    model = _models()["nanochat"]
    tokens = torch.randint(VOCAB, (100,), generator=torch.Generator().manual_seed(1))

    def score(tokens, log):
        return losses(model, tokens, length=32, stride=8, bos_id=256)[1]

    report = audit(score, tokens, VOCAB, bos_id=256, hints=Hints(seq_len=32, stride=8, batch_windows=8), reruns=8)
    assert report.clean, str(report)
