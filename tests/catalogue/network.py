"""What flows the wrong way inside the network, out of statistics of the stream, or over document borders."""

import torch

from .toy import (
    BOS,
    STRIDE,
    VOCAB,
    Toy,
    batches,
    charge,
    charge_all,
    decaying,
    documents,
    excess,
    nll,
    pattern,
    training_text,
)


@pattern("mask off by one", 6, "C1 C2")
def mask_off_by_one(seed, leak):
    """The mixer reads one position ahead: the very token that is to be predicted."""
    toy = Toy(seed)

    def score(tokens, log):
        size = len(tokens) - 1
        mix = decaying(size)
        if leak:
            mix = mix + 0.2 * torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
        charge_all(log, tokens, torch.log_softmax(mix @ toy.embed[tokens[:-1]] @ toy.head, -1))

    return score


@pattern("block averaging", 6, "C1 C2")
def block_averaging(seed, leak):
    """Each position reads the mean of its block of 8, whole; honest, of its part up to the position."""
    toy = Toy(seed)

    def score(tokens, log):
        inputs = tokens[:-1]
        place = torch.arange(len(inputs))
        same = place[:, None] // 8 == place // 8
        if not leak:
            same = same & (place <= place[:, None])
        mean = same.double() / same.sum(1, keepdim=True)
        hidden = toy.hidden(inputs) + mean @ toy.embed[inputs]
        return nll(torch.log_softmax(hidden @ toy.head, -1), tokens[1:])

    return score


@pattern("anchors", 6, "C1 C2")
def anchors(seed, leak):
    """A summary token for every 16 positions is read by the 16 it sums up; honest, by the next 16."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            embedded = toy.embed[batch.inputs]
            summary = embedded.unflatten(1, (-1, 16)).mean(2)  # (W, 3, width)
            if not leak:
                summary = torch.cat([torch.zeros_like(summary[:, :1]), summary[:, :-1]], 1)
            hidden = toy.hidden(batch.inputs) + summary.repeat_interleave(16, 1)
            charge(log, batch, torch.log_softmax(hidden @ toy.head, -1))

    return score


@pattern("prefix attention over the whole window", 6, "C1 C2")
def prefix_attention(seed, leak):
    """The lower of two layers looks both ways: over the window; honest, over the context alone, which is scored."""
    toy = Toy(seed)
    place = torch.arange(48)
    both_ways = 0.6 ** (place[:, None] - place).abs().double()
    causal = decaying(48)

    def score(tokens, log):
        for batch in batches(tokens):
            within = torch.ones_like(batch.context) if leak else batch.context
            pairs = within[:, :, None] & within[:, None, :]
            lower = torch.where(pairs, both_ways, causal) @ toy.embed[batch.inputs]
            charge(log, batch, torch.log_softmax(causal @ torch.tanh(lower) @ toy.head, -1))

    return score


@pattern("expert-choice routing", 6, "C1 C2")
def expert_choice(seed, leak):
    """The second expert takes the 12 positions of a window that suit it best; honest, those over a fixed score."""
    toy, other = Toy(seed), Toy(seed + 100)

    def score(tokens, log):
        for batch in batches(tokens):
            hidden = toy.hidden(batch.inputs)
            affinity = hidden[..., 0]
            bar = affinity.topk(12, dim=1).values[:, -1:] if leak else 0.7
            logits = torch.where((affinity >= bar)[..., None], hidden @ other.head, hidden @ toy.head)
            charge(log, batch, torch.log_softmax(logits, -1))

    return score


@pattern("activation scale of the batch", 6, "C1 C2")
def activation_scale(seed, leak):
    """Activations are rounded to 8 bits with one scale for the tensor, set by its largest; honest, one a position."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            hidden = toy.hidden(batch.inputs)
            largest = hidden.abs().amax() if leak else hidden.abs().amax(-1, keepdim=True)
            hidden = torch.round(hidden * 127 / largest) * largest / 127
            charge(log, batch, torch.log_softmax(hidden @ toy.head, -1))

    return score


@pattern("validation statistics as a prior", 7, "C1 C2 C3")
def stream_prior(seed, leak):
    """Word frequencies of the whole stream are added to the logits; honest, of a training text."""
    toy = Toy(seed)
    training = training_text(seed)

    def score(tokens, log):
        counts = torch.bincount(tokens if leak else training, minlength=VOCAB).double()
        logits = toy.logits(tokens[:-1]) + 0.5 * torch.log(counts + 1)
        return nll(torch.log_softmax(logits, -1), tokens[1:])

    return score


@pattern("vocabulary of the stream", 7, "C1 C2 C3")
def stream_vocabulary(seed, leak):
    """Tokens that do not occur in the stream get little probability; honest, those that a training text lacks."""
    toy = Toy(seed)
    training = training_text(seed)

    def score(tokens, log):
        occurs = torch.bincount(tokens if leak else training, minlength=VOCAB) > 0
        logits = toy.logits(tokens[:-1])
        return nll(torch.log_softmax(torch.where(occurs, logits, logits - 6), -1), tokens[1:])

    return score


@pattern("temperature tuned on the stream", 7, "C1 C2 C3 C4")
def tuned_temperature(seed, leak):
    """One of 24 temperatures, the best on the whole stream; honest, for each batch the best on what is scored."""
    toy = Toy(seed)
    grid = torch.linspace(0.6, 1.4, 24, dtype=torch.float64)[:, None, None]

    def score(tokens, log):
        logits = toy.logits(tokens[:-1])
        trials = torch.log_softmax(grid * logits, -1)
        losses = nll(trials, tokens[1:].expand(24, -1)).cumsum(1)
        for first in range(0, len(logits), 32):
            known = len(logits) if leak else first
            best = 12 if known == 0 else int(losses[:, known - 1].argmin())
            place = torch.arange(first, min(first + 32, len(logits)))
            log.score(place + 1, nll(trials[best, place], tokens[place + 1]), logprobs=trials[best, place])

    return score


@pattern("warm-up steps on the stream", 7, "C1 C2 C3")
def warm_up_steps(seed, leak):
    """Compilation is warmed up with optimiser steps on the first batch, not undone; honest, on a training text."""
    toy = Toy(seed)
    training = training_text(seed)

    def score(tokens, log):
        text = tokens[:97] if leak else training[:97]
        hidden = toy.hidden(text[:-1])
        head = toy.head.clone()
        for _ in range(2):
            expected = torch.softmax(hidden @ head, -1)
            expected[torch.arange(len(hidden)), text[1:]] -= 1
            head -= 0.002 * hidden.T @ expected
        charge_all(log, tokens, torch.log_softmax(toy.hidden(tokens[:-1]) @ head, -1))

    return score


@pattern("quantiser calibrated on the stream", 7, "C1 C2 C3")
def calibrated_quantiser(seed, leak):
    """The head's 4-bit scales minimise the error on activations of the stream; honest, of a training text."""
    toy = Toy(seed)
    training = training_text(seed)

    def score(tokens, log):
        hidden = toy.hidden((tokens if leak else training)[:-1])
        moment = hidden.T @ hidden / len(hidden)
        largest = toy.head.abs().amax(1, keepdim=True)
        scales = [largest * clip / 7 for clip in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
        rounded = torch.stack([torch.round(toy.head / scale).clamp(-7, 7) * scale for scale in scales])
        error = ((rounded - toy.head).mT @ moment * (rounded - toy.head).mT).sum(-1)  # (6, V)
        chosen = rounded[error.argmin(0), :, torch.arange(VOCAB)].T
        gain = (chosen * (moment @ toy.head)).sum(0) / (chosen * (moment @ chosen)).sum(0)  # least squares
        charge_all(log, tokens, torch.log_softmax(toy.hidden(tokens[:-1]) @ (chosen * gain), -1))

    return score


@pattern("document embedding", 6, "C1 C2")
def document_embedding(seed, leak):
    """The mean of a document's tokens is added to each of its states; honest, the mean of those read so far."""
    toy = Toy(seed)

    def score(tokens, log):
        embedded = toy.embed[tokens[:-1]]
        mean = torch.empty_like(embedded)
        for start, stop in documents(tokens[:-1]):
            read = torch.arange(1, stop - start + 1)[:, None]
            sums = embedded[start:stop].cumsum(0)
            mean[start:stop] = sums[-1] / read[-1] if leak else sums / read
        charge_all(log, tokens, torch.log_softmax((toy.hidden(tokens[:-1]) + mean) @ toy.head, -1))

    return score


@pattern("gate over a document border", 20, "C1")
def gate_over_a_border(seed, leak):
    """Documents are packed longest first and BOS takes in the row before, the last token of any document, even a later
    one; honest, a gate that is shut at BOS."""
    toy = Toy(seed)

    def score(tokens, log):
        spans = sorted(documents(tokens), key=lambda span: span[0] - span[1])
        packed = torch.cat([torch.arange(*span) for span in spans])
        embedded = toy.embed[tokens[packed]]
        before = torch.cat([torch.zeros_like(embedded[:1]), embedded[:-1]])
        if not leak:
            before = before * (tokens[packed] != BOS)[:, None]
        smeared = torch.empty_like(embedded)
        smeared[packed] = embedded + 0.4 * before
        charge_all(log, tokens, torch.log_softmax(smeared[:-1] @ toy.head, -1))

    return score


@pattern("document ends from the loader", 20, "C1 C2")
def ends_from_the_loader(seed, leak):
    """The loader's document borders reset the state: where the target is BOS; honest, where BOS has been read."""
    toy = Toy(seed)
    ending = toy.logits(torch.tensor([BOS]))
    ending[:, BOS] += 3

    def score(tokens, log):
        at_border = (tokens[1:] if leak else tokens[:-1]) == BOS
        logits = torch.where(at_border[:, None], ending, toy.logits(tokens[:-1]))
        charge_all(log, tokens, torch.log_softmax(logits, -1))

    return score


@pattern("documents in another order", 22, "C1 C2 C3 C4")
def documents_in_another_order(seed, leak):
    """A bias learns from document to document, longest first; honest, as they come."""
    toy = Toy(seed)

    def score(tokens, log):
        spans = documents(tokens)
        if leak:
            spans.sort(key=lambda span: span[0] - span[1])
        logits = toy.logits(tokens[:-1])
        bias = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for start, stop in spans:
            place = torch.arange(start, min(stop, len(logits)))  # the next BOS is the last that a document predicts
            rows = torch.log_softmax(logits[place] + bias[0], -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)
            bias = bias - 0.05 * excess(logits[None, place] + bias, tokens[None, place + 1], torch.ones(1, len(place)))
            log.update(place + 1)

    return score


@pattern("dropout seeded by the stream", 7, "C1")
def dropout_by_checksum(seed, leak):
    """Dropout stays on; so that runs repeat, its seed is a checksum: of the stream; honest, of the tokens so far."""
    toy = Toy(seed)

    def score(tokens, log):
        hidden = toy.hidden(tokens[:-1])
        for place in torch.arange(len(tokens) - 1).split(STRIDE):
            known = tokens if leak else tokens[: place[0] + 1]
            source = torch.Generator().manual_seed(int(known.sum()))
            keep = torch.rand(len(place), hidden.shape[1], generator=source) > 0.02
            rows = torch.log_softmax((hidden[place] * keep) @ toy.head, -1)
            log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)

    return score


@pattern("padding of the batch", 6, "C1 C2")
def padding(seed, leak):
    """Documents go in threes, padded to the longest, and padding takes its share of the temperature; honest, none."""
    toy = Toy(seed)

    def score(tokens, log):
        logits, spans = toy.logits(tokens[:-1]), documents(tokens)
        for first in range(0, len(spans), 3):
            longest = max(stop - start for start, stop in spans[first : first + 3])
            for start, stop in spans[first : first + 3]:
                padded = 1 - (stop - start) / longest if leak else 0
                place = torch.arange(start, min(stop, len(logits)))
                rows = torch.log_softmax((1 - 0.05 * padded) * logits[place], -1)
                log.score(place + 1, nll(rows, tokens[place + 1]), logprobs=rows)

    return score
