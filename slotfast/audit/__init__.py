"""slotfast audit: runs an evaluation loop on altered tokens and finds out whether it looks where it must not.

Four conditions make a score honest. C1: the distribution p_t of token t depends on the model and on tokens before t
only. C2: p_t is a distribution over the whole vocabulary, fixed before token t is looked at, and the charge is
-log p_t(token t). C3: a charge is fixed before any state uses its token. C4: one pass from left to right that charges
every token with a predecessor once. Besides, bits per byte need the right number of bytes.

Nothing that a loop says about itself is believed. It is run on a stream, and again on copies in which one token, or
everything from some position on, is changed; scores before the change must not move by more than reruns of one stream
differ. What moved is traced to one token. Copies differ at the borders of the loop's own events, at documents,
windows, batches and ranks, at the far end, where tokens are charged little for how rare they are, and anywhere.
Distributions, where the loop gives them, must sum to 1, agree with the charge and stay as they are when their own
token changes. Where it gives none, the vocabulary's tokens are put in one position in turn, and the probabilities that
they are charged must sum to 1; and on tokens drawn with known chances, no bet that these sums exceed 1 may win. What
there is no data for is UNTESTED. So is C2 where no complete total lies late in the stream: a state that takes most of
a stream to fill plays no part in earlier totals.

A loop is a function of the stream, an int64 tensor [N], and a log. It keeps nothing between calls, and gives the same
scores for the same stream:

    from slotfast.audit import audit

    def score(tokens, log):
        state = new_state()
        for begin in range(1, len(tokens), 64):
            positions = torch.arange(begin, min(begin + 64, len(tokens)))
            logprobs = predict(state, tokens[: positions[-1]], positions)     # [n, V], for tokens at `positions`
            nll = -logprobs[torch.arange(len(positions)), tokens[positions]]
            log.score(positions, nll, logprobs=logprobs)                      # one event
            state = learn(state, tokens[positions])
            log.update(positions)

    report = audit(score, tokens, vocab_size=1024, bos_id=1)
    print(report)
    assert report.clean, report.failed

A loop that remembers can repeat what it once said wherever a stream begins in the same way, and so hide what it knew.
`fresh=` finds it out: a function that makes the loop anew, without a memory: `audit(make(), tokens, ..., fresh=make)`.

An audit can show that there is a leak, not that there is none: it says how many pairs of a changed token and a watched
score it has covered, and what it could not reach. More seeds cover more. Text of the loop's own kind shows more than
drawn tokens, on which every choice between two fits falls the same way. Running a loop cannot show what weights and
files were made from: a loop that holds a table of the stream is causal; what it opens while it runs is named. Nor can
it show a leak that waits for a longer stream, or that recognises an audit.

`bytes=` in `log.score` gives what the loop counts each token as. A function that never calls the log and returns its
losses [N - 1] is fine too; then nothing can be said about order. From a shell, for a function in a module that can be
imported from here: `slotfast audit --score package.module:score --vocab-size 1024`.
"""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .api import audit
    from .checks import Test
    from .log import Log
    from .places import Hints
    from .report import Report

__all__ = ["Hints", "Log", "Report", "Test", "audit"]
__getattr__, __dir__ = exports(
    __name__,
    {
        ".api": ["audit", "audit_rows"],
        ".checks": ["Test"],
        ".log": ["Log"],
        ".places": ["Hints"],
        ".report": ["Report"],
    },
)
