"""What plans: `plan` and `declare` (`planning`), and the Plan that both return (`facade`)."""
