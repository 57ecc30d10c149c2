"""Parts that are installed when asked for."""

from importlib.util import find_spec

from gmel.scenario.errors import InputError

__all__ = ["need"]


def need(extra: str, *modules: str) -> None:
    """Says in one line which extra is missing.

    Raises:
        InputError: a module is not installed.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise InputError(
            f"this command needs the extra {extra!r} ({', '.join(missing)} is not installed): "
            f"pip install 'gmel[{extra}]', or uv sync --extra {extra}"
        )
