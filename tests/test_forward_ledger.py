"""The ledger of a forward holds what the model's operators really read and write."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import forward_ledger
from bench.bench_forward import operations
from bench.forward_ledger import CONTEST, committed, summary
from bench.ledger import FUSED, Shape, ledger_of, visible
from slotfast import ops
from slotfast.model import GPT, GPTConfig

SMALL = GPTConfig(
    vocab_size=96, seq_len=48, layers=4, width=64, heads=4, kv_heads=2, mlp_width=160, rope_dims=8, xsa_layers=3,
    bigram_buckets=64, bigram_width=16, value_width=16, value_layers=(2, 3), loops=1, loop_start=1, loop_end=2,
    skip_gates=True,
)  # fmt: skip
WINDOWS = Shape(SMALL, windows=3, length=48, scored=48)
STREAM = Shape(SMALL, length=40, block=24, sinks=2)


class Traffic(TorchDispatchMode):
    """Bytes by the addresses of real tensors: what each operator is given and what it makes anew."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        starts = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in made if x.untyped_storage().data_ptr() not in starts]
        if made and "embedding" in str(operator):
            self.bytes += 8 * given[1].numel() + 2 * sum(map(self.size, made))
        elif made and "empty" not in str(operator):
            given = [] if "_like" in str(operator) else given
            self.bytes += sum(map(self.size, given)) + sum(map(self.size, made))
        return out

    @staticmethod
    def size(x):
        places = math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)
        return places * x.element_size()


def test_eager_bytes_are_those_of_a_run():
    """A small model with every kind of part runs on a CPU; 2%: torch's own attention there lays out its result
    otherwise, and probabilities are one pass."""
    model = GPT(SMALL).eval().cast_matrices(torch.bfloat16)
    tokens = torch.randint(0, SMALL.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), Traffic() as traffic:
        ops.cross_entropy(model.head(model.hidden(tokens, torch.bfloat16)), tokens)
    counted = sum(line.bytes for line in ledger_of(WINDOWS))
    copies = next(
        line.bytes for line in ledger_of(WINDOWS) if line.function == "without_own_ref" and line.operator == "sub"
    )
    assert counted == pytest.approx(traffic.bytes, rel=0.02, abs=copies)


def test_lines_computed_by_hand():
    """The MLP's two passes; XSA's subtraction; the cast of logits to float32 and its cap's three passes."""
    tokens, lines = 3 * 48, {(line.function, line.operator): line for line in ledger_of(WINDOWS)}
    runs = len(SMALL.order)
    for operator in ("leaky_relu", "square"):
        line = lines["MLP.forward", operator]
        assert line.calls == runs and line.read == line.written == runs * tokens * 160 * 2
    assert lines["MLP.fc", "linear"].flops == runs * 2 * tokens * 160 * 64
    assert lines["MLP.fc", "linear"].read == runs * 2 * (tokens * 64 + 160 * 64)
    own = lines["without_own_ref", "sub"]
    assert own.calls == len([layer for layer in SMALL.order if layer >= 1])  # xsa_layers 3 of 4
    assert own.read == 2 * own.written == own.calls * tokens * 64 * 2 * 2
    assert lines["GPT.head", "to"].read * 2 == lines["GPT.head", "to"].written == tokens * 96 * 4
    capped = sum(line.bytes for (function, _), line in lines.items() if function == "GPT.head > softcap")
    assert capped == 3 * 2 * tokens * 96 * 4


@pytest.mark.parametrize("shape", [WINDOWS, STREAM], ids=["windows", "stream"])
def test_operations_are_those_of_the_shape(shape):
    """Products and attention, against `bench.bench_forward`, which counts them from the parameters."""
    before = ledger_of(shape)
    found = before.total(["products", "attention"]).flops
    keys = visible(shape.length, shape.length, shape.length) / shape.length if shape.block is None else shape.length + 2
    mixing = 2 * len(SMALL.order) * 2 * SMALL.width  # which it takes for a matrix
    looked_back_at = 2 * 2 * SMALL.bigram_width * SMALL.width if shape.block else 0  # two tokens before the block
    expected = shape.tokens * (operations(GPT(SMALL), keys) - mixing) + looked_back_at
    assert found == pytest.approx(expected, rel=1e-12)
    after = ledger_of(shape, kernels=True)
    assert after.total(["products", "attention"]).flops == found


@pytest.mark.parametrize("shape", [WINDOWS, STREAM], ids=["windows", "stream"])
def test_kernels_leave_none_of_a_block_s_passes(shape):
    """Neither norms, rotations and gains of heads, nor activations, scales and residuals are passes of their own."""
    before, after = ledger_of(shape), ledger_of(shape, kernels=True)
    runs = len(SMALL.order)
    for name, times in (("linear_heads", 1), ("linear_squared", 1), ("linear_residual", 2), ("channel_mix", 1)):
        assert sum(line.calls for line in after if line.operator == name) == times * runs, name
    assert sum(line.calls for line in after if line.operator == "linear_cross_entropy") == 1
    gone = (
        "Block.forward",
        "MLP.forward",
        "GPT.add_skip",
        "WindowAttention.__call__ > rotate",
        "without_own_ref",
        "GPT.head",
    )
    assert any(line.function.startswith(gone) for line in before)
    assert not [line for line in after if line.function.startswith(gone) and line.operator not in FUSED]


def test_rows_that_adapt_have_their_logits_in_one_pass():
    lines = {(line.function, line.operator): line for line in ledger_of(WINDOWS, kernels=True, logits=True)}
    product = lines["GPT.head", "linear_logits"]
    assert (product.group, product.written) == ("products", 3 * 48 * 96 * 4)
    assert not [name for name, _ in lines if "softcap" in name]


def test_a_fused_product_is_charged_what_it_reads_and_writes():
    tokens, lines = 3 * 48, {(line.function, line.operator): line for line in ledger_of(WINDOWS, kernels=True)}
    runs = len(SMALL.order)
    product = lines["linear_residual", "linear_residual"]
    assert product.read == runs * 2 * (tokens * 64 + 64 * 64 + tokens * 160 + 160 * 64)
    assert product.written == 2 * runs * tokens * 64 * 2
    besides = lines["linear_residual", "linear_residual, besides"]
    assert besides.read == 2 * runs * (tokens * 64 * 2 + 64 * 4) and besides.written == 2 * runs * tokens * 4
    assert besides.calls == 0 and besides.group == "residual, mixing"


def test_the_contest_s_forward():
    """What the estimate said, 48.6 GB, and what the kernels are for: under 8 GB."""
    shape = Shape(CONTEST)
    found = summary(ledger_of(shape), ledger_of(shape, kernels=True))
    assert found["elementwise"]["eager"]["gb"] == pytest.approx(48.6, rel=0.02)
    assert found["elementwise"]["fused"]["gb"] < 8
    stored = json.loads(forward_ledger.COMMITTED.read_text())
    assert stored.keys() - {"command", "commit", "kind"} == set(committed())
    for name, both in stored["contest, windows"]["summary"].items():
        for which, line in both.items():
            expected = pytest.approx(line["gb"], rel=0.01, abs=1e-3)
            assert found[name][which]["gb"] == expected, "python -m bench.forward_ledger --all"


def test_the_command_is_for_any_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(SMALL.model_dump_json())
    for flags in (["--lines"], ["--stream", "--block", "8", "--length", "16"]):
        monkeypatch.setattr("sys.argv", ["forward_ledger", "--config", "config.json", "--windows", "2", *flags])
        assert forward_ledger.main() == 0
        out = capsys.readouterr().out
        assert "elementwise" in out and ("MLP.forward" in out) == ("--lines" in flags)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    monkeypatch.setattr("sys.argv", ["forward_ledger", "--windows", "0"])
    with pytest.raises(SystemExit):
        forward_ledger.main()
