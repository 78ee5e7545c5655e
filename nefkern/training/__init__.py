"""Training: options, the run folder, a step, the loop."""
