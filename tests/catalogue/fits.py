"""Test-time fits of a bias or a hidden delta that see what they are about to predict."""

import torch

from slotfast.windows import Plan

from .toy import BATCH, BOS, RANK_BORDER, SEQ, STRIDE, VOCAB, Toy, batches, charge, collate, excess, fit, nll, pattern


@pattern("scored-position fit", 1, "C1 C2 C3")
def scored_position_fit(seed, leak):
    """Standard SLOT: each window's bias is fitted to the positions it then scores; honest, to its context."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            bias = fit(logits, batch.targets, batch.scored if leak else batch.context)
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("scored-position hidden delta", 1, "C1 C2 C3")
def scored_position_delta(seed, leak):
    """SLOT as first published: an offset of the last hidden state, fitted to the scored positions."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            hidden = toy.hidden(batch.inputs)
            mask = batch.scored if leak else batch.context
            delta = torch.zeros_like(hidden[:, :1])
            for _ in range(3):
                delta = delta - 0.02 * excess((hidden + delta) @ toy.head, batch.targets, mask) @ toy.head.T
            charge(log, batch, torch.log_softmax((hidden + delta) @ toy.head, -1))

    return score


@pattern("focal mask one too long", 1, "C1 C2 C3")
def focal_mask_one_too_long(seed, leak):
    """The fit's positions end at [0, s] in place of [0, s): the first scored token of each window is fitted to."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            mask = batch.context
            if leak:
                mask = torch.cat([mask[:, :1], mask[:, :-1]], 1)
            charge(log, batch, torch.log_softmax(logits + fit(logits, batch.targets, mask), -1))

    return score


@pattern("first window fitted to itself", 1, "C1 C2 C3")
def first_window_fitted_to_itself(seed, leak):
    """The first window has no context, so the loop falls back on all of it; every other window is honest."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            empty = ~batch.context.any(1, keepdim=True)
            mask = batch.context | (batch.scored & empty) if leak else batch.context
            charge(log, batch, torch.log_softmax(logits + fit(logits, batch.targets, mask), -1))

    return score


@pattern("importance weights over scored positions", 1, "C1 C2 C3")
def importance_weights(seed, leak):
    """Context losses are weighted by 1 - p over the sum of these weights; the sum runs over scored tokens too."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            weight = 1 - torch.exp(-nll(torch.log_softmax(logits, -1), batch.targets))
            summed = weight * (batch.context | batch.scored if leak else batch.context)
            weight = 20 * weight * batch.context / summed.sum(1, keepdim=True).clamp(min=1e-9)
            charge(log, batch, torch.log_softmax(logits + fit(logits, batch.targets, weight), -1))

    return score


@pattern("batch-shared bias", 2, "C1 C2 C3")
def batch_shared_bias(seed, leak):
    """One bias for a batch of overlapping windows, fitted to all contexts: a later context is an earlier target."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            bias = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
            for _ in range(3):
                step = excess(logits + bias, batch.targets, batch.context)
                bias = bias - 0.02 * (step.sum(0, keepdim=True) if leak else step)
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("batch-shared hidden delta", 2, "C1 C2 C3")
def batch_shared_delta(seed, leak):
    """Context-only SLOT with one delta [1, 1, D] a batch; honest, [W, 1, D]."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            hidden = toy.hidden(batch.inputs)
            delta = torch.zeros_like(hidden[:1, :1])
            for _ in range(3):
                step = excess((hidden + delta) @ toy.head, batch.targets, batch.context) @ toy.head.T
                delta = delta - 0.01 * (step.sum(0, keepdim=True) if leak else step)
            charge(log, batch, torch.log_softmax((hidden + delta) @ toy.head, -1))

    return score


@pattern("joint L-BFGS", 3, "C1 C2 C3")
def joint_lbfgs(seed, leak):
    """Each window has a bias, but one L-BFGS runs over [W, 1, V]: line search and curvature pairs are shared."""
    toy = Toy(seed)

    @torch.enable_grad()
    def solve(logits, targets, mask):
        bias = torch.zeros(len(logits), 1, VOCAB, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([bias], max_iter=3, history_size=3, line_search_fn="strong_wolfe")

        def closure():
            solver.zero_grad()
            losses = torch.nn.functional.cross_entropy((logits + bias).mT, targets, reduction="none")
            loss = (losses * mask).sum() + 1.5 * bias.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        return bias.detach()

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            size = len(logits) if leak else 1
            parts = zip(*(part.split(size) for part in (logits, batch.targets, batch.context)), strict=True)
            bias = torch.cat([solve(*part) for part in parts])
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("gradient-norm clipping over the batch", 3, "C1 C2 C3")
def clipping(seed, leak):
    """Each window has a bias; the gradient of all of them is clipped to one norm."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            bias = torch.zeros(len(logits), 1, VOCAB, dtype=torch.float64)
            for _ in range(3):
                step = excess(logits + bias, batch.targets, batch.context)
                norm = step.norm() if leak else step.norm(dim=-1, keepdim=True)
                bias = bias - 0.3 * step / norm.clamp(min=1)
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("loss over a data-dependent count", 3, "C1 C2 C3")
def data_dependent_denominator(seed, leak):
    """Only context tokens above 3.5 nats count, and the loss is divided by how many the whole batch has."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            hard = batch.context & (nll(torch.log_softmax(logits, -1), batch.targets) > 3.5)
            count = hard.sum().expand(len(hard), 1) if leak else hard.sum(1, keepdim=True)
            weight = 20 * hard / count.clamp(min=1)
            charge(log, batch, torch.log_softmax(logits + fit(logits, batch.targets, weight), -1))

    return score


@pattern("one step size for the batch", 3, "C1 C2 C3")
def joint_step_size(seed, leak):
    """Each window has a bias; the step size is the one of sixteen that serves the batch's contexts best."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            step = excess(logits, batch.targets, batch.context)
            sizes = torch.linspace(0.3, 1.5, 16).tolist()
            trials = torch.stack([torch.log_softmax(logits - size * step, -1) for size in sizes])
            targets = batch.targets.expand(len(sizes), -1, -1)
            losses = (nll(trials, targets) * batch.context).sum(-1)  # (sizes, W)
            best = losses.sum(1).argmin().expand(len(logits)) if leak else losses.argmin(0)
            charge(log, batch, trials[best, torch.arange(len(logits))])

    return score


@pattern("one stopping test for the batch", 3, "C1 C2 C3")
def joint_stopping_test(seed, leak):
    """Each window has a bias; all go on until the batch's mean gain of a step falls under a tolerance."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            bias = torch.zeros(len(logits), 1, VOCAB, dtype=torch.float64)
            going = torch.ones(len(logits), 1, 1, dtype=torch.bool)
            for _ in range(10):
                step = excess(logits + bias, batch.targets, batch.context)
                gain = 0.05 * step.square().sum(-1, keepdim=True)  # to first order
                going = going & ((gain.mean() if leak else gain) > 1.5)
                bias = torch.where(going, bias - 0.05 * step, bias)
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("batch-mean warm start", 3, "C1 C2 C3")
def batch_mean_warm_start(seed, leak):
    """A first step for each window; the mean over the batch is where every window's fit starts."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            start = fit(logits, batch.targets, batch.context, steps=1)
            if leak:
                start = start.mean(0, keepdim=True)
            bias = fit(logits, batch.targets, batch.context, start, steps=2)
            charge(log, batch, torch.log_softmax(logits + bias, -1))

    return score


@pattern("warm start from the same batch", 4, "C1 C2 C3")
def warm_start_from_the_same_batch(seed, leak):
    """Windows start from 0.9 x the last window's bias: of this batch, fitted before; honest, of the batch before."""
    toy = Toy(seed)

    def score(tokens, log):
        carried = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            if leak:
                carried = fit(logits, batch.targets, batch.context)[-1:]
            bias = fit(logits, batch.targets, batch.context, 0.9 * carried)
            charge(log, batch, torch.log_softmax(logits + bias, -1))
            carried = bias[-1:]
            log.update(batch.positions[batch.context].unique())

    return score


@pattern("warm start across ranks", 4, "C1 C2 C3")
def warm_start_across_ranks(seed, leak):
    """Two ranks step side by side and average their biases; the second one's come from the stream's later half."""
    toy = Toy(seed)

    def score(tokens, log):
        plan = Plan(len(tokens) - 1, SEQ, STRIDE)
        owned = [range(min(RANK_BORDER, len(plan))), range(RANK_BORDER, len(plan))]
        done = [[], []]
        carried = [torch.zeros(1, 1, VOCAB, dtype=torch.float64)] * 2
        for first in range(0, max(map(len, owned)), BATCH):
            for rank in (0, 1):
                if windows := [plan[index] for index in owned[rank][first : first + BATCH]]:
                    batch = collate(tokens, windows)
                    logits = toy.logits(batch.inputs)
                    bias = fit(logits, batch.targets, batch.context, carried[rank])
                    carried[rank] = bias[-1:]
                    done[rank].append((batch, torch.log_softmax(logits + bias, -1)))
            if leak:  # the all-reduce
                carried = [(carried[0] + carried[1]) / 2] * 2
        for rank in (0, 1):
            for batch, logprobs in done[rank]:
                charge(log, batch, logprobs)

    return score


@pattern("burn-in on the wrong side of a rank border", 4, "C1 C2 C3")
def burn_in_on_the_wrong_side(seed, leak):
    """The second rank warms its carried bias up on four windows: those it is about to score; honest, those before."""
    toy = Toy(seed)

    def learn(bias, batch):
        step = excess(toy.logits(batch.inputs) + bias, batch.targets, batch.scored)
        return 0.8 * bias - 0.05 * step.sum(0, keepdim=True)

    def score(tokens, log):
        plan = Plan(len(tokens) - 1, SEQ, STRIDE)
        bias = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        for index in range(len(plan)):
            if index == RANK_BORDER:
                bias = torch.zeros_like(bias)
                first = RANK_BORDER if leak else RANK_BORDER - 4
                for other in range(first, min(first + 4, len(plan))):
                    bias = learn(bias, collate(tokens, [plan[other]]))
            batch = collate(tokens, [plan[index]])
            charge(log, batch, torch.log_softmax(toy.logits(batch.inputs) + bias, -1))
            bias = learn(bias, batch)
            log.update(batch.positions[batch.scored])

    return score


@pattern("best of K by scored loss", 5, "C1 C2 C4")
def best_of_k(seed, leak):
    """Each window tries four learning rates and keeps the best: on the scored tokens; honest, on its context."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            trials = torch.stack(
                [logits + fit(logits, batch.targets, batch.context, rate=rate) for rate in (0.01, 0.03, 0.1, 0.3)]
            ).log_softmax(-1)
            losses = nll(trials, batch.targets.expand(4, -1, -1)) * (batch.scored if leak else batch.context)
            charge(log, batch, trials[losses.sum(-1).argmin(0), torch.arange(len(logits))])

    return score


@pattern("early stopping on the scored loss", 5, "C1 C2 C4")
def early_stopping(seed, leak):
    """Of the iterates of each window's fit, the one that scores best is kept; honest, always the last."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            logits = toy.logits(batch.inputs)
            biases = [torch.zeros(len(logits), 1, VOCAB, dtype=torch.float64)]
            for _ in range(4):
                biases.append(fit(logits, batch.targets, batch.context, biases[-1], steps=1, rate=0.1))
            trials = torch.stack([torch.log_softmax(logits + bias, -1) for bias in biases])
            losses = (nll(trials, batch.targets.expand(5, -1, -1)) * batch.scored).sum(-1)
            kept = losses.argmin(0) if leak else torch.full((len(logits),), 4)
            charge(log, batch, trials[kept, torch.arange(len(logits))])

    return score


@pattern("reset at a BOS not yet scored", 20, "C1 C2 C3")
def reset_at_a_coming_bos(seed, leak):
    """A carried bias fades where a document starts: in the window that scores the BOS; honest, in the next one."""
    toy = Toy(seed)

    def score(tokens, log):
        bias = torch.zeros(1, 1, VOCAB, dtype=torch.float64)
        fade = False
        for batch in batches(tokens, 1):
            starts = bool((batch.targets[batch.scored] == BOS).any())
            if starts if leak else fade:
                bias = 0.1 * bias
            logits = toy.logits(batch.inputs)
            charge(log, batch, torch.log_softmax(logits + bias, -1))
            bias = bias - 0.05 * excess(logits + bias, batch.targets, batch.scored)
            log.update(batch.positions[batch.scored])
            fade = starts

    return score
