"""Rules that a user declares: named dimension or parameter path to mesh axes."""
