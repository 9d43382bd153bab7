"""The examples do what they say: every token once, plain losses as torch computes them, and nothing that leaks."""

import re

import pytest
import torch
import torch.nn.functional as F

from examples import nanochat, nanogpt
from examples.evaluate import losses
from slotfast.audit import Hints, audit

VOCAB = 257


def _models():
    torch.manual_seed(0)
    gpt = nanogpt.GPT().eval()
    return {"nanogpt": lambda idx: gpt(idx, idx)[0], "nanochat": nanochat.Chat().eval()}


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


def test_the_loop_is_clean():
    model = _models()["nanochat"]
    tokens = torch.randint(VOCAB, (100,), generator=torch.Generator().manual_seed(1))

    def score(tokens, log):
        return losses(model, tokens, length=32, stride=8, bos_id=256)[1]

    report = audit(score, tokens, VOCAB, bos_id=256, hints=Hints(seq_len=32, stride=8, batch_windows=8), reruns=8)
    assert report.clean, str(report)
