"""The edge server: what runs tasks."""
