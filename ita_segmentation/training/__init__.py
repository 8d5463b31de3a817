"""Training: the Trainer, its arguments, schedules, checkpoints, what a run shows of itself."""
