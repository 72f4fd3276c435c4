"""Plans as data: the decision, its estimate, its proof and where it came from."""
