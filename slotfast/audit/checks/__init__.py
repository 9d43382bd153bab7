"""The questions asked about a loop: each is a file that says what it takes note of and what it concludes.

To add a question, write a file with a `Check` and name it in the two lists below.
"""

from .base import ByteRule, Check, Findings, Pair, Test, Verdict
from .bets import Bets
from .bytes import Bytes
from .charges import Charges
from .files import Files
from .future import Future
from .order import Order
from .own import Own
from .repeats import Repeats
from .totals import Totals

CHECKS: tuple[type[Check], ...] = (
    Repeats,
    Future,
    Own,
    Charges,
    Totals,
    Bets,
    Order,
    Bytes,
    Files,
)  # in the report's order

# A condition is kept where all tests of one of its lists pass, and broken where any test that names it fails
NEEDED = {
    "C1": [["future tokens"]],
    "C2": [["own value", "charges", "distributions"], ["substituted totals"]],
    "C3": [["scores before use"]],
    "C4": [["every token once", "left to right"]],
    "bytes": [["bytes"]],
}

__all__ = [
    "CHECKS", "NEEDED", "Bets", "ByteRule", "Bytes", "Charges", "Check", "Files", "Findings", "Future", "Order", "Own",
    "Pair", "Repeats", "Test", "Totals", "Verdict",
]  # fmt: skip
