"""Full-precision models in, 4-bit checkpoints in the public layouts out."""
