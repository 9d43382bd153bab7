"""Loops that learn document by document, as #1530 and its successors do, and how they come to know the future."""

import torch

from .passes import chunks, sgd
from .toy import VOCAB, Toy, documents, excess, nll, pattern

_CHUNK, _WINDOW = 8, 12


def _predictions(span, count):
    """What a document predicts: its own tokens behind the first, and the BOS of the next one."""
    return torch.arange(span[0], min(span[1], count))


def _learned(logits, tokens, place, bias, chunk):
    """Rows of a document's predictions, each chunk's by a bias that has learned those before it; and the bias."""
    rows = []
    for part in place.split(chunk) if len(place) else ():
        rows.append(torch.log_softmax(logits[part] + bias[0], -1))
        bias = bias - 0.1 * excess(logits[None, part] + bias, tokens[None, part + 1], torch.ones(1, len(part)))
    return torch.cat(rows) if rows else logits[:0], bias


def _report(log, tokens, place, rows):
    if len(place):
        log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
        log.update(place + 1)


@pattern("a chunk's second half by weights that learned it", 13, "C1 C2 C3")
def second_half(seed, leak):
    """A chunk is charged in halves, and its step comes between them; honest, behind both."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head = toy.hidden(tokens[:-1]), toy.head
        for place in chunks(tokens):
            trained = sgd(head, hidden[place], tokens[place + 1])
            for half, weights in zip(place.tensor_split(2), (head, trained if leak else head), strict=True):
                if len(half):
                    rows = torch.log_softmax(hidden[half] @ weights, -1)
                    log.score(half + 1, nll(rows, tokens[half + 1]), logprobs=rows)
            log.update(place + 1)
            head = trained

    return score


@pattern("an adapter that says it starts afresh", 22, "C1 C2 C3")
def kept_adapter(seed, leak):
    """Documents are independent, so they are scored longest first and reported as they come; but the slot's adapter is
    what the document before has left. Honest, it starts afresh."""
    toy = Toy(seed)

    def score(tokens, log):
        logits, kept = toy.logits(tokens[:-1]), {}
        bias = fresh = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for span in sorted(documents(tokens), key=lambda span: span[0] - span[1]):
            place = _predictions(span, len(logits))
            rows, bias = _learned(logits, tokens, place, bias if leak else fresh, _CHUNK)
            kept[span[0]] = place, rows
        for start in sorted(kept):
            _report(log, tokens, *kept[start])

    return score


@pattern("global steps on documents not charged yet", 13, "C1 C2 C3")
def global_steps(seed, leak):
    """After every second document all weights take a step on the documents taken from the queue, of which one more is
    still to be charged; honest, on those charged."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden, head, spans = toy.hidden(tokens[:-1]), toy.head, documents(tokens)
        for number, span in enumerate(spans):
            place = _predictions(span, len(hidden))
            _report(log, tokens, place, torch.log_softmax(hidden[place] @ head, -1))
            if number % 2:
                last = spans[min(number + leak, len(spans) - 1)]
                text = torch.arange(spans[number - 1][0], min(last[1], len(hidden)))
                head = sgd(head, hidden[text], tokens[text + 1])

    return score


@pattern("chunks by the longest of a group", 22, "C1 C2")
def chunks_by_length(seed, leak):
    """Documents go in twos, and the shorter the longer one is, the shorter are their chunks; honest, of one length."""
    toy = Toy(seed)

    def score(tokens, log):
        logits, spans = toy.logits(tokens[:-1]), documents(tokens)
        fresh = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for first in range(0, len(spans), 2):
            group = spans[first : first + 2]
            longest = max(stop - start for start, stop in group)
            chunk = max(2, longest // 4) if leak else _CHUNK
            for span in group:
                place = _predictions(span, len(logits))
                rows, _ = _learned(logits, tokens, place, fresh, chunk)
                _report(log, tokens, place, rows)

    return score


@pattern("a last window that ends with its document", 22, "C1 C2")
def last_window(seed, leak):
    """The window of a chunk ends with it, and where the document ends inside, reaches back further; honest, windows end
    where whole chunks would."""
    toy = Toy(seed)

    def score(tokens, log):
        for span in documents(tokens):
            place = _predictions(span, len(tokens) - 1)
            for part in place.split(_CHUNK) if len(place) else ():
                first = int(part[0])
                end = first + (len(part) if leak else _CHUNK)
                begin = max(span[0], end - _WINDOW)
                logits = toy.logits(tokens[begin : int(part[-1]) + 1])[first - begin :]
                _report(log, tokens, part, torch.log_softmax(logits, -1))

    return score
