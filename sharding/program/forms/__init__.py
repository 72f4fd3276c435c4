"""Forms that are looked for in traced programs: attention, and losses over a vocabulary."""
