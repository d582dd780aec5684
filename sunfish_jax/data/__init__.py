"""Text in, batches out: sources, the tokenizer, and batches as a pure function of (seed, step)."""
