"""The auditor finds every loop of the catalogue that cheats, and none of the honest twins."""

import numpy as np
import pytest

from slotfast.audit import audit

from .audit_seeds import SEEDS
from .catalogue import PATTERNS

BUDGETS = (16, 64, 256, 1000, 4000)  # reruns: most leaks show in a few
CHANCE = {"honest when asked again", "noise to hide in"}  # about scores that do not repeat: to say so is a hit


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_the_catalogue(pattern, seed):
    def byte_counts(tokens):
        return np.concatenate([[0], pattern.bytes_of(tokens[1:].numpy(), tokens[:-1].numpy())])

    options = {"byte_counts": byte_counts if pattern.bytes_of else None, "bos_id": pattern.bos_id, "seeds": [seed]}

    def audited(make, reruns):
        loop = make(seed)
        return audit(loop, pattern.tokens(seed), pattern.vocab_size, reruns=reruns, fresh=lambda: make(seed), **options)

    hits = pattern.breaks | ({"repeat"} if pattern.name in CHANCE else set())
    for reruns in BUDGETS:
        leaky = audited(pattern.leaky, reruns)
        if leaky.failed & hits:
            break
    assert leaky.failed & hits, f"{pattern.name} is missed\n{leaky}"
    clean = audited(pattern.clean, reruns)
    assert clean.clean, f"the honest form of {pattern.name} is flagged\n{clean}"
