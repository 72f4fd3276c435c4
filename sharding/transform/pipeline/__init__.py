"""Layers over stages: a loss cut at its layers, and the ticks in which stages work its parts through."""
