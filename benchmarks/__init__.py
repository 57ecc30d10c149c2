"""Measurements: how fast the simulator and the learner are, what they compile and hold. Never asserted by a clock."""
