"""Loops on which the rules do not agree with what was merged: to report them is right, to pass them is no mistake.

C1 excludes every statistic of later tokens, and how many there are is one. But the contest's stream is public and has
one length, merged loops cool their learning rate along it (#549, #1413), and merged loops take documents longest first
(#1530 and later) although the set may not be reordered (#402). The length of a document ahead is another matter: it
tells what one token, the BOS, will be, and the patterns that use it are among those that must be found.
"""

import math

import torch

from slotfast.windows import Plan

from .passes import chunks, sgd
from .toy import SEQ, STRIDE, Toy, charge, charge_all, collate, documents, nll, pattern


@pattern("learning rate over the stream's length", 22, "C1")
def cooling(seed, leak):
    """Score-first training whose rate falls to 0 where the stream ends; honest, at a constant."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head = toy.hidden(tokens[:-1]), toy.head
        total = len(tokens) - 1 if leak else 4096
        for place in chunks(tokens):
            rows = torch.log_softmax(hidden[place] @ head, -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
            rate = 0.002 * (1 + math.cos(math.pi * int(place[0]) / total))
            head = sgd(head, hidden[place], tokens[place + 1], rate)
            log.update(place + 1)

    return score


@pattern("last window set back", 24, "C1")
def last_window_set_back(seed, leak):
    """The last window starts early enough to be full, so its predictions have more context than their place gives."""
    toy = Toy(seed)

    def score(tokens, log):
        plan = Plan(len(tokens) - 1, SEQ, STRIDE)
        for index in range(len(plan)):
            batch = collate(tokens, [plan[index]])
            missing = SEQ - plan[index].scored_end
            if leak and 0 < missing and index:
                rows = torch.log_softmax(toy.logits(tokens[-1 - SEQ : -1]), -1)[missing - STRIDE :]
                place = torch.arange(len(tokens) - len(rows), len(tokens))
                log.score(place, nll(rows, tokens[place]), logprobs=rows)
            else:
                charge(log, batch, torch.log_softmax(toy.logits(batch.inputs), -1))

    return score


@pattern("documents in another order, fixed model", 22, "C4")
def other_order_fixed_model(seed, leak):
    """Documents are scored longest first by a model that learns nothing: no score differs, only the order does."""
    toy = Toy(seed)

    def score(tokens, log):
        if not leak:
            charge_all(log, tokens, torch.log_softmax(toy.logits(tokens[:-1]), -1))
            return
        rows = torch.log_softmax(toy.logits(tokens[:-1]), -1)
        for start, stop in sorted(documents(tokens), key=lambda span: span[0] - span[1]):
            place = torch.arange(start, min(stop, len(rows)))
            log.score(place + 1, nll(rows[place], tokens[place + 1]), logprobs=rows[place])

    return score
