"""Room `scenario`: see docs/architecture.md."""
