"""Training: from a config to a plan, a step, a loop and a run folder."""
