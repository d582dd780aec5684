"""Prompt in, text out."""
