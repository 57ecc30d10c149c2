"""Pretrained pipelines that a user brings, adapted to a few shots: what the mode `diffusers` is made of."""
