"""Quantisation: GPTQ against a textbook loop, its gain over rounding, degenerate input, budgets and pruning."""

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import slotfast
from slotfast.artifact import Artifact, read_artifact, write_artifact
from slotfast.errors import InputError
from slotfast.generate import sample
from slotfast.model import GPT
from slotfast.quantize import (
    QuantizedMatrix,
    clip_scales,
    collect_hessians,
    format_report,
    prune_to_size,
    quantize_gptq,
    quantize_model,
    quantize_rows,
)
from slotfast.quantize.gptq import _corrections, _round_columns


def _inputs(tokens, width, seed=0, rank=None):
    """Correlated inputs [tokens, width] with a few loud channels, as a layer's inputs are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    loud = torch.exp(torch.randn(width, generator=generator, dtype=torch.float64))
    return torch.randn(tokens, rank or width, generator=generator, dtype=torch.float64) @ mix * loud


def _naive(weight, hessian, scale, limit, damping):
    """Codes [N, K] by the textbook: round a column, invert the Hessian of the columns that are left, correct them."""
    rows, width = weight.shape
    diagonal = np.diag(hessian)
    order = sorted(range(width), key=lambda j: (-diagonal[j], j))
    damped = hessian + damping * diagonal.mean() * np.eye(width)
    left, codes = weight.copy(), np.zeros((rows, width))
    for done, j in enumerate(order):
        rest = order[done:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        for n in range(rows):
            codes[n, j] = min(max(round(left[n, j] / scale[n]), -limit), limit)
            error = left[n, j] - codes[n, j] * scale[n]
            left[n, rest] -= error / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("block", [1, 7, 24, 128])
def test_codes_are_those_of_the_textbook(block):
    x = _inputs(200, 24)
    hessian = x.T @ x
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = quantize_gptq(weight, hessian, 6, "sdclip", damping=0.02, block=block, sdclip_k={6: 2.0})
    scale = clip_scales(weight, 6, "sdclip", {6: 2.0})[0]
    assert torch.equal(got.scale, scale) and got.codes.dtype == torch.int8
    expected = _naive(weight.numpy(), hessian.numpy(), scale.double().numpy(), 31, 0.02)
    assert np.array_equal(got.codes.numpy(), expected)
    assert (np.abs(expected) == 31).sum() > 3  # clipped weights hand on their error, too


@pytest.mark.parametrize("choose", ["output", "weights"])
def test_the_chosen_scale_is_the_best_by_the_error_that_counts(choose):
    x = _inputs(200, 24)
    hessian = x.T @ x
    weight = torch.randn(9, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight[:, 3] *= 6  # worth clipping for some rows
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    errors, matrices = [], []
    for scale in clip_scales(weight, 6):
        codes = _naive(weight.numpy(), hessian.numpy(), scale.double().numpy(), 31, 0.01)
        deviation = torch.from_numpy(codes) * scale.double()[:, None] - weight
        squared = (deviation @ damped * deviation) if choose == "output" else deviation.square()
        errors.append(squared.sum(1))
        matrices.append(torch.from_numpy(codes).to(torch.int8))
    errors = torch.stack(errors)  # (candidates, rows)
    best = errors.argmin(0) if choose == "output" else errors.sum(1).argmin().expand(9)
    got = quantize_gptq(weight, hessian, 6, choose=choose)
    assert torch.equal(got.codes, torch.stack([matrices[int(c)][row] for row, c in enumerate(best)]))
    assert torch.equal(got.scale, torch.stack([clip_scales(weight, 6)[int(c), row] for row, c in enumerate(best)]))
    assert choose == "weights" or len(set(best.tolist())) > 1


def test_the_loops_error_is_the_outputs():
    x = _inputs(100, 40, rank=60)
    hessian, weight = x.T @ x, torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    order = torch.arange(40)
    scale = clip_scales(weight, 6)[0]
    codes, error = _round_columns(weight.T.clone(), scale, _corrections(hessian, order, 0.01), 31, 16)
    deviation = codes.T * scale.double()[:, None] - weight
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(error, (deviation @ damped * deviation).sum(1))


def _output_error(matrix, weight, x):
    return float((x @ (matrix.dequantize().double() - weight).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("bits", [6, 8])
def test_outputs_change_less_than_by_rounding(bits):
    x = _inputs(4000, 96, rank=48) + 0.1 * _inputs(4000, 96, seed=3)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    fresh, hessian = x[2000:], x[:2000].T @ x[:2000]  # judged on inputs that were not used
    rounded, plain, best = (
        _output_error(matrix, weight, fresh)
        for matrix in (
            quantize_rows(weight, bits),
            quantize_gptq(weight, hessian, bits, choose="weights"),
            quantize_gptq(weight, hessian, bits),
        )
    )
    assert best < 0.7 * rounded and best < 1.02 * plain


def test_degenerate_input():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(5))
    weight[2] = 0
    rows = quantize_rows(weight, 6)
    # One token: rank one. Its output is kept far better than rounding keeps it.
    token = _inputs(1, 10)
    one = quantize_gptq(weight, token.T @ token, 6)
    assert _output_error(one, weight.double(), token) < 0.2 * _output_error(rows, weight.double(), token)
    assert not one.codes[2].any() and one.dequantize().isfinite().all()
    # Inputs that do not hang together: nothing to make up for, so GPTQ rounds.
    alone = quantize_gptq(weight, torch.eye(10), 6)
    assert torch.equal(alone.codes, rows.codes) and torch.equal(alone.scale, rows.scale)
    # No input at all, and columns without.
    assert not quantize_gptq(weight, torch.zeros(10, 10), 6).codes.any()
    x = _inputs(50, 10)
    x[:, [3, 7]] = 0
    dead = quantize_gptq(weight, x.T @ x, 6)
    live = [j for j in range(10) if j not in (3, 7)]
    assert not dead.codes[:, [3, 7]].any()
    without = quantize_gptq(weight[:, live], (x.T @ x)[live][:, live], 6)
    assert torch.equal(dead.codes[:, live], without.codes)
    # Twice the same column, and magnitudes from tiny to large.
    x[:, 1] = x[:, 0]
    assert quantize_gptq(1e-12 * weight, 1e-30 * (x.T @ x), 6).dequantize().isfinite().all()
    assert quantize_gptq(1e6 * weight, 1e30 * (x.T @ x), 6).dequantize().isfinite().all()


@pytest.mark.parametrize("tensor", ["weight", "hessian"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tensor, value):
    inputs = {"weight": torch.ones(3, 4), "hessian": torch.eye(4)}
    inputs[tensor][1, 1] = value
    with pytest.raises(InputError, match="hold NaN or infinite values"):
        quantize_gptq(**inputs, bits=6)


def test_unusable_choices_are_refused(tiny_model):
    weight, x = torch.randn(3, 8), _inputs(2, 8)
    with pytest.raises(InputError, match="damping 0: too little"):
        quantize_gptq(weight, x.T @ x, 6, damping=0.0)
    with pytest.raises(InputError, match="clip 'max': expected percentile or sdclip"):
        quantize_rows(weight, 6, "max")
    for factors in ({6: 0.0}, {6: math.nan}, {8: 20.0}):
        with pytest.raises(InputError, match="sdclip_k .* expected a positive number for 6 bits"):
            quantize_rows(weight, 6, "sdclip", factors)
    with pytest.raises(InputError, match="choose 'mse': expected output or weights"):
        quantize_gptq(weight, torch.eye(8), 6, choose="mse")
    calibration = [torch.zeros(1, 8, dtype=torch.int64)]
    for message, options in {
        "method 'awq': expected rows or gptq": {"method": "awq"},
        "calibration tokens are missing": {"method": "gptq"},
        "expected both or neither": {"target_bytes": 10},
        "budget_seconds 0: expected a positive number": {"budget_seconds": 0},
        "calibration: no tokens": {"calibration": []},
        "token ids outside 0..63": {"calibration": [calibration[0] + 64]},
        "expected integers": {"calibration": [torch.zeros(8)]},
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            quantize_model(tiny_model, **options)
        assert "\n" not in str(caught.value)


def test_sdclip_fixes_the_step():
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(6)) * torch.tensor([[1.0], [2], [4], [0]])
    for bits, k in ((6, 12.85), (8, 20.0)):
        matrix = quantize_rows(weight, bits, "sdclip")
        expected = k * weight.std(1, correction=0) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(matrix.scale.float()[:3], expected[:3], rtol=1e-3, atol=0)
        error = (matrix.dequantize() - weight).abs()
        assert (error <= 0.5001 * matrix.scale.float()[:, None]).all()


def test_hessians_are_of_each_layers_own_input(tiny_model):
    batches = [torch.randint(64, (n, 32), generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
    hessians, tokens = collect_hessians(tiny_model, batches)
    assert tokens == 5 * 32
    assert set(hessians) == {
        name for name, t in tiny_model.state_dict().items() if t.ndim == 2 and "weight" in name
    } - {
        "skip_weights",
        "bigram.embed.weight",
        "ve_shared.embed.weight",
    }
    inputs = []
    hooks = [
        tiny_model.get_submodule(f"blocks.1.{name}").register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        for name in ("attn.c_k", "attn.proj", "mlp.fc", "mlp.proj")
    ]
    hidden = tiny_model.hidden(torch.cat(batches))
    for hook in hooks:
        hook.remove()
    names = [f"blocks.1.{name}.weight" for name in ("attn.c_k", "attn.proj", "mlp.fc", "mlp.proj")]
    for name, x in zip([*names, "tok_emb.weight"], [*inputs, hidden], strict=True):
        x = x.flatten(0, 1).double()
        torch.testing.assert_close(hessians[name], x.T @ x / tokens, rtol=1e-4, atol=1e-4)
    assert hessians["blocks.1.attn.c_v.weight"] is hessians["blocks.1.attn.c_q.weight"]
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())


def test_sampling_on_the_way_is_not_counted(tiny_model):
    ready, _ = collect_hessians(tiny_model, list(sample(tiny_model, 4, 16, batch=2)))
    sampled, tokens = collect_hessians(tiny_model, sample(tiny_model, 4, 16, batch=2))
    assert tokens == 64 and all(torch.equal(ready[name], sampled[name]) for name in ready)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN or infinite"), (1e5, "values beyond float16")])
def test_weights_that_cannot_be_stored_are_refused(tiny_model, value, message):
    model = copy.deepcopy(tiny_model)
    model.smear.gate[3] = value
    with pytest.raises(InputError, match=rf"tensor 'smear\.gate' holds {message}"):
        quantize_model(model)


def test_nan_activations_are_refused(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.blocks[1].attn_scale[0] = torch.inf
    with pytest.raises(InputError, match=r"the input of blocks\.1\.\S+ is NaN or infinite"):
        collect_hessians(model, [torch.zeros(1, 8, dtype=torch.int64)])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_are_what_an_artifact_gets(tiny_model):
    found = quantize_model(tiny_model)
    artifact = Artifact.from_model(tiny_model, {})
    assert list(found.tensors) == list(artifact.tensors)
    for name, tensor in artifact.tensors.items():
        other = found.tensors[name]
        if isinstance(tensor, QuantizedMatrix):
            assert torch.equal(tensor.codes, other.codes) and torch.equal(tensor.scale, other.scale)
            assert tensor.bits == other.bits
        else:
            assert torch.equal(tensor, other)


@pytest.fixture(scope="module")
def demo():
    """The shipped model off its grid: every weight moved by up to half a step, as if it had never been rounded."""
    artifact = read_artifact(Path(slotfast.__file__).parent / "demo" / "demo.slotfast")
    model, generator = artifact.model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, matrix in artifact.tensors.items():
            if isinstance(matrix, QuantizedMatrix):
                noise = torch.rand(matrix.codes.shape, generator=generator) - 0.5
                model.get_parameter(name).add_(noise * matrix.scale.float()[:, None])
    return model


@pytest.fixture(scope="module")
def windows(demo):
    """Windows for calibration, and others to be judged by."""
    return next(sample(demo, 24, 96, batch=24)).split((16, 8))


def _divergence(model, other, tokens):
    """Mean nats by which the other's next-token distributions diverge from the model's."""
    expected, got = (m.head(m.hidden(tokens)).log_softmax(-1) for m in (model, other))
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def _bytes_of(tensors):
    """A size that falls by one for every zero."""
    return sum(int((t.codes != 0).sum()) for t in tensors.values() if isinstance(t, QuantizedMatrix))


def _ones(tensors):
    return sum(int((t.codes.abs() == 1).sum()) for t in tensors.values() if getattr(t, "bits", 0) == 6)


def test_pruning_takes_the_fewest_and_the_cheapest(tiny_model):
    tensors = quantize_model(tiny_model).tensors
    before, total = _bytes_of(tensors), _ones(tensors)
    assert total > 100
    for fewer in (0, 1, 17, total):
        pruned, count = prune_to_size(tensors, before - fewer, _bytes_of)
        assert count == fewer and _bytes_of(pruned) == before - fewer
        gone, kept = [], []
        for name, matrix in tensors.items():
            if not isinstance(matrix, QuantizedMatrix):
                assert torch.equal(pruned[name], matrix)
                continue
            zeroed = pruned[name].codes != matrix.codes
            assert matrix.bits == 6 or not zeroed.any()
            assert not pruned[name].codes[zeroed].any() and (matrix.codes[zeroed].abs() == 1).all()
            assert torch.equal(pruned[name].scale, matrix.scale)
            if matrix.bits == 6:
                squared = matrix.scale.float().square()[:, None].expand(matrix.codes.shape)
                gone.append(squared[zeroed])
                kept.append(squared[(matrix.codes.abs() == 1) & ~zeroed])
        if 0 < fewer < total:
            assert torch.cat(gone).max() <= torch.cat(kept).min()
    with pytest.raises(InputError, match=f"{before - total:,} bytes without a single code of"):
        prune_to_size(tensors, before - total - 1, _bytes_of)


def test_pruning_by_given_costs_with_slack_and_under_a_deadline(tiny_model):
    tensors = quantize_model(tiny_model).tensors
    before, total = _bytes_of(tensors), _ones(tensors)
    name = "blocks.1.mlp.fc.weight"
    costs = {
        other: torch.full(t.codes.shape, float(other != name))
        for other, t in tensors.items()
        if isinstance(t, QuantizedMatrix)
    }
    pruned, _ = prune_to_size(tensors, before - 5, _bytes_of, costs)
    assert int((pruned[name].codes != tensors[name].codes).sum()) == 5
    calls = []

    def counted(tensors):
        calls.append(_bytes_of(tensors))
        return calls[-1]

    _, count = prune_to_size(tensors, before - 5, counted, slack_bytes=total)
    assert 5 <= count < total and len(calls) < 8
    _, count = prune_to_size(tensors, before - 5, _bytes_of, deadline=time.perf_counter())
    assert count == total  # no time to look for less


def test_a_model_is_pruned_to_its_files_size(tiny_model, tmp_path):
    def size(tensors):
        return write_artifact(tmp_path / "a", Artifact(tiny_model.config, tensors))

    whole = size(quantize_model(tiny_model).tensors)
    found = quantize_model(tiny_model, target_bytes=whole - 40, size=size)
    assert found.pruned > 0 and whole - 60 < size(found.tensors) <= whole - 40


def test_pruned_by_the_output_error_a_model_predicts_more_alike(demo, windows):
    calibration, fresh = windows
    away = {}
    for choose in ("output", "weights"):
        options = {"method": "gptq", "choose": choose}
        whole = _bytes_of(quantize_model(demo, [calibration], **options).tensors)
        found = quantize_model(demo, [calibration], **options, target_bytes=whole - 60_000, size=_bytes_of)
        assert found.pruned == 60_000
        away[choose] = _divergence(demo, Artifact(demo.config, found.tensors).model(), fresh)
    assert away["output"] < 0.8 * away["weights"], away


def test_gptq_keeps_the_models_predictions(demo, windows):
    calibration, fresh = windows
    for clip, share in (("percentile", 0.6), ("sdclip", 0.8)):
        found = {method: quantize_model(demo, [calibration], method=method, clip=clip) for method in ("rows", "gptq")}
        away = {
            method: _divergence(demo, Artifact(demo.config, quantized.tensors).model(), fresh)
            for method, quantized in found.items()
        }
        assert away["gptq"] < share * away["rows"], (clip, away)
        for rounded, corrected in zip(found["rows"].report, found["gptq"].report, strict=True):
            if corrected.method == "gptq":
                assert corrected.output_error < rounded.output_error


def test_the_report_says_what_is_stored(demo):
    found = quantize_model(demo, [torch.arange(64)[None]], method="gptq", embeddings="rows")
    assert json.loads(json.dumps([vars(row) for row in found.report])) == [vars(row) for row in found.report]
    assert found.calibration_tokens == 64 and set(found.seconds) == {"calibration", "rounding", "pruning"}
    rows = {row.name: row for row in found.report}
    assert list(rows) == list(demo.state_dict())
    assert rows["tok_emb.weight"].method == "rows" and rows["bigram.embed.weight"].method == "rows"
    assert rows["blocks.0.mlp.fc.weight"].method == "gptq" and rows["smear.gate"].method == "float16"
    name = "blocks.3.attn.c_v.weight"
    codes, weight = found.tensors[name].codes, demo.get_parameter(name)
    _, counts = codes.unique(return_counts=True)
    share = counts / codes.numel()
    assert math.isclose(rows[name].entropy_bits, float(-(share * share.log2()).sum()), rel_tol=1e-5)
    assert math.isclose(rows[name].zeros, float((codes == 0).float().mean()), rel_tol=1e-5)
    assert rows[name].shape == list(weight.shape)
    error = (found.tensors[name].dequantize() - weight).norm() / weight.norm()
    assert math.isclose(rows[name].weight_error, float(error), rel_tol=1e-5)
    table = format_report(found.report).splitlines()
    assert len(table) == 2 + sum(row.bits < 16 for row in found.report) and table[-1].endswith("bits each")


def test_what_is_read_back_predicts_the_same(tiny_model, tmp_path):
    """The score of the file is the score of the quantised model in memory, bit by bit."""
    found = quantize_model(tiny_model, sample(tiny_model, 2, 32), method="gptq")
    memory = GPT(tiny_model.config)
    memory.load_state_dict(
        {name: t.dequantize() if isinstance(t, QuantizedMatrix) else t for name, t in found.tensors.items()}
    )
    write_artifact(tmp_path / "a", Artifact(tiny_model.config, found.tensors))
    stored = read_artifact(tmp_path / "a").model()
    tokens = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        nats = [model(tokens[:, :-1], tokens[:, 1:]).item() for model in (memory, stored, tiny_model)]
    assert nats[0] == nats[1] != nats[2]


def test_a_budget_ends_calibration_and_rounding(tiny_model, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def endless(seconds):
        while True:
            clock[0] += seconds
            yield torch.zeros(1, 8, dtype=torch.int64)

    # Batches of 0.3 s: the fourth would end after half of the budget.
    found = quantize_model(tiny_model, endless(0.3), method="gptq", budget_seconds=2.0)
    assert found.calibration_tokens == 3 * 8 and found.seconds["calibration"] == pytest.approx(0.9)
    assert {row.method for row in found.report} == {"gptq", "rows", "float16"}
    # A first batch that takes all the time: everything is rounded row by row, and the report says so.
    late = quantize_model(tiny_model, endless(3.0), method="gptq", budget_seconds=2.0)
    assert late.calibration_tokens == 8
    assert {row.method for row in late.report} == {"rows", "float16"}
