"""GMEL: where a factory's generation tasks run, learned and measured."""

__version__ = "0.1.0"
