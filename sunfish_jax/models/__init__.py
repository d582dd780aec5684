"""Flax modules: the denoiser and the prompt encoders."""
