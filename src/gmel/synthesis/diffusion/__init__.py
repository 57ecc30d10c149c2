"""Diffusion on windows of photos: network, preconditioning, samplers, windows, training."""
