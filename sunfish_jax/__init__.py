"""A continuous text-diffusion language model for ordinary CPUs."""
