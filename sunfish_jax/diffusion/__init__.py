"""Pure functions: the noise process, its schedules, self-conditioning, guidance, samplers, likelihood."""
