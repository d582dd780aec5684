"""State, step, loop and metric writers."""
