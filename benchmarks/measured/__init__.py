"""Measured training runs as programs, topologies and candidates, to score the planner by."""
