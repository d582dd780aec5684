"""What a run keeps: its configuration, tokenizer and checkpoints."""
