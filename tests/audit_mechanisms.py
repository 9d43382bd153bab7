"""Evaluation loops modelled on published ones, in small: what each does is told in words of our own.

Each is `loop(tokens, log)` on streams of `catalogue.toy`: 64 tokens, documents that start with a BOS, windows of 48
that slide by 16 in batches of 4. Where a mechanism reports no distributions, the published one had none to report.
"""

from collections import Counter, defaultdict

import torch

from .catalogue.toy import BATCH, BOS, SEQ, STRIDE, VOCAB, Toy, batches, documents, excess, fit, nll

_TOY = Toy(0)
_CHUNK = 32


def _charge_windows(log, batch, logprobs):
    """Every window of a batch is an event of its own."""
    losses = nll(logprobs, batch.targets)
    for window, scored in enumerate(batch.scored):
        log.score(batch.positions[window, scored], losses[window, scored])


def _plain(batch):
    return _TOY.logits(batch.inputs)


# windows and training


def sliding(tokens, log):
    """Windows slide until the last one reaches the stream's end; every token is scored by one of them."""
    for batch in batches(tokens):
        _charge_windows(log, batch, _plain(batch).log_softmax(-1))


def sliding_until_one_token_is_left(tokens, log):
    """Windows start at every stride, however few tokens are left; a short one scores its last tokens again."""
    for start in range(0, len(tokens) - 1, STRIDE):
        read = tokens[start : min(start + SEQ, len(tokens) - 1)]
        scored = torch.arange(0 if start == 0 else max(len(read) - STRIDE, 0), len(read))
        losses = nll(_TOY.logits(read).log_softmax(-1)[scored], tokens[start + 1 + scored])
        log.score(start + 1 + scored, losses)


def _train(head, hidden, targets, rate=0.004):
    error = (hidden @ head).softmax(-1)
    error[torch.arange(len(targets)), targets] -= 1
    return head - rate * hidden.T @ error


def _chunked(epochs, first=False, whole=False):
    """Training of the output matrix on chunks: after each is scored; `first`, before; `whole`, on all before any."""

    def loop(tokens, log):
        hidden, head = _TOY.hidden(tokens[:-1]), _TOY.head
        places = torch.arange(len(tokens) - 1).split(_CHUNK)
        for place in places if whole else ():
            head = _train(head, hidden[place], tokens[place + 1])
        for place in places:
            if first:
                head = _train(head, hidden[place], tokens[place + 1])
            log.score(place + 1, nll((hidden[place] @ head).log_softmax(-1), tokens[place + 1]))
            for _ in range(0 if whole or first else epochs):
                head = _train(head, hidden[place], tokens[place + 1])
            log.update(place + 1)

    return loop


score_first_training = _chunked(1)  # #549
score_first_training_of_several_epochs = _chunked(3)  # #1413
training_on_the_stream_before_it_is_scored = _chunked(1, whole=True)  # #1306, before its quantisation
training_before_each_chunk_is_scored = _chunked(1, first=True)  # #548


# adaptation of windows


def slot_on_scored_positions(tokens, log):
    """A bias of each window is fitted to the tokens that the window scores (#1176)."""
    for batch in batches(tokens):
        logits = _plain(batch)
        _charge_windows(log, batch, (logits + fit(logits, batch.targets, batch.scored)).log_softmax(-1))


def slot_on_context(tokens, log):
    """A bias of each window is fitted to what earlier windows have scored."""
    for batch in batches(tokens):
        logits = _plain(batch)
        _charge_windows(log, batch, (logits + fit(logits, batch.targets, batch.context)).log_softmax(-1))


def _shared(focal, warm, phases):
    """One bias for the windows of a batch, fitted to their contexts: the context of one is what another one scores."""

    def loop(tokens, log):
        bias = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for batch in batches(tokens):
            logits = _plain(batch)
            mask = batch.context & (torch.arange(SEQ) >= SEQ - STRIDE - focal)
            bias = bias if warm else torch.zeros_like(bias)
            for steps, rate in phases:
                for _ in range(steps):
                    bias = bias - rate * excess(logits + bias, batch.targets, mask).sum(0, keepdim=True)
            _charge_windows(log, batch, (logits + bias).log_softmax(-1))

    return loop


shared_bias = _shared(SEQ, False, [(4, 0.02)])  # #1306
shared_bias_on_focal_tokens_with_a_warm_start = _shared(STRIDE, True, [(4, 0.02)])  # #1350
shared_bias_in_two_phases = _shared(STRIDE, True, [(2, 0.02), (3, 0.01)])  # #1372


# caches and mixtures


def _cached(buckets):
    """A table of n-gram counts whose cells are hashed, the target with its context; a second one counts contexts."""

    def loop(tokens, log):
        own = nll(_TOY.logits(tokens[:-1]).log_softmax(-1), tokens[1:])
        ids, both, contexts = tokens.tolist(), Counter(), Counter()

        def cells(position):
            before = ids[position - 1]
            return (before * 7919 + ids[position] * 104729) % buckets, (before * 7919) % buckets

        for place in torch.arange(1, len(ids)).split(_CHUNK):
            losses = []
            for position in place.tolist():
                cell, context = cells(position)
                chance = float((-own[position - 1]).exp())
                if contexts[context] >= 2:
                    chance = 0.6 * chance + 0.4 * min(1.0, both[cell] / contexts[context])
                losses.append(-torch.tensor(chance, dtype=torch.float64).log())
            log.score(place, torch.stack(losses))
            for position in place.tolist():
                cell, context = cells(position)
                both[cell] += 1
                contexts[context] += 1
            log.update(place)

    return loop


hashed_ngrams_in_a_small_table = _cached(48)
hashed_ngrams_in_a_large_table = _cached(1 << 22)


def _hint_and_rows(tokens):
    """For each prediction the token that has followed its predecessor most often so far, or -1; plain rows."""
    followers, hints = defaultdict(Counter), []
    ids = tokens.tolist()
    for position in range(1, len(ids)):
        seen = followers[ids[position - 1]]
        hints.append(seen.most_common(1)[0][0] if seen else -1)
        seen[ids[position]] += 1
    return torch.tensor(hints), _TOY.logits(tokens[:-1]).log_softmax(-1)


def tilt_by_the_past(tokens, log):
    """The hinted token's logit is raised, whatever comes, and the distribution normalised again (#1437, #1514)."""
    hints, rows = _hint_and_rows(tokens)
    known = (hints >= 0).nonzero()[:, 0]
    rows[known, hints[known]] += 1.5
    log.score(torch.arange(1, len(tokens)), nll(rows.log_softmax(-1), tokens[1:]))


def tilt_gated_by_the_target(tokens, log):
    """The tilted charge is taken only where the hint is right (#1420)."""
    hints, rows = _hint_and_rows(tokens)
    tilted, known = rows.clone(), (hints >= 0).nonzero()[:, 0]
    tilted[known, hints[known]] += 1.5
    losses, better = nll(rows, tokens[1:]), nll(tilted.log_softmax(-1), tokens[1:])
    log.score(torch.arange(1, len(tokens)), torch.where(hints == tokens[1:], better, losses))


def _hindsight(begin):
    """From a position on, the lesser of the losses of a model and of a mixture with the counts of what came before."""

    def loop(tokens, log):
        one = torch.nn.functional.one_hot(tokens[1:], VOCAB).double()
        counts = one.cumsum(0) - one + 0.1
        rows = _TOY.logits(tokens[:-1]).softmax(-1)
        mixed = 0.5 * rows + 0.5 * counts / counts.sum(1, keepdim=True)
        model, mixture = (nll(part.log(), tokens[1:]) for part in (rows, mixed))
        position = torch.arange(1, len(tokens))
        log.score(position, torch.where(position >= begin, torch.minimum(model, mixture), model))

    return loop


hindsight_minimum = _hindsight(1)  # #573
LATE = 170
hindsight_minimum_late_in_the_stream = _hindsight(LATE)


def mixture(tokens, log):
    """The honest form of the hindsight minimum: the mixture is charged, whichever did better."""
    one = torch.nn.functional.one_hot(tokens[1:], VOCAB).double()
    counts = one.cumsum(0) - one + 0.1
    mixed = 0.5 * _TOY.logits(tokens[:-1]).softmax(-1) + 0.5 * counts / counts.sum(1, keepdim=True)
    log.score(torch.arange(1, len(tokens)), nll(mixed.log(), tokens[1:]))


def two_passes(tokens, log):
    """A first pass counts, a second one scores with all the counts and reports when it is done (#846, #916)."""
    counts = torch.bincount(tokens[1:], minlength=VOCAB).double() + 0.1
    mixed = 0.6 * _TOY.logits(tokens[:-1]).softmax(-1) + 0.4 * counts / counts.sum()
    log.score(torch.arange(1, len(tokens)), nll(mixed.log(), tokens[1:]))


# tokens are strings of one to three of four bytes, all different
_SPELT = [s for n in (1, 2, 3) for s in torch.cartesian_prod(*[torch.arange(4)] * n).reshape(-1, n).tolist()][:VOCAB]


def byte_mixture(tokens, log):
    """A token's probability is mixed with the product of its bytes', which another token's bytes may begin with."""
    own, seen, losses = _TOY.logits(tokens[:-1]).softmax(-1), torch.ones(4, dtype=torch.float64), []
    for row, token in zip(own, tokens[1:].tolist(), strict=True):
        spelt = torch.tensor(_SPELT[token])
        losses.append(-(0.5 * row[token] + 0.5 * (seen / seen.sum())[spelt].prod()).log())
        seen.index_put_((spelt,), torch.ones(len(spelt), dtype=torch.float64), accumulate=True)
    log.score(torch.arange(1, len(tokens)), torch.stack(losses))


# documents


def _by_document(longest_first, phased):
    """A bias of each document, trained on its chunks once they are scored; `phased`, the head on all of the past."""

    def loop(tokens, log):
        spans = [(a, min(b, len(tokens) - 1)) for a, b in documents(tokens)]  # the next BOS is a document's last target
        spans = [span for span in spans if span[1] > span[0]]
        spans = sorted(spans, key=lambda span: span[0] - span[1]) if longest_first else spans
        head = _TOY.head
        for number, (begin, end) in enumerate(spans):
            hidden = _TOY.hidden(tokens[begin:end])
            bias = torch.zeros(VOCAB, dtype=torch.float64)
            for place in torch.arange(end - begin).split(16):
                logits, targets = hidden[place] @ head + bias, tokens[begin + 1 + place]
                log.score(begin + 1 + place, nll(logits.log_softmax(-1), targets))
                error = logits.softmax(-1)
                error[torch.arange(len(place)), targets] -= 1
                bias = bias - 0.05 * error.sum(0)
                log.update(begin + 1 + place)
            if phased and number % 2:
                head = _train(head, hidden, tokens[begin + 1 : end + 1])

    return loop


adapter_of_each_document = _by_document(False, False)
longest_documents_first = _by_document(True, False)  # #1530
longest_documents_first_and_global_training = _by_document(True, True)  # #1855
documents_in_order_and_global_training = _by_document(False, True)


# what earlier audits took for leaks, or could not take


def from_bos_to_bos(tokens, log):
    """Documents are found by their BOS; what might come before the first one would never be scored."""
    starts = (tokens == BOS).nonzero()[:, 0].tolist()
    for begin, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True):
        if end > begin:
            place = torch.arange(begin + 1, end + 1)
            log.score(place, nll(_TOY.logits(tokens[begin:end]).log_softmax(-1), tokens[place]))


def needs_two_windows(tokens, log):
    """Fails on fewer than 96 tokens, as loops do that divide by their number of batches."""
    batches_ = len(tokens) // (2 * SEQ)
    place = torch.arange(1, len(tokens)).split(1 + len(tokens) // (batches_ * BATCH))
    losses = nll(_TOY.logits(tokens[:-1]).log_softmax(-1), tokens[1:])
    for part in place:
        log.score(part, losses[part - 1])
    return 1 / batches_
