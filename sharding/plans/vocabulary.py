"""Words that a plan may hold: policies of rematerialisation, places of kept values, schedules of stages."""

from __future__ import annotations

# What layers keep for their backward pass; `transform.remat` maps each to JAX's policy.
REMATS = ("none", "dots", "full")
# The policy of keeping the values that a plan names, and where each may be kept.
NAMES = "names"
PLACES = ("device", "host")

# Orders in which pipeline stages work: one forward, one backward; or all forward, then all backward.
SCHEDULES = ("1f1b", "gpipe")
