"""Training in low precision: number formats, rounding, and rounding around any PyTorch model and optimizer."""
