"""Pure functions of the diffusion: schedules, the forward process, loss, samplers, likelihood."""
