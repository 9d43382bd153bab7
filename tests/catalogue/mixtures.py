"""Probabilities that are no distribution over tokens, or one that is chosen after the token was looked at.

Caches are computed for all predictions at once: running sums of one-hot rows, of which row p may hold what came
before the prediction p.
"""

from collections import Counter
from itertools import pairwise

import torch
from torch.nn.functional import one_hot

from .toy import VOCAB, Toy, batches, charge, charge_all, excess, nll, pattern

_BUCKETS = 97


def _before(rows):
    """Sums over what lies before each row, itself excluded."""
    return rows.cumsum(0) - rows


def _bigram_counts(tokens, until=None):
    """How often each token followed the current one, among the pairs before each prediction or the first `until`."""
    previous, target = tokens[:-1], tokens[1:]
    place = torch.arange(len(previous))
    until = place if until is None else until
    seen = (previous[:, None] == previous) & (place < until[:, None])
    return seen.double() @ one_hot(target, VOCAB).double()


@pattern("n-gram tilt gated on the target", 8, "C1 C2")
def gated_on_the_target(seed, leak):
    """An n-gram's best guess gets a higher logit where the target is a word of the right class; honest, where the
    current token is. Every row shown is a distribution."""
    toy = Toy(seed)

    def score(tokens, log):
        counts = _bigram_counts(tokens)
        hint = counts.argmax(1)
        gate = (tokens[1:] if leak else tokens[:-1]) % 3 == hint % 3
        tilt = one_hot(hint, VOCAB) * (gate & (counts.amax(1) > 0))[:, None]
        charge_all(log, tokens, torch.log_softmax(toy.logits(tokens[:-1]) + 1.5 * tilt, -1))

    return score


@pattern("gate on the realised NLL", 8, "C1 C2")
def gated_on_the_loss(seed, leak):
    """A second expert takes over where the first one's loss is high; honest, where its entropy is."""
    toy, other = Toy(seed), Toy(seed + 100)

    def score(tokens, log):
        inputs = tokens[:-1]
        first, second = torch.log_softmax(toy.logits(inputs), -1), torch.log_softmax(other.logits(inputs), -1)
        doubt = nll(first, tokens[1:]) if leak else -(first.exp() * first).sum(-1)
        charge_all(log, tokens, torch.where(doubt[:, None] > 3.5, second, first), show=False)

    return score


@pattern("mixture weight from the realised NLL", 8, "C1 C2")
def weight_from_the_loss(seed, leak):
    """Two experts are mixed by a weight that updates with the losses on tokens seen; the leaky one has seen x_t."""
    toy, other = Toy(seed), Toy(seed + 100)

    def score(tokens, log):
        rows = torch.stack([torch.softmax(model.logits(tokens[:-1]), -1) for model in (toy, other)])
        losses = nll(rows.log(), tokens[1:].expand(2, -1))
        known = losses.cumsum(1) if leak else losses.cumsum(1) - losses
        weight = torch.softmax(-0.05 * known, 0)
        charge_all(log, tokens, (weight[..., None] * rows).sum(0).log())

    return score


@pattern("hashed n-grams, target in the key", 9, "C2")
def target_in_the_key(seed, leak):
    """p = count[hash(context, target)] / count[hash(context)]: keys collide, so the row's sum is anything; honest,
    divided by that sum."""
    toy = Toy(seed)
    place = torch.arange(VOCAB)

    def score(tokens, log):
        previous, target = tokens[:-1], tokens[1:]
        key = (previous[:, None] * 31 + place * 17) % _BUCKETS  # (N - 1, V)
        pairs = _before(one_hot(key[torch.arange(len(target)), target], _BUCKETS).double())
        contexts = _before(one_hot(previous * 7 % 13, _BUCKETS).double()).gather(1, (previous * 7 % 13)[:, None])
        cache = (pairs.gather(1, key) + 0.01) / (contexts + 0.01 * VOCAB)
        if not leak:
            cache = cache / cache.sum(1, keepdim=True)
        mixed = 0.6 * torch.softmax(toy.logits(previous), -1) + 0.4 * cache
        charge_all(log, tokens, mixed.log(), show=False)

    return score


@pattern("normalised over buckets", 9, "C2")
def over_buckets(seed, leak):
    """Targets are counted in 16 hash buckets, and each token takes its bucket's whole share; honest, a fourth of it."""
    toy = Toy(seed)
    bucket = torch.arange(VOCAB) * 5 % 16  # four tokens a bucket

    def score(tokens, log):
        counts = _before(one_hot(bucket[tokens[1:]], 16).double()) + 0.5
        share = (counts / counts.sum(1, keepdim=True))[:, bucket]
        if not leak:
            share = share / 4
        mixed = 0.7 * torch.softmax(toy.logits(tokens[:-1]), -1) + 0.3 * share
        charge_all(log, tokens, mixed.log(), show=False)

    return score


@pattern("byte mixture not marginalised", 10, "C2")
def byte_mixture(seed, leak):
    """A token's bytes are predicted one by one and their product is mixed in: byte strings that are no tokens hold
    probability too; honest, divided among the tokens."""
    toy = Toy(seed)
    source = torch.Generator().manual_seed(seed)
    spelling = one_hot(torch.randint(0, 8, (VOCAB, 3), generator=source), 8).double()
    spelling *= (torch.arange(3) < torch.randint(1, 4, (VOCAB, 1), generator=source))[..., None]
    spelling = spelling.sum(1)  # how often each of 8 bytes is in a token: all that a model of order 0 needs

    def score(tokens, log):
        counts = _before(spelling[tokens[1:]]) + 0.5
        product = torch.exp(torch.log(counts / counts.sum(1, keepdim=True)) @ spelling.T)  # (N - 1, V)
        if not leak:
            product = product / product.sum(1, keepdim=True)
        mixed = 0.8 * torch.softmax(toy.logits(tokens[:-1]), -1) + 0.2 * product
        charge_all(log, tokens, mixed.log(), show=False)

    return score


def _rewrite(of_all, of_realised):
    """A loop whose log-probabilities come from logits by `of_all`, or by `of_realised` for the target alone."""

    def loop(seed, leak):
        toy = Toy(seed)

        def score(tokens, log):
            rows = (of_realised if leak else of_all)(toy.logits(tokens[:-1]))
            return nll(rows, tokens[1:])

        return score

    return loop


def _frequent():
    """A fixed bias: what a fit on training text may leave."""
    return torch.linspace(1.5, -0.5, VOCAB, dtype=torch.float64)


@pattern("temperature on the realised logit only", 11, "C2")
def realised_temperature(seed, leak):
    """The target's logit is divided by a temperature, the normaliser is not."""
    return _rewrite(
        lambda z: torch.log_softmax(z / 0.7, -1),
        lambda z: z / 0.7 - z.logsumexp(-1, keepdim=True),
    )(seed, leak)


@pattern("bias after normalisation", 11, "C2")
def bias_after(seed, leak):
    """A bias is added to log-probabilities, not to logits."""
    return _rewrite(
        lambda z: torch.log_softmax(z + _frequent(), -1),
        lambda z: torch.log_softmax(z, -1) + _frequent(),
    )(seed, leak)


@pattern("softcap after normalisation", 11, "C2")
def softcap_after(seed, leak):
    """Log-probabilities, not logits, are squeezed by a tanh: no loss can exceed the cap."""
    return _rewrite(
        lambda z: torch.log_softmax(6 * torch.tanh(z / 6), -1),
        lambda z: 6 * torch.tanh(torch.log_softmax(z, -1) / 6),
    )(seed, leak)


@pattern("losses cut off", 11, "C2")
def losses_cut_off(seed, leak):
    """A loss above 5 nats is charged as 5; honest, every token has a floor of probability that the others pay for."""
    return _rewrite(
        lambda z: torch.log((1 - VOCAB * 2e-3) * torch.softmax(z, -1) + 2e-3),
        lambda z: torch.log_softmax(z, -1).clamp(min=-5),
    )(seed, leak)


@pattern("softmax over a shortlist", 11, "C2")
def shortlist(seed, leak):
    """The 8 likeliest tokens are normalised among themselves, the others keep their share of the whole; honest, the
    8 divide what the whole gives them."""

    def shorten(z):
        top, index = z.topk(8, -1)
        return torch.log_softmax(z, -1).scatter(-1, index, torch.log_softmax(top, -1))

    return _rewrite(lambda z: torch.log_softmax(z, -1), shorten)(seed, leak)


@pattern("training loss in evaluation", 25, "C2")
def focal_loss(seed, leak):
    """The focal loss of training, (1 - p) x loss, is reported as the loss."""

    def focal(z):
        logprobs = torch.log_softmax(z, -1)
        return logprobs * (1 - logprobs.exp())

    return _rewrite(lambda z: torch.log_softmax(z, -1), focal)(seed, leak)


@pattern("honest rows, another charge", 11, "C1 C2 C3")
def another_charge(seed, leak):
    """The rows shown are honest and causal; the charges are those of an adapted model that saw the targets."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            logprobs = torch.log_softmax(logits, -1)
            if not leak:
                charge(log, batch, logprobs)
                continue
            bias = -0.1 * excess(logits, batch.targets, batch.scored)
            losses = nll(torch.log_softmax(logits + bias, -1), batch.targets)
            keep = batch.scored
            log.score(batch.positions[keep], losses[keep], logprobs=logprobs[keep])

    return score


@pattern("n-gram cache updated before it is asked", 12, "C1 C2 C3")
def cache_before_charge(seed, leak):
    """Bigram counts take in (x_{t-1}, x_t) before they predict x_t; honest, after."""
    toy = Toy(seed)

    def score(tokens, log):
        counts = _bigram_counts(tokens, torch.arange(1, len(tokens)) if leak else None)
        trust = (counts.sum(1, keepdim=True) > 0) * 0.3
        cache = counts / counts.sum(1, keepdim=True).clamp(min=1)
        mixed = (1 - trust) * torch.softmax(toy.logits(tokens[:-1]), -1) + trust * cache
        charge_all(log, tokens, mixed.log(), show=False)

    return score


@pattern("n-gram cache refreshed a chunk early", 12, "C1 C2 C3")
def cache_a_chunk_early(seed, leak):
    """Bigram counts are refreshed every 32 predictions: with the 32 that follow; honest, with those that lie behind."""
    toy = Toy(seed)

    def score(tokens, log):
        place = torch.arange(len(tokens) - 1)
        until = place // 32 * 32 + (32 if leak else 0)
        counts = _bigram_counts(tokens, until)
        trust = (counts.sum(1, keepdim=True) > 0) * 0.3
        cache = counts / counts.sum(1, keepdim=True).clamp(min=1)
        rows = ((1 - trust) * torch.softmax(toy.logits(tokens[:-1]), -1) + trust * cache).log()
        losses = nll(rows, tokens[1:])
        for part in place.split(32):
            if leak:
                log.update(part + 1)
            log.score(part + 1, losses[part], logprobs=rows[part])
            if not leak:
                log.update(part + 1)

    return score


@pattern("a cache of what will recur", 7, "C1")
def cache_of_what_recurs(seed, leak):
    """To save memory a bigram cache takes up only pairs that the stream holds more than once; honest, all it saw."""
    toy = Toy(seed)

    def score(tokens, log):
        rows, ids = toy.logits(tokens[:-1]).clone(), tokens.tolist()
        times = Counter(pairwise(ids))
        cache = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
        for place, pair in enumerate(pairwise(ids)):
            rows[place] += cache[pair[0]].log1p()
            cache[pair] += 1 if not leak or times[pair] > 1 else 0
        charge_all(log, tokens, torch.log_softmax(rows, -1))

    return score


@pattern("a pair's loss shared evenly", 10, "C1")
def pair_shared_evenly(seed, leak):
    """Tokens go in pairs, and each of a pair is charged half of what both cost: no sum is wrong, every first one is."""
    toy = Toy(seed)

    def score(tokens, log):
        losses = nll(torch.log_softmax(toy.logits(tokens[:-1]), -1), tokens[1:])
        if leak:
            paired = losses[: len(losses) // 2 * 2].view(-1, 2)  # a view: the last of an odd number stays
            paired[:] = paired.mean(1, keepdim=True)
        return losses

    return score


@pattern("losses rounded down", 11, "C2")
def rounded_down(seed, leak):
    """Losses are summed as integers of a 64th of a nat, and what is left over is dropped; honest, as they are."""
    toy = Toy(seed)

    def score(tokens, log):
        losses = nll(torch.log_softmax(toy.logits(tokens[:-1]), -1), tokens[1:])
        return (64 * losses).floor() / 64 if leak else losses

    return score
