"""Loops for the auditor's tests: honest ones, and ones that leak in one way each."""

import math

import numpy as np
import torch

from slotfast.audit import audit
from slotfast.audit.streams import synthetic

V, BOS, EVENT = 24, 0, 16
BYTES = torch.arange(V) % 5


def draw_tokens(n=240, seed=0):
    return synthetic(n, V, BOS, np.random.default_rng(seed))


class Bigram:
    """Scores events of 16 tokens with smoothed bigram counts of the events before; a subclass spoils one step."""

    distributions, event = True, EVENT

    def __call__(self, tokens, log):
        self.tokens, self.counts = tokens, self.start(tokens)
        for begin in range(1, len(tokens), self.event):
            positions = torch.arange(begin, min(begin + self.event, len(tokens)))
            rows = self.rows(positions)
            nll = self.charge(rows, positions)
            self.report(log, positions, nll, rows if self.distributions else None)
            self.learn(self.counts, positions)
            log.update(positions)
        return self.end(log)

    def start(self, tokens):
        return torch.full((V, V), 0.3)

    def rows(self, positions):
        counts = self.counts[self.tokens[positions - 1]]
        return (counts / counts.sum(1, keepdim=True)).log()

    def charge(self, rows, positions):
        return -rows.gather(1, self.tokens[positions][:, None])[:, 0]

    def report(self, log, positions, nll, rows):
        log.score(positions, nll, bytes=BYTES[self.tokens[positions]], logprobs=rows)

    def learn(self, counts, positions):
        counts.index_put_((self.tokens[positions - 1], self.tokens[positions]), torch.ones(len(positions)), True)

    def end(self, log):
        return None

    def tilted(self, rows, index, tokens, by=1.0):
        """Rows with the logits of some tokens raised; still distributions."""
        rows = rows.clone()
        rows[index, tokens] += by
        return rows.log_softmax(1)


class Silent(Bigram):
    distributions = False


class SharedBatch(Silent):
    """The state of an event is shared by its windows, and holds what they are about to score."""

    def rows(self, positions):
        counts = self.counts
        self.counts = counts.clone()
        self.learn(self.counts, positions)
        rows, self.counts = super().rows(positions), counts
        return rows


class NextToken(Silent):
    """Each distribution has seen the token after its own."""

    def chosen(self, positions):
        return positions + 1 < len(self.tokens)

    def rows(self, positions):
        rows = super().rows(positions)
        index = self.chosen(positions).nonzero()[:, 0]
        return self.tilted(rows, index, self.tokens[positions[index] + 1])


class NextEvent(NextToken):
    """Only the last token of an event sees the first of the next."""

    def chosen(self, positions):
        return (positions % EVENT == 0) & (positions + 1 < len(self.tokens))


class NextDocument(NextToken):
    """Only the last token of a document sees that the next one starts."""

    def chosen(self, positions):
        after = (positions + 1).clamp(max=len(self.tokens) - 1)
        return (self.tokens[after] == BOS) & (positions + 1 < len(self.tokens))


class NextRank(NextToken):
    """Only where the second of two ranks begins."""

    def chosen(self, positions):
        return positions == len(self.tokens) // 2 - 1


class OneEvent(NextToken):
    """Only within a single event."""

    def chosen(self, positions):
        return (positions // EVENT == 5) & (positions % EVENT > 0)


class Pooled(NextToken):
    """Blocks of four tokens see their last one."""

    def rows(self, positions):
        rows = Bigram.rows(self, positions)
        last = (positions // 4 * 4 + 3).clamp(max=len(self.tokens) - 1)
        index = (last > positions).nonzero()[:, 0]
        return self.tilted(rows, index, self.tokens[last[index]])


class WholeStream(Silent):
    """Counts start from the statistics of the stream."""

    def start(self, tokens):
        return super().start(tokens) + 0.2 * torch.bincount(tokens, minlength=V)


class LastToken(Silent):
    """Everything knows how the stream ends."""

    def start(self, tokens):
        counts = super().start(tokens)
        counts[:, tokens[-1]] += 0.5
        return counts


class NextDocumentLength(Silent):
    """A document's first token knows how long it is."""

    def rows(self, positions):
        rows, begins = super().rows(positions), self.tokens[positions - 1] == BOS
        for i in begins.nonzero()[:, 0].tolist():
            after = (self.tokens[positions[i] :] == BOS).nonzero()
            length = int(after[0]) if len(after) else 99
            rows[i] = (rows[i] * (1 + length / 100)).log_softmax(0)
        return rows


class Denominator(Silent):
    """Counts are divided by a number of distinct tokens that includes those being scored."""

    def rows(self, positions):
        kinds = len(self.tokens[positions].unique())
        return (super().rows(positions) * (1 + 1 / kinds)).log_softmax(1)


class OwnToken(Bigram):
    """The distribution is tilted towards the token that comes, and still sums to 1."""

    def rows(self, positions):
        return self.tilted(super().rows(positions), torch.arange(len(positions)), self.tokens[positions])


class SilentOwnToken(OwnToken):
    distributions = False


class Bucket(Silent):
    """A cache keyed by context and target adds what it finds, unnormalised."""

    def charge(self, rows, positions):
        mine = super().charge(rows, positions)
        key = self.counts[self.tokens[positions - 1], self.tokens[positions]]
        return torch.where(key > 1, (mine.exp().reciprocal() * 0.5 + 0.5).log().neg(), mine)


class RealisedTemperature(Silent):
    """Only the logit of the token that came is rescaled."""

    def charge(self, rows, positions):
        own = rows.gather(1, self.tokens[positions][:, None])[:, 0]
        return -(own * 0.8 - torch.log(1 - own.exp() + (own * 0.8).exp()))


class Focal(Silent):
    """A training loss in place of the charge."""

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        return (1 - (-nll).exp()) ** 2 * nll


class OtherCharge(Bigram):
    """Honest distributions beside another charge."""

    def charge(self, rows, positions):
        return 0.98 * super().charge(rows, positions)


class Unnormalised(Bigram):
    """A bonus added after normalisation."""

    def rows(self, positions):
        rows = super().rows(positions)
        rows[:, 3] += 0.2
        return rows


class Narrow(Bigram):
    """A distribution over part of the vocabulary."""

    def report(self, log, positions, nll, rows):
        log.score(positions, nll, logprobs=rows[:, :-1])


class OracleMin(Silent):
    """The better of two predictors, chosen when the token is known."""

    def charge(self, rows, positions):
        return super().charge(rows, positions).clamp(max=math.log(V))


class BestOfEvent(Silent):
    """The better of two temperatures for an event, chosen by its score."""

    def charge(self, rows, positions):
        both = [super(BestOfEvent, self).charge((rows * t).log_softmax(1), positions) for t in (0.7, 1.3)]
        return min(both, key=lambda nll: float(nll.sum()))


class UpdateFirst(Bigram):
    """An update is reported before its tokens are charged."""

    def report(self, log, positions, nll, rows):
        log.update(positions[:1])
        super().report(log, positions, nll, rows)


class Rescored(Bigram):
    """The stream is charged a second time with what was learnt."""

    def end(self, log):
        positions = torch.arange(1, len(self.tokens))
        log.score(positions, self.charge(self.rows(positions), positions))


class Backwards(Bigram):
    """The second half is scored first."""

    def report(self, log, positions, nll, rows):
        self.held = [*getattr(self, "held", []), (positions, nll, rows)]

    def end(self, log):
        half = len(self.held) // 2
        for positions, nll, rows in self.held[half:] + self.held[:half]:
            super().report(log, positions, nll, rows)
        self.held = []


class CutTail(Bigram):
    """The last, incomplete event is left out."""

    def report(self, log, positions, nll, rows):
        if len(positions) == self.event:
            super().report(log, positions, nll, rows)


class DocumentBegins(Silent):
    """The two tokens behind a BOS are charged too little, whatever they are."""

    def charge(self, rows, positions):
        near = (self.tokens[positions - 1] == BOS) | (self.tokens[(positions - 2).clamp(min=0)] == BOS)
        return super().charge(rows, positions) * torch.where(near, 0.7, 1.0)


class EventBegins(Silent):
    """The first token of an event is charged too little."""

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        nll[0] *= 0.9
        return nll


class HalfPrecision(Bigram):
    """Charges are a hundredth too small, which distributions in half precision do not show."""

    def report(self, log, positions, nll, rows):
        log.score(positions, 0.99 * nll, logprobs=rows.bfloat16())


class HiddenRows(Bigram):
    """No distribution comes with every eighth token, and those are charged too little."""

    def report(self, log, positions, nll, rows):
        chosen = positions % 8 == 3
        log.score(positions, torch.where(chosen, 0.95, 1.0) * nll, logprobs=rows.masked_fill(chosen[:, None], math.nan))


class NotANumber(Silent):
    """The worst charges are left out of a mean that skips what is no number."""

    no_number = math.nan

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        return torch.where(nll > 4, self.no_number, nll)


class Infinite(NotANumber):
    no_number = -math.inf


class SpaceTwice(Bigram):
    """A byte too many for some tokens."""

    def report(self, log, positions, nll, rows):
        tokens = self.tokens[positions]
        log.score(positions, nll, bytes=BYTES[tokens] + (tokens % 7 == 3), logprobs=rows)


class Remembers(Bigram):
    """State is kept between calls."""

    kept = None

    def start(self, tokens):
        self.kept = super().start(tokens) if self.kept is None else self.kept
        return self.kept


def bytes_by_rule(tokens):
    return BYTES[tokens]


def run_audit(loop, seed=0, n=240, **options):
    """An audit whose work is counted in reruns: what time allows would differ with the machine's load."""
    options = {"byte_counts": bytes_by_rule, "bos_id": BOS, "seeds": [seed], "reruns": 64} | options
    return audit(loop, draw_tokens(n, seed), V, **options)


class Ranks(Silent):
    """Two ranks, each with counts of its own from its first token on: where the second begins follows the length."""

    def rows(self, positions):
        half = len(self.tokens) // 2 // EVENT * EVENT + 1
        if positions[0] == half:
            self.counts = self.start(self.tokens)
        return super().rows(positions)


class Documents(Silent):
    """Counts that every document starts anew."""

    def rows(self, positions):
        begin = (self.tokens[: int(positions[0])] == BOS).nonzero()
        self.counts = self.start(self.tokens)
        if len(begin):
            self.learn(self.counts, torch.arange(int(begin[-1]) + 1, int(positions[0])))
        return super().rows(positions)


class Noisy(Bigram):
    """Reruns differ by a millionth of a nat."""

    size, calls = 1e-6, 0

    def charge(self, rows, positions):
        self.calls += 1
        noise = np.random.default_rng(self.calls).standard_normal(len(positions))
        return super().charge(rows, positions) + self.size * torch.from_numpy(noise)


class NoisyLeak(Noisy):
    """A leak of a ten-thousandth of a nat, from the token after the next."""

    def charge(self, rows, positions):
        after = (positions + 2).clamp(max=len(self.tokens) - 1)
        return super().charge(rows, positions) + 1e-4 * (self.tokens[after] % 3)


class Partial(SilentOwnToken):
    """Honest distributions, for every other event."""

    def report(self, log, positions, nll, rows):
        honest = positions[0] // EVENT % 2 == 0
        rows = Bigram.rows(self, positions) if honest else None
        super().report(log, positions, Bigram.charge(self, rows, positions) if honest else nll, rows)


class TooNoisy(Noisy):
    size = 0.01


class NoisyRows(OwnToken):
    """A token that never comes has a probability of chance, which makes all distributions look unsteady."""

    calls = 0

    def rows(self, positions):
        self.calls += 1
        rows = Bigram.rows(self, positions)
        rows[:, -1] = -40 - self.calls % 7
        return self.tilted(rows, torch.arange(len(positions)), self.tokens[positions], by=0.05)


class Seldom(NextToken):
    """A race: one run in ten looks ahead, all others are honest, and none repeats to the last digit."""

    calls = 0

    def start(self, tokens):
        self.calls += 1
        return super().start(tokens) + 1e-7 * (self.calls % 3)

    def chosen(self, positions):
        return super().chosen(positions) & (self.calls % 10 == 7)


class LateInADocument(NextToken):
    """Only behind 150 tokens of one document."""

    def chosen(self, positions):
        begins = (self.tokens == BOS).cumsum(0)
        return super().chosen(positions) & (positions > 150) & (begins[positions] == begins[positions - 150])


class TakesBack(Bigram):
    """What is changed after it was reported changes nothing; events may be empty, and tokens spoilt."""

    def report(self, log, positions, nll, rows):
        super().report(log, positions, nll, rows)
        log.score([], [])
        nll.zero_()
        rows.zero_()

    def end(self, log):
        self.tokens.zero_()


def losses_only(tokens, log):
    nll = torch.full((len(tokens),), math.log(V))
    return nll if len(tokens) % 2 else nll[1:]


def token_by_token(tokens, log):
    seen = torch.ones(V)
    for t in range(1, len(tokens)):
        seen[tokens[t - 1]] += 1
        log.score([t], -(seen[tokens[t]] / seen.sum()).log(), logprobs=(seen / seen.sum()).log()[None])


class NoProbability(Bigram):
    """Tokens that the stream does not have are impossible."""

    impossible = torch.arange(V) >= 20

    def rows(self, positions):
        return super().rows(positions).masked_fill(self.impossible, -math.inf).log_softmax(1)


class Half(Silent):
    """Losses in half precision."""

    def charge(self, rows, positions):
        return super().charge(rows, positions).half()


class HalfRows(Bigram):
    """Distributions in half precision."""

    def report(self, log, positions, nll, rows):
        super().report(log, positions, nll, rows.bfloat16())
