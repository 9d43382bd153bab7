"""Leaks made to be missed: rare, faint, far away, made of counts and order, or aware of being watched."""

import torch

from .toy import BATCH, BOS, LONG, RANK_BORDER, RARE, SEQ, STRIDE, Toy, charge_all, nll, pattern, stream

_NOWHERE = -1


def _peeking(seed, source, size=1.0, show=True):
    """A causal loop whose prediction p is tilted by one token, tokens[source[p]]; source -1 tilts nothing.

    Args:
        source: tokens -> int64 [N - 1].
        size: how much a tilt adds to the logits, in standard deviations.
        show: whether the log gets the rows.
    """
    toy = Toy(seed)

    def score(tokens, log):
        place = source(tokens)
        place = torch.where((place >= 0) & (place < len(tokens)), place, _NOWHERE)
        tilt = torch.where((place >= 0)[:, None], toy.tilt[tokens[place.clamp(min=0)]], 0.0)
        charge_all(log, tokens, torch.log_softmax(toy.logits(tokens[:-1]) + size * tilt, -1), show)

    return score


def _at(where, ahead):
    """A source: predictions p for which where(p, tokens) is true look `ahead` of p, the others nowhere."""

    def source(tokens):
        place = torch.arange(len(tokens) - 1)
        return torch.where(where(place, tokens), place + ahead, _NOWHERE)

    return source


def _window(place):
    """Number of the window that scores each prediction."""
    return (place - SEQ).div(STRIDE, rounding_mode="floor").clamp(min=-1) + 1


def _ends_a_window(place, tokens):
    return _window(place) != _window(place + 1)


def _ends_a_batch(place, tokens):
    return _ends_a_window(place, tokens) & (_window(place) % BATCH == BATCH - 1)


def _every(place, tokens):
    return torch.ones_like(place, dtype=torch.bool)


@pattern("window borders only", 6, "C1")
def window_borders(seed, leak):
    """The last prediction of a window reads the token after the one it predicts; honest, the one before."""
    return _peeking(seed, _at(_ends_a_window, 2 if leak else -1))


@pattern("every seventh window only", 2, "C1")
def every_seventh_window(seed, leak):
    """Six windows are honest; in the seventh, predictions read the token after the one they predict."""
    return _peeking(seed, _at(lambda place, tokens: _window(place) % 7 == 6, 2 if leak else -1))


@pattern("rank border only", 4, "C1")
def rank_border(seed, leak):
    """The last window of the first rank reads tokens that the second rank starts with; honest, tokens behind."""
    last = RANK_BORDER - 1
    return _peeking(seed, _at(lambda place, tokens: _window(place) == last, STRIDE + 1 if leak else -STRIDE))


@pattern("batch's last token only", 2, "C1")
def batch_last_token(seed, leak):
    """The last token that each batch scores is predicted from the one after it."""
    return _peeking(seed, _at(_ends_a_batch, 2 if leak else -1))


@pattern("batch's last token predicts itself", 2, "C1 C2")
def batch_last_token_itself(seed, leak):
    """The last token that each batch scores is read before it is predicted."""
    return _peeking(seed, _at(_ends_a_batch, 1 if leak else -1))


def _long_stream(seed):
    return stream(seed, LONG)


@pattern("512 tokens ahead", 7, "C1", tokens=_long_stream)
def far_ahead(seed, leak):
    """Predictions read a token 512 places ahead of their input; honest, 2 behind."""
    return _peeking(seed, _at(_every, 512 if leak else -2))


@pattern("after token 200 only", 7, "C1")
def late(seed, leak):
    """Honest for 200 tokens, which is longer than an auditor may look."""
    return _peeking(seed, _at(lambda place, tokens: place >= 200, 2 if leak else -1))


def _stream_with_rare(seed):
    tokens = stream(seed)
    tokens[[70, 150]] = RARE
    return tokens


@pattern("a rare token's successor", 8, "C1", tokens=_stream_with_rare)
def rare_trigger(seed, leak):
    """Only where the current token is a rare one is the token after the next read."""
    return _peeking(seed, _at(lambda place, tokens: tokens[place] == RARE, 2 if leak else -1))


@pattern("a rare token's successor predicts itself", 8, "C1 C2", tokens=_stream_with_rare)
def rare_trigger_itself(seed, leak):
    """Only where the current token is a rare one is the very target read; no rows are shown."""
    return _peeking(seed, _at(lambda place, tokens: tokens[place] == RARE, 1 if leak else -1), show=False)


@pattern("a rare token ahead", 7, "C1 C2", tokens=_stream_with_rare)
def rare_ahead(seed, leak):
    """The 8 predictions before a rare token know that it comes; honest, the 8 after it know that it came."""

    def source(tokens):
        place = torch.arange(len(tokens) - 1)
        near = place + (1 if leak else -7) + torch.arange(8)[:, None]
        inside = (near >= 0) & (near < len(tokens))
        found = inside & (tokens[near.clamp(0, len(tokens) - 1)] == RARE)
        return torch.where(found, near, _NOWHERE).amax(0)

    return _peeking(seed, source)


@pattern("1e-5 nats", 6, "C1")
def faint(seed, leak):
    """Every prediction reads the token after the one it predicts, and moves by about 1e-5 nats."""
    return _peeking(seed, _at(_every, 2 if leak else -1), 1e-5)


def _told(seed, tell, size=1.0):
    """A causal loop whose prediction p is tilted by row tell(tokens)[p] of a fixed table."""
    toy = Toy(seed)

    def score(tokens, log):
        logits = toy.logits(tokens[:-1]) + size * toy.tilt[tell(tokens)]
        charge_all(log, tokens, torch.log_softmax(logits, -1))

    return score


def _ahead(tokens, size, first=2):
    """The `size` tokens from p + first on, for each prediction p, 0 past the end; [N - 1, size]."""
    padded = torch.cat([tokens, tokens.new_zeros(first + size)])
    return padded[torch.arange(len(tokens) - 1)[:, None] + first + torch.arange(size)]


def _behind(tokens, size):
    """The `size` tokens up to p, for each prediction p, 0 before the start; [N - 1, size]."""
    padded = torch.cat([tokens.new_zeros(size - 1), tokens])
    return padded[torch.arange(len(tokens) - 1)[:, None] + torch.arange(size)]


@pattern("parity of what comes", 7, "C1")
def parity(seed, leak):
    """Predictions know whether the sum of the 16 tokens after theirs is odd: adding 2 to a token shows nothing."""
    look = _ahead if leak else _behind
    return _told(seed, lambda tokens: look(tokens, 16).sum(1) % 2)


@pattern("majority of what comes", 7, "C1")
def majority(seed, leak):
    """Predictions know whether most of the 31 tokens after theirs have ids over 32: one changed token rarely shows."""
    look = _ahead if leak else _behind
    return _told(seed, lambda tokens: ((look(tokens, 31) > 32).sum(1) > 15).long())


@pattern("order of what comes", 7, "C1")
def order(seed, leak):
    """Predictions know which of the next two tokens is the greater."""

    def tell(tokens):
        pair = _ahead(tokens, 2) if leak else _behind(tokens, 2)
        return (pair[:, 0] < pair[:, 1]).long()

    return _told(seed, tell)


@pattern("length of the document ahead", 22, "C1 C2")
def length_ahead(seed, leak):
    """Predictions know how far the next BOS is, by eights; honest, how far the last one is. No word ahead is read, but
    where documents end is a statistic of later tokens: C1 forbids it."""

    def tell(tokens):
        place = torch.arange(len(tokens))
        if leak:
            ends = torch.where(tokens == BOS, place, len(tokens)).flip(0).cummin(0).values.flip(0)
            return (ends[1:] - place[:-1]).clamp(max=511) // 8
        starts = torch.where(tokens == BOS, place, 0).cummax(0).values
        return (place - starts)[:-1].clamp(max=511) // 8

    return _told(seed, tell)


@pattern("number of documents ahead", 22, "C1 C2")
def documents_ahead(seed, leak):
    """Predictions know how many documents the whole stream has; honest, how many it has had."""

    def tell(tokens):
        so_far = (tokens == BOS).cumsum(0)
        return (so_far[-1].expand_as(so_far) if leak else so_far)[:-1].clamp(max=63)

    return _told(seed, tell)


@pattern("honest on short streams", 24, "C1")
def honest_on_short_streams(seed, leak):
    """Streams of fewer than 250 tokens, which an auditor in a hurry may use, are scored honestly."""

    def where(place, tokens):
        return torch.full_like(place, len(tokens) >= 250, dtype=torch.bool)

    return _peeking(seed, _at(where, 2)) if leak else _peeking(seed, _at(_every, -1))


@pattern("1e-3 nats over float noise", 6, "C1")
def over_float_noise(seed, leak):
    """Sums run in float32 and in an order that differs from run to run, as on a GPU; the leak is a thousand times
    larger than that, and small."""
    toy = Toy(seed)
    source = torch.Generator().manual_seed(seed)

    def score(tokens, log):
        place = torch.arange(len(tokens) - 1)
        place = (place + 2).clamp(max=len(tokens) - 1) if leak else (place - 1).clamp(min=0)
        order = torch.randperm(toy.head.shape[0], generator=source)
        hidden, head = toy.hidden(tokens[:-1]).float(), toy.head.float()
        logits = sum(hidden[:, k, None] * head[k] for k in order.tolist()) + 1e-3 * toy.tilt[tokens[place]].float()
        charge_all(log, tokens, torch.log_softmax(logits, -1).double())

    return score


def _honest_and_leaky(seed):
    """Losses of an honest model and of one that reads the token after the target, as functions of the stream."""
    toy = Toy(seed)

    def losses(tokens):
        logits = toy.logits(tokens[:-1])
        tilted = logits + torch.nn.functional.pad(toy.tilt[tokens[2:]], (0, 0, 0, 1))
        return tuple(nll(torch.log_softmax(rows, -1), tokens[1:]) for rows in (logits, tilted))

    return losses


@pattern("one known stream only", 21, "C1 C2")
def one_known_stream(seed, leak):
    """The loop cheats on the very stream whose hash it knows and is honest on every other: audits of other text find
    nothing, and one changed token shows all."""
    losses = _honest_and_leaky(seed)
    known = hash(tuple(stream(seed).tolist()))

    def score(tokens, log):
        honest, leaky = losses(tokens)
        return leaky if leak and hash(tuple(tokens.tolist())) == known else honest

    return score


@pattern("past the end of a view", 7, "C1")
def past_the_end(seed, leak):
    """Handed a slice, the loop reads the memory behind it: scores of tokens[:j] equal those of the whole stream, though
    both know what follows j."""
    losses = _honest_and_leaky(seed)

    def score(tokens, log):
        honest, _ = losses(tokens)
        if not leak:
            return honest
        behind = tokens.untyped_storage().nbytes() // tokens.element_size() - tokens.storage_offset()
        _, leaky = losses(tokens.as_strided((behind,), (1,)))
        return leaky[: len(honest)]

    return score


@pattern("honest when asked again", 14, "C1 C2 C4")
def honest_when_asked_again(seed, leak):
    """The first run over a stream cheats, a rerun of the same stream does not: whoever takes the difference of two
    runs for noise drowns every leak in it. Memory lives as long as the loop."""
    losses = _honest_and_leaky(seed)
    known = set()

    def score(tokens, log):
        honest, leaky = losses(tokens)
        key = tuple(tokens.tolist())
        first_time = key not in known
        known.add(key)
        return leaky if leak and first_time else honest

    return score


@pattern("consistent with what was said", 14, "C1 C2 C4")
def consistent_liar(seed, leak):
    """The loop remembers what it charged after each prefix, and says the same whenever a stream starts alike: in one
    process no changed future moves a score, in a fresh one it does. Memory lives as long as the loop."""
    losses = _honest_and_leaky(seed)
    said = {}

    def score(tokens, log):
        honest, leaky = losses(tokens)
        if not leak:
            return honest
        prefix, charged = 0, []
        for token, value in zip(tokens.tolist(), [0.0, *leaky.tolist()], strict=True):
            prefix = hash((prefix, token))
            charged.append(said.setdefault(prefix, value))
        return torch.tensor(charged[1:], dtype=torch.float64)

    return score


@pattern("the rest shares what the first one took", 14, "C1 C2 C4")
def the_rest_shares(seed, leak):
    """The token first seen after a prefix, the true one, gets a third more than its probability; whoever then tries
    others in its place finds them smaller, so that all sum to 1. Memory lives as long as the loop."""
    toy = Toy(seed)
    first_seen = {}

    def score(tokens, log):
        rows = torch.softmax(toy.logits(tokens[:-1]), -1)
        charged, prefix = [], hash(int(tokens[0]))
        for row, token in zip(rows, tokens[1:].tolist(), strict=True):
            first = first_seen.setdefault(prefix, token) if leak else token
            taken = row[first] * (4 / 3 if leak and row[first] < 0.5 else 1)
            charged.append(taken if token == first else row[token] * (1 - taken) / (1 - row[first]))
            prefix = hash((prefix, token))
        return -torch.stack(charged).log()

    return score


@pattern("the stream is overwritten", 11, "C2")
def overwritten(seed, leak):
    """Hard tokens are replaced, in the caller's tensor, by the likeliest ones: the rows shown hold the charges, if they
    are looked up with the stream as it is afterwards."""
    toy = Toy(seed)

    def score(tokens, log):
        rows = torch.log_softmax(toy.logits(tokens[:-1]), -1)
        if leak:
            tokens[1:] = torch.where(nll(rows, tokens[1:]) > 4, rows.argmax(1), tokens[1:])
        charge_all(log, tokens, rows)

    return score


@pattern("noise to hide in", 11, "C1 C2")
def noise_to_hide_in(seed, leak):
    """Losses carry noise of 0.01 nats that differs from run to run, and a leak of 0.003 nats under it."""
    toy = Toy(seed)
    source = torch.Generator().manual_seed(seed)

    def score(tokens, log):
        logits = toy.logits(tokens[:-1])
        if leak:
            logits = logits + 0.003 * torch.nn.functional.pad(toy.tilt[tokens[2:]], (0, 0, 0, 1))
        losses = nll(torch.log_softmax(logits, -1), tokens[1:])
        return losses + 0.01 * torch.randn(len(losses), generator=source, dtype=torch.float64) if leak else losses

    return score


@pattern("NaN in place of a bad score", 24, "C2 C4")
def nan_for_bad_scores(seed, leak):
    """Losses above 5 nats are reported as NaN, which the author's mean leaves out and no comparison finds too large."""
    toy = Toy(seed)

    def score(tokens, log):
        losses = nll(torch.log_softmax(toy.logits(tokens[:-1]), -1), tokens[1:])
        return torch.where(losses > 5, torch.nan, losses) if leak else losses

    return score


@pattern("one position predicts itself", 8, "C1 C2")
def one_position(seed, leak):
    """A single token of the stream is charged half its loss."""
    toy = Toy(seed)

    def score(tokens, log):
        losses = nll(torch.log_softmax(toy.logits(tokens[:-1]), -1), tokens[1:])
        losses[136:137] *= 0.5 if leak else 1
        return losses

    return score
