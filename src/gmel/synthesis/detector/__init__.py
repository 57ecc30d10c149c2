"""Detectors: what a photo shows, how sure that is, and where the threshold lies."""
