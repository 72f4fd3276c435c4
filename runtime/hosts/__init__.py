"""Processes that form one run: how they find and greet one another."""
