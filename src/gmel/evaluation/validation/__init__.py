"""Validation of the simulator against closed forms and exact recomputation: see docs/validation.md."""
