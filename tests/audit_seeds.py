"""How many seeds the auditor's tests run with, of streams and of audits."""

import os

ALL = 5
SEEDS = int(os.environ.get("SLOTFAST_AUDIT_SEEDS", "2"))
STATED = f"auditor's tests: seeds 0 to {SEEDS - 1}; SLOTFAST_AUDIT_SEEDS={ALL} for all"
