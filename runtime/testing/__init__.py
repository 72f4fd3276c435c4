"""Pytest markers for tests on simulated devices and in several processes."""
