"""The few array operations written for XLA:CPU, and what a machine's number format and memory ask for."""
