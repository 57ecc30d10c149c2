"""Room `simulator`: see docs/architecture.md."""
