"""Times for drawn tasks of a slot."""

from hypothesis import strategies as st

__all__ = ["times"]


def times(low: float, high: float) -> st.SearchStrategy[float]:
    """Equal times are frequent among the sixteenths; sums of the others are rounded."""
    return st.integers(int(16 * low), int(16 * high)).map(lambda n: n / 16) | st.floats(low, high).map(
        lambda x: round(x, 4)
    )
