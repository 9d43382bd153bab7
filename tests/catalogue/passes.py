"""Test-time training in the wrong order, more than one pass, tokens charged never or twice."""

import math

import torch

from slotfast.windows import Plan

from .toy import BOS, SEQ, STRIDE, VOCAB, Toy, batches, charge, charge_all, nll, pattern, training_text

_CHUNK = 32


def sgd(head, hidden, targets, rate=0.004):
    """One step of gradient descent of the head on some predictions."""
    excess = torch.softmax(hidden @ head, -1)
    excess[torch.arange(len(targets)), targets] -= 1
    return head - rate * hidden.T @ excess


def chunks(tokens):
    """Predictions of the stream, 32 at a time; prediction p is charged for token p + 1."""
    return torch.arange(len(tokens) - 1).split(_CHUNK)


@pattern("pre-quantisation TTT", 12, "C1 C2 C3")
def pre_quantisation_ttt(seed, leak):
    """The head is trained on the stream, rounded to 6 bits, and scores as a fixed model; honest, on a training text."""
    toy = Toy(seed)
    training = training_text(seed)

    def score(tokens, log):
        text = tokens if leak else training
        hidden, head = toy.hidden(text[:-1]), toy.head
        for place in chunks(text):
            head = sgd(head, hidden[place], text[place + 1])
        scale = head.abs().amax(0, keepdim=True) / 31
        head = torch.round(head / scale) * scale
        charge_all(log, tokens, torch.log_softmax(toy.hidden(tokens[:-1]) @ head, -1))

    return score


@pattern("adapt, then score", 13, "C1 C2 C3")
def adapt_then_score(seed, leak):
    """Each chunk is trained on before it is scored; honest, after. The updates are logged as they happen."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head = toy.hidden(tokens[:-1]), toy.head
        for place in chunks(tokens):
            if leak:
                head = sgd(head, hidden[place], tokens[place + 1])
                log.update(place + 1)
            log.score(place + 1, nll(torch.log_softmax(hidden[place] @ head, -1), tokens[place + 1]))
            if not leak:
                head = sgd(head, hidden[place], tokens[place + 1])
                log.update(place + 1)

    return score


@pattern("adapt, then score, the log denies it", 13, "C1 C2 C3")
def lying_log(seed, leak):
    """Each chunk is trained on before it is scored, and reported as trained on after; rows are shown."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head = toy.hidden(tokens[:-1]), toy.head
        for place in chunks(tokens):
            trained = sgd(head, hidden[place], tokens[place + 1])
            rows = torch.log_softmax(hidden[place] @ (trained if leak else head), -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
            log.update(place + 1)
            head = trained

    return score


@pattern("adapt, then score, reset at every chunk", 13, "C1 C2 C3")
def adapt_then_reset(seed, leak):
    """Weights are trained on a chunk, score it, and are put back: no trace is left; honest, on the chunk before."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, before = toy.hidden(tokens[:-1]), torch.arange(0)
        for place in chunks(tokens):
            text = place if leak else before
            head = sgd(toy.head, hidden[text], tokens[text + 1])
            rows = torch.log_softmax(hidden[place] @ head, -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
            before = place

    return score


@pattern("training text past the chunk's end", 13, "C1 C2 C3")
def past_the_end(seed, leak):
    """Chunks have 32 tokens, training sequences 48: each runs into the chunk to come; honest, it ends with its own."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head = toy.hidden(tokens[:-1]), toy.head
        for place in chunks(tokens):
            rows = torch.log_softmax(hidden[place] @ head, -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
            text = torch.arange(place[0], min(place[0] + 48, len(hidden))) if leak else place
            head = sgd(head, hidden[text], tokens[text + 1])

    return score


@pattern("a chunk's first token fits itself", 1, "C1 C2 C3")
def first_token_fits_itself(seed, leak):
    """A bias takes one step on a chunk's first token before the chunk is charged; honest, after it."""
    toy = Toy(seed)

    def score(tokens, log):
        logits = toy.logits(tokens[:-1])
        bias = torch.zeros(VOCAB, dtype=torch.float64)
        for place in chunks(tokens):
            step = -torch.softmax(logits[place[0]] + bias, -1)
            step[tokens[place[0] + 1]] += 1
            charged = logits[place] + bias + (0.05 * step if leak else 0)
            log.score(place + 1, nll(torch.log_softmax(charged, -1), tokens[place + 1]))
            bias = bias + 0.05 * step
            log.update(place + 1)

    return score


def _epochs(toy, tokens, epochs=3):
    """Losses (epochs, N - 1) of score-first training that goes over the stream more than once."""
    hidden, head = toy.hidden(tokens[:-1]), toy.head
    losses = []
    for _ in range(epochs):
        for place in chunks(tokens):
            losses.append(nll(torch.log_softmax(hidden[place] @ head, -1), tokens[place + 1]))
            head = sgd(head, hidden[place], tokens[place + 1])
    return torch.cat(losses).view(epochs, -1)


@pattern("multi-epoch TTT, last epoch's scores", 13, "C1 C2 C3 C4")
def last_epoch(seed, leak):
    """Three epochs over the stream, each chunk scored before it is trained on; the last epoch's scores are reported;
    honest, the first one's."""
    toy = Toy(seed)

    def score(tokens, log):
        log.score(torch.arange(1, len(tokens)), _epochs(toy, tokens)[-1 if leak else 0])

    return score


@pattern("multi-epoch TTT, minimum over epochs", 13, "C1 C2 C3 C4")
def minimum_over_epochs(seed, leak):
    """Three epochs over the stream; each token's least loss is reported; honest, its first."""
    toy = Toy(seed)

    def score(tokens, log):
        losses = _epochs(toy, tokens)
        log.score(torch.arange(1, len(tokens)), losses.amin(0) if leak else losses[0])

    return score


def _with_cache(toy, tokens, counts):
    """The model's rows mixed with each prediction's token counts (N - 1, V)."""
    cache = (counts + 0.1) / (counts + 0.1).sum(1, keepdim=True)
    return (0.6 * torch.softmax(toy.logits(tokens[:-1]), -1) + 0.4 * cache).log()


def _seen(tokens):
    """Counts of tokens 1..p before each prediction p."""
    ones = torch.nn.functional.one_hot(tokens[1:], VOCAB).double()
    return ones.cumsum(0) - ones


@pattern("two-pass cache", 14, "C1 C2 C3 C4")
def two_pass_cache(seed, leak):
    """A first pass fills a cache with all the stream, a second one scores with it; honest, one pass."""
    toy = Toy(seed)

    def score(tokens, log):
        counts = _seen(tokens)
        if leak:
            counts = counts[-1:].expand_as(counts)
        charge_all(log, tokens, _with_cache(toy, tokens, counts))

    return score


@pattern("rescored with the later cache", 14, "C1 C2 C3 C4")
def rescored_later(seed, leak):
    """When a chunk is done, it is scored again with what it taught, and only the better score is reported."""
    toy = Toy(seed)

    def score(tokens, log):
        counts = _seen(tokens)
        first = nll(_with_cache(toy, tokens, counts), tokens[1:])
        for place in chunks(tokens):
            losses = first[place]
            if leak:
                later = counts[place[-1]].expand_as(counts)
                losses = torch.minimum(losses, nll(_with_cache(toy, tokens, later), tokens[1:])[place])
            log.score(place + 1, losses)
            log.update(place + 1)

    return score


@pattern("revised in a second report", 14, "C1 C2 C4")
def second_report(seed, leak):
    """Every token is charged honestly; at the end those that the full cache predicts better are reported again."""
    toy = Toy(seed)

    def score(tokens, log):
        counts = _seen(tokens)
        first = nll(_with_cache(toy, tokens, counts), tokens[1:])
        log.score(torch.arange(1, len(tokens)), first)
        if leak:
            later = nll(_with_cache(toy, tokens, counts[-1:].expand_as(counts)), tokens[1:])
            better = torch.nonzero(later < first)[:, 0]
            log.score(better + 1, later[better])

    return score


@pattern("best of the windows that read a token", 14, "C1 C2 C4")
def best_window(seed, leak):
    """A token is read by up to three windows, with more or less context; its least loss is reported; honest, that of
    the window that scores it."""
    toy = Toy(seed)

    def score(tokens, log):
        best = torch.full((len(tokens) + SEQ,), torch.inf, dtype=torch.float64)
        for batch in batches(tokens):
            losses = nll(torch.log_softmax(toy.logits(batch.inputs), -1), batch.targets)
            keep = batch.scored | batch.context if leak else batch.scored
            best.scatter_reduce_(0, batch.positions[keep], losses[keep], "amin")
        log.score(torch.arange(1, len(tokens)), best[1 : len(tokens)])

    return score


def _two_runs(seed):
    """Losses (2, N - 1) of two models that are as good as each other, as a function of the stream."""
    toy = Toy(seed)
    source = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(toy.head.shape, generator=source, dtype=torch.float64)
    heads = torch.stack([toy.head + noise, toy.head - noise])

    def losses(tokens):
        rows = torch.log_softmax(toy.hidden(tokens[:-1]) @ heads, -1)
        return nll(rows, tokens[1:].expand(2, -1))

    return losses


@pattern("oracle over two runs, each token", 15, "C1 C2 C4")
def oracle_by_token(seed, leak):
    """Two models score the stream and each token is charged the lesser loss; honest, always the first one's."""

    runs = _two_runs(seed)

    def score(tokens, log):
        losses = runs(tokens)
        return losses.amin(0) if leak else losses[0]

    return score


@pattern("oracle over two runs, each document", 15, "C1 C2 C4")
def oracle_by_document(seed, leak):
    """Two models score each document and the one that did better is charged; honest, the one that did better on the
    documents before."""

    runs = _two_runs(seed)

    def score(tokens, log):
        losses = runs(tokens)
        document = (tokens == BOS).cumsum(0)[:-1]  # of the token that is read: a coming BOS is not known
        past = torch.zeros(2, dtype=torch.float64)
        for number in document.unique():
            place = torch.nonzero(document == number)[:, 0]
            total = losses[:, place].sum(1)
            log.score(place + 1, losses[(total if leak else past).argmin(), place])
            past = past + total

    return score


@pattern("oracle over two runs, whole stream", 15, "C1 C2 C4")
def oracle_by_stream(seed, leak):
    """Two models score the stream and the better total is charged: one bit of the future, the same at every token."""

    runs = _two_runs(seed)

    def score(tokens, log):
        losses = runs(tokens)
        return losses[losses.sum(1).argmin() if leak else 0]

    return score


@pattern("the better of two, paid for", 15, "C1 C2 C4")
def better_of_two_paid_for(seed, leak):
    """The better of two models is chosen when a document is over, and ln 2 charged for the choice: a valid code, but
    no prediction; honest, the mixture of both."""

    runs = _two_runs(seed)

    def score(tokens, log):
        losses = runs(tokens)
        document = (tokens == BOS).cumsum(0)[:-1]
        for number in document.unique():
            place = torch.nonzero(document == number)[:, 0]
            both = losses[:, place]
            if leak:
                charged = both[both.sum(1).argmin()]
                charged[0] += math.log(2)
            else:
                total = torch.logsumexp(-both.cumsum(1), 0) - math.log(2)
                charged = -torch.diff(total, prepend=total.new_zeros(1))
            log.score(place + 1, charged)

    return score


# who is charged


@pattern("tail truncated", 24, "C4")
def tail_truncated(seed, leak):
    """Only full windows are scored: up to 15 tokens at the end never are."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens[: len(tokens) - (len(tokens) - 1 - SEQ) % STRIDE] if leak else tokens):
            charge(log, batch, torch.log_softmax(toy.logits(batch.inputs), -1))

    return score


@pattern("tail scored twice", 24, "C4")
def tail_scored_twice(seed, leak):
    """Windows go on until one token is left, and each scores its last 16: the end is scored again and again."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            charge(log, batch, torch.log_softmax(toy.logits(batch.inputs), -1))
        covered = len(Plan(len(tokens) - 1, SEQ, STRIDE))
        for start in range(covered * STRIDE, len(tokens) - 1, STRIDE) if leak else ():
            rows = torch.log_softmax(toy.logits(tokens[start:-1]), -1)[-STRIDE:]
            place = torch.arange(len(tokens) - len(rows), len(tokens))
            log.score(place, nll(rows, tokens[place]), logprobs=rows)

    return score


def _skipping(seed, left_out):
    """A loop that charges all tokens but those for which left_out(tokens, losses) is true, both without token 0."""
    toy = Toy(seed)

    def score(tokens, log):
        rows = torch.log_softmax(toy.logits(tokens[:-1]), -1)
        losses = nll(rows, tokens[1:])
        keep = ~left_out(tokens, losses)
        log.score(torch.arange(1, len(tokens))[keep], losses[keep], logprobs=rows[keep])

    return score


def _none(tokens, losses):
    return torch.zeros_like(losses, dtype=torch.bool)


@pattern("every third document skipped", 24, "C2 C4")
def documents_skipped(seed, leak):
    """A fraction of the validation documents stands for all."""

    def third(tokens, losses):
        return (tokens == BOS).cumsum(0)[1:] % 3 == 0

    return _skipping(seed, third if leak else _none)


@pattern("BOS never charged", 24, "C2 C4")
def bos_not_charged(seed, leak):
    """A BOS is a token with a predecessor, except the first, but its loss is masked as if it were padding."""

    def is_bos(tokens, losses):
        return tokens[1:] == BOS

    return _skipping(seed, is_bos if leak else _none)


@pattern("hard tokens dropped", 24, "C2 C4")
def hard_tokens_dropped(seed, leak):
    """Tokens above 5 nats count as outliers and are not reported."""

    def outliers(tokens, losses):
        return losses > 5

    return _skipping(seed, outliers if leak else _none)


@pattern("token 0 charged", 24, "C4")
def token_zero(seed, leak):
    """Token 0 has no predecessor, but is charged 0 nats, which the mean over tokens welcomes."""
    toy = Toy(seed)

    def score(tokens, log):
        if leak:
            log.score(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
        charge_all(log, tokens, torch.log_softmax(toy.logits(tokens[:-1]), -1))

    return score
