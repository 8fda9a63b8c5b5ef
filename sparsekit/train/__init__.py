"""Training with masks: losses, teachers, optimizers and trainers."""
