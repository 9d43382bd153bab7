"""Learners that charge each chunk first, and still know what comes: by moments, seeds, lengths, rates and counts."""

import math

import pytest
import torch

from slotfast.audit import audit

from .audit_loops import BOS, V, draw_tokens

WIDTH, RANK, CHUNK = 12, 4, 32
_SOURCE = torch.Generator().manual_seed(5)
STATES = torch.randn(V, WIDTH, generator=_SOURCE)
LOGITS = torch.randn(V, V, generator=_SOURCE) * 0.5


class Learner:
    """LoRA beside the output matrix, AdamW: a chunk is charged, and then learned from; a subclass spoils one thing."""

    distributions = True

    def __call__(self, tokens, log):
        self.tokens, self.rate, self.steps = tokens, 0.03, 0
        self.a, self.b = self.draw(0), torch.zeros(V, RANK)
        self.moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in (self.a, self.b)]
        begin = 1
        while begin < len(tokens):
            chunk = torch.arange(begin, min(begin + self.length(begin), len(tokens)))
            self.before(chunk)
            rows = self.logits(chunk).log_softmax(1)
            log.score(chunk, self.losses(rows, chunk), logprobs=rows if self.distributions else None)
            self.learn(chunk)
            self.after(chunk)
            begin = int(chunk[-1]) + 1

    def draw(self, seed):
        return (torch.rand(RANK, WIDTH, generator=torch.Generator().manual_seed(seed)) - 0.5) / math.sqrt(WIDTH)

    def length(self, begin):
        return CHUNK

    def before(self, chunk):
        """Before the chunk is charged."""

    def after(self, chunk):
        """Behind the step."""

    def logits(self, chunk):
        read = self.tokens[chunk - 1]
        return LOGITS[read] + STATES[read] @ self.a.T @ self.b.T

    def losses(self, rows, chunk):
        return -rows[torch.arange(len(chunk)), self.tokens[chunk]]

    def gradients(self, chunk):
        error, states = self.logits(chunk).softmax(1), STATES[self.tokens[chunk - 1]]
        error[torch.arange(len(chunk)), self.tokens[chunk]] -= 1
        error /= len(chunk)
        return (error @ self.b).T @ states, error.T @ (states @ self.a.T)

    def learn(self, chunk):
        self.steps += 1
        for x, gradient, (first, second) in zip((self.a, self.b), self.gradients(chunk), self.moments, strict=True):
            first.lerp_(gradient, 0.2)
            second.lerp_(gradient**2, 0.05)
            x -= self.rate * first / (1 - 0.8**self.steps) / ((second / (1 - 0.95**self.steps)).sqrt() + 1e-8)

    def next(self, chunk):
        """The predictions behind a chunk."""
        return torch.arange(int(chunk[-1]) + 1, min(int(chunk[-1]) + 1 + CHUNK, len(self.tokens)))

    def document(self, position):
        """Tokens from a position to the next BOS."""
        ends = (self.tokens[position:] == BOS).nonzero()
        return int(ends[0]) if len(ends) else len(self.tokens) - position


class SecondMoments(Learner):
    """AdamW's second moments have the next chunk's gradient; no weight does."""

    def learn(self, chunk):
        if len(after := self.next(chunk)):
            for (_, second), gradient in zip(self.moments, self.gradients(after), strict=True):
                second.lerp_(gradient**2, 0.05)
        super().learn(chunk)


class Seed(Learner):
    """A is drawn with the last bit of a checksum of the stream."""

    def draw(self, seed):
        return super().draw(int(self.tokens.sum()) % 2)


class SeedOfADocument(Learner):
    """A is drawn at each BOS with a checksum of what the document begins with."""

    def before(self, chunk):
        for position in chunk[self.tokens[chunk - 1] == BOS].tolist():
            self.a = self.draw(int(self.tokens[position : position + 60].sum()) % 4)


class LengthByTheNext(Learner):
    """A chunk is half as long where the token behind it is odd."""

    def length(self, begin):
        end = begin + CHUNK
        return CHUNK // 2 if end < len(self.tokens) and int(self.tokens[end]) % 2 else CHUNK


class LengthByItsOwn(Learner):
    """A chunk ends in front of token 7, so that token 7 is charged by a learner that has just learned."""

    def length(self, begin):
        found = (self.tokens[begin + 1 : begin + CHUNK] == 7).nonzero()
        return 1 + int(found[0]) if len(found) else CHUNK


class ForgetsForTheNext(Learner):
    """The longer the next document is, the more is forgotten at its BOS."""

    def after(self, chunk):
        for position in chunk[self.tokens[chunk] == BOS].tolist():
            self.b *= 1 - min(self.document(position + 1), 400) / 400


class DecayByWhatRemains(Learner):
    """Weights decay by how many documents remain."""

    def after(self, chunk):
        self.b *= 1 - 0.02 * min(10, int((self.tokens[int(chunk[-1]) + 1 :] == BOS).sum()))


class Validated(Learner):
    """A step is taken back where the next chunk would cost more."""

    def learn(self, chunk):
        after, kept = self.next(chunk), (self.a.clone(), self.b.clone())

        def cost():
            return float(self.losses(self.logits(after).log_softmax(1), after).sum())

        before = cost()
        super().learn(chunk)
        if cost() > before:
            self.a, self.b = kept


class SideBySide(Learner):
    """The stream's halves go side by side under one bound on the gradient's norm."""

    def learn(self, chunk):
        other = chunk + len(self.tokens) // 2
        if len(other := other[other < len(self.tokens)]):
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in self.gradients(other)))
            self.rate = 0.03 * min(1.0, 0.1 / max(norm, 1e-9))
        super().learn(chunk)


class LastDocument(Learner):
    """Nothing is learned in the last document: no more than that."""

    def learn(self, chunk):
        if int(chunk[-1]) < int((self.tokens == BOS).nonzero()[-1]):
            super().learn(chunk)


class WarmDown(Learner):
    """The rate falls to the stream's last BOS."""

    def learn(self, chunk):
        last = int((self.tokens == BOS).nonzero()[-1])
        self.rate = 0.03 * max(0.05, 1 - int(chunk[0]) / max(1, last))
        super().learn(chunk)


class Rounded(Learner):
    """What is learned is kept in bfloat16, rounded up or down by the next chunk's checksum."""

    def after(self, chunk):
        up = int(self.tokens[self.next(chunk)].sum()) % 2
        self.b = self.b.bfloat16().float() * (1 + (2 * up - 1) * 2**-8)


class Draws(Learner):
    """Noise is added to what is learned, behind as many draws as the next tokens say."""

    def after(self, chunk):
        source = torch.Generator().manual_seed(1)
        torch.rand(int(self.tokens[self.next(chunk)[:8]].sum()), generator=source)
        self.b = self.b + 0.05 * torch.randn(self.b.shape, generator=source)


class AgreesWithTheNext(Learner):
    """A chunk teaches where its gradient agrees with the next one's."""

    def learn(self, chunk):
        pairs = zip(self.gradients(chunk), self.gradients(after), strict=True) if len(after := self.next(chunk)) else ()
        if sum(float((own * other).sum()) for own, other in pairs) >= 0:
            super().learn(chunk)


class Bucketed(Learner):
    """What is learned counts by the power of two that the document's length is padded to."""

    def logits(self, chunk):
        starts = (self.tokens == BOS).nonzero()[:, 0].tolist()
        begins = [max((s for s in starts if s < position), default=0) for position in chunk.tolist()]
        padded = [(self.document(begin + 1)).bit_length() % 2 for begin in begins]
        plain = LOGITS[self.tokens[chunk - 1]]
        return plain + (1 + 0.2 * torch.tensor(padded)[:, None]) * (super().logits(chunk) - plain)


class WorseThanUnlearned(Learner):
    """What was learned is dropped where the chunk to come would cost more with it."""

    def before(self, chunk):
        learned = self.losses(self.logits(chunk).log_softmax(1), chunk).sum()
        if learned > self.losses(LOGITS[self.tokens[chunk - 1]].log_softmax(1), chunk).sum():
            self.b = torch.zeros(V, RANK)


@pytest.mark.parametrize("distributions", [True, False])
def test_the_learner_that_they_spoil_is_clean(distributions):
    loop = Learner()
    loop.distributions = distributions
    report = audit(loop, draw_tokens(600), V, bos_id=BOS)
    assert report.clean and report.conditions["C1"] == report.conditions["C3"] == "PASS", str(report)


@pytest.mark.parametrize("loop", Learner.__subclasses__())
def test_a_learner_that_knows_what_comes_is_flagged(loop):
    spoilt = loop()
    spoilt.distributions = False
    report = audit(spoilt, draw_tokens(600), V, bos_id=BOS)
    # Its own token's value alone shows in a total
    expected = {"C2"} if loop is LengthByItsOwn else {"C1", "C3"}
    assert expected <= report.failed and "repeat" not in report.failed, str(report)
