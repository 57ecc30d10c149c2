"""Room `learning`: see docs/architecture.md."""
