"""Room `physics`: see docs/architecture.md."""
