"""State, optimiser, step and loop."""
