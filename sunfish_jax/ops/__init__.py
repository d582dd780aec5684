"""The few array operations written for XLA:CPU, each with its own vector-Jacobian product."""
