"""Shares of a task with which all its parts end together, beside a bisection and the closed form of the source."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gmel.physics.splitting import Way, equal_finish


class Server(NamedTuple):
    """A server in plain Python: when a part is there, when the server is free, and what a whole task takes."""

    before_s: float
    send_s: float
    wait_s: float
    serve_s: float
    after_s: float

    def share_by(self, end_s: float) -> float:
        """How much of a task it gets done by then, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):
            share = 0.5 * (low + high)
            start_s = max(self.before_s + share * self.send_s, self.wait_s)
            late = start_s + share * self.serve_s + self.after_s > end_s
            low, high = (low, share) if late else (share, high)
        return low


def shares_by_bisection(servers: list[Server]) -> tuple[list[float], float]:
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if sum(server.share_by(middle) for server in servers) < 1 else (low, middle)
    return [server.share_by(high) for server in servers], high


def way_of(servers: list[Server]) -> Way:
    return Way(*(jnp.array(column) for column in zip(*servers, strict=True)))


number = st.integers(0, 40).map(lambda n: n / 8)
server = st.builds(Server, number, number, number, st.integers(1, 40).map(lambda n: n / 8), number)


class TestShares:
    @given(servers=st.lists(server, min_size=5, max_size=5), chosen=st.lists(st.booleans(), min_size=5, max_size=5))
    @example(servers=[Server(0.0, 1.0, 2.0, 1.0, 0.0)] * 5, chosen=[True] * 5)
    @settings(deadline=None, max_examples=60)
    def test_they_are_those_of_a_bisection(self, servers: list[Server], chosen: list[bool]) -> None:
        if not any(chosen):
            chosen = [True, *chosen[1:]]
        expected, end_s = shares_by_bisection([s for s, taken in zip(servers, chosen, strict=True) if taken])
        share, found_s = equal_finish(way_of(servers), jnp.array(chosen))
        np.testing.assert_allclose(np.asarray(share)[chosen], expected, atol=2e-5)
        assert (np.asarray(share)[~np.array(chosen)] == 0).all()
        assert float(found_s) == pytest.approx(end_s, rel=1e-5)
        ends_s = np.asarray(way_of(servers).end_s(share))
        np.testing.assert_allclose(ends_s[np.asarray(share) > 1e-6], end_s, rtol=1e-4)

    @given(data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_without_sending_and_negatives_they_are_the_closed_form_of_the_source(self, data: st.DataObject) -> None:
        """L = (1 + sum w / d) / sum (1 / d), x = (L - w) / d (AMCoEdge)."""
        size = st.lists(st.integers(8, 80).map(lambda n: n / 8), min_size=4, max_size=4)
        full_s, wait_s = np.array(data.draw(size)), 0.05 * np.array(data.draw(size))
        end_s = (1 + (wait_s / full_s).sum()) / (1 / full_s).sum()
        closed = (end_s - wait_s) / full_s
        servers = [Server(0.0, 0.0, w, d, 0.0) for w, d in zip(wait_s, full_s, strict=True)]
        share, found_s = equal_finish(way_of(servers), jnp.ones(4, bool))
        if (closed >= 0).all():
            np.testing.assert_allclose(share, closed, atol=1e-5)
            assert float(found_s) == pytest.approx(end_s, rel=1e-5)
        else:
            # The source sets negatives to zero and rescales: then not all end together, and the last ends later.
            rescaled = np.maximum(closed, 0) / np.maximum(closed, 0).sum()
            assert float(found_s) <= (wait_s + rescaled * full_s)[rescaled > 0].max() + 1e-5

    def test_a_short_task_behind_long_queues_is_split_exactly(self) -> None:
        """In float32, where the queues alone are so long that the task is lost in their rounding."""
        servers = [Server(0.0, 0.0, 8192.0, 2.0**-12, 0.0), Server(0.0, 0.0, 8192.0, 2.0**-11, 0.0)]
        np.testing.assert_allclose(equal_finish(way_of(servers), jnp.ones(2, bool))[0], [2 / 3, 1 / 3], rtol=1e-6)

    def test_one_server_has_the_whole(self) -> None:
        share, end_s = equal_finish(way_of([Server(0.1, 0.7, 0.3, 0.9, 0.2)]), jnp.ones(1, bool))
        assert float(share[0]) == 1.0
        assert float(end_s) == pytest.approx(0.1 + 0.7 + 0.9 + 0.2)
