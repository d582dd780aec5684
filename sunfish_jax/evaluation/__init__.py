"""How good a model is: held-out cross-entropy, likelihood, use of context."""
