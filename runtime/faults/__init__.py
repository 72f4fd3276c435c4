"""Signals, hangs and failures, and how a run ends on them."""
