"""How other frameworks run a training step, and the efficiencies that were fitted to their measured runs."""
