"""The bench of file sizes: what it draws has the statistics of what it came from, and ours is the smallest file."""

import numpy as np
import pytest

from bench.artifact_sizes import artifact, like, measure, published, sdclip, statistics
from slotfast.artifact import rans
from slotfast.model import GPTConfig
from slotfast.quantize import QuantizedMatrix


@pytest.fixture(scope="module")
def known():
    return statistics(np.random.default_rng(0))


def test_drawn_matrices_are_like_trained_ones(known):
    source = like("blocks.4.mlp.proj.weight", 5, known)
    assert source is known["blocks.4.mlp.proj.weight"] and like("blocks.9.mlp.fc.weight", 10, known) is not None
    assert like("blocks.0.attn_scale", 5, known) is None and like("tok_emb.weight", 5, known) is not None
    drawn = source.draw((512, 1536), np.random.default_rng(1)).double()
    assert float(drawn.square().mean().sqrt()) == pytest.approx(1, abs=0.1)
    spread = drawn.square().mean(0).log2().std() / 2  # of column sizes, in doublings
    assert float(spread) == pytest.approx(np.log2(source.columns).std(), rel=0.15) and spread > 0.3


@pytest.mark.skipif(rans.constriction is None, reason="no constriction here")
@pytest.mark.parametrize("rounded", [published(0.2), sdclip], ids=["published", "sdclip"])
def test_ours_is_the_smallest_file(known, rounded, tmp_path):
    sizes = dict(vocab_size=512, layers=1, width=256, heads=4, kv_heads=2, mlp_width=512)
    tables = dict(bigram_buckets=256, bigram_width=64, value_width=64, value_layers=(0,))
    found = artifact(GPTConfig(**sizes, **tables), known, rounded, 0)
    row = measure(found, tmp_path)
    assert "rans" in row["codecs"] and row["code_bytes"] < 1.005 * row["order0_code_bytes"]
    assert row["bytes"] < min(row["xz_bytes"], row["brotli_bytes"])
    assert row["weights"] == sum(t.codes.numel() for t in found.tensors.values() if isinstance(t, QuantizedMatrix))
