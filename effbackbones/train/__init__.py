"""Training and evaluation under Lightning."""
