"""Transformations of a user's function that carry out a Plan; each keeps the function's values."""
