"""slotfast: test-time logit adaptation of small language models, fast and provably honest."""
