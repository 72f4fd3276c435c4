"""The Plan, and how one comes about."""
