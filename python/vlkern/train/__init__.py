"""Training: one loop for every recipe, on one process or many, that survives being killed at any moment."""
