"""Sums, bits per byte, and the clustered standard error against a bootstrap over documents."""

import math

import numpy as np
import pytest

from slotfast.score import Meter


def _filled(rng, documents=200):
    meter = Meter(["none", "x"], documents)
    sizes = rng.integers(1, 60, documents)
    document = np.repeat(np.arange(documents), sizes)
    n_bytes = rng.integers(0, 6, len(document))
    base = rng.gamma(2.0, 1.0, len(document))
    nll = np.stack([base, base - 0.05 - 0.1 * rng.standard_normal(documents)[document]]).astype(np.float32)
    return meter, document, n_bytes, nll


def test_pieces_add_up_to_the_whole():
    meter, document, n_bytes, nll = _filled(np.random.default_rng(0))
    whole = Meter(meter.rows, len(meter.tokens))
    whole.add(document, n_bytes, nll)
    for part in np.array_split(np.arange(len(document)), 37):
        meter.add(document[part], n_bytes[part], nll[:, part])
    np.testing.assert_array_equal(meter.bytes, whole.bytes)
    np.testing.assert_array_equal(meter.tokens, np.bincount(document))
    np.testing.assert_allclose(meter.nats, whole.nats, rtol=1e-14)
    assert meter.score(0).nats == pytest.approx(float(nll[0].astype(np.float64).sum()), rel=1e-12)
    assert meter.score(1).bpb == pytest.approx(
        float(nll[1].sum(dtype=np.float64)) / math.log(2) / n_bytes.sum(), rel=1e-12
    )


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    rng = np.random.default_rng(1)
    meter, document, n_bytes, nll = _filled(rng)
    meter.add(document, n_bytes, nll)
    score = meter.score(1)
    gain = (meter.nats[0] - meter.nats[1]) / math.log(2)
    draws = rng.integers(0, len(gain), (4000, len(gain)))
    bootstrap = (gain[draws].sum(1) / meter.bytes[draws].sum(1)).std()
    assert score.gain_se == pytest.approx(bootstrap, rel=0.1)
    assert score.gain_bpb == pytest.approx(meter.score(0).bpb - score.bpb, abs=1e-12)


def test_one_document_has_no_standard_error_and_no_bytes_no_bpb():
    meter = Meter(["none", "x"], 3)
    assert math.isnan(meter.score(0).bpb)
    meter.add(np.array([1, 1]), np.array([2, 3]), np.ones((2, 2)))
    assert meter.score(1).gain_se is None and meter.score(1).gain_bpb == 0
