"""Closed forms of queueing theory, each with its source at the check that uses it. Times in seconds."""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import integrate

__all__ = [
    "birth_death_sojourn_s",
    "bounded_queue",
    "crash_loss",
    "erlang_b",
    "erlang_c_wait_s",
    "least_loaded_wait_s",
    "pollaczek_khinchine_s",
    "weighted_sharing_s",
]


def pollaczek_khinchine_s(rate_per_s: float, mean_s: float, second_moment_s2: float) -> float:
    """Mean wait of M/G/1 in seconds, from the first two moments of the service time."""
    return rate_per_s * second_moment_s2 / (2.0 * (1.0 - rate_per_s * mean_s))


def erlang_b(offered: float, servers: int) -> float:
    """Probability of loss of M/G/c/c, by the recursion over the number of servers."""
    loss = 1.0
    for count in range(1, servers + 1):
        loss = offered * loss / (count + offered * loss)
    return loss


def erlang_c_wait_s(rate_per_s: float, servers: int, mean_s: float = 1.0) -> float:
    """Mean wait of M/M/c in seconds."""
    offered = rate_per_s * mean_s
    loss = erlang_b(offered, servers)
    waiting = loss / (1.0 - offered / servers * (1.0 - loss))
    return waiting * mean_s / (servers - offered)


def birth_death_sojourn_s(rate_per_s: float, limit: int, beta: float) -> float:
    """Mean sojourn with exponential work of mean 1: n tasks progress at 1 / (1 + beta (n - 1)) each, `limit` at most.

    Stationary law p_n ~ prod rate / (n r(n)); beyond the limit a geometric tail. Little's law gives the sojourn.
    """
    weight, total, number = 1.0, 1.0, 0.0
    for count in range(1, 2000):
        busy = min(count, limit)
        weight *= rate_per_s * (1.0 + beta * (busy - 1)) / busy
        total, number = total + weight, number + count * weight
    return number / total / rate_per_s


def weighted_sharing_s(
    rates_per_s: Sequence[float], means_s: Sequence[float], weights: Sequence[float]
) -> NDArray[np.float64]:
    """Mean sojourn of each class with discriminatory processor sharing and exponential work, one GPU.

    Of a task of class k and another of class j, both present, work of both gets done in the ratio of their weights w,
    and by memorylessness the one or the other ends at the rates w / mean: until then the other has w_j / (w_k / m_k +
    w_j / m_j) of service, which is what it holds up the first. The first meets rate_j T_j of class j when it comes
    (Little's law) and rate_j T_k while it is there, so T_k = m_k + sum over j of rate_j (T_j + T_k) x that.
    """
    rate, mean, weight = (np.asarray(each, float) for each in (rates_per_s, means_s, weights))
    pace = weight / mean
    held_up_s = rate * weight / (pace[:, None] + pace[None, :])
    return np.asarray(np.linalg.solve(np.diag(1.0 - held_up_s.sum(axis=1)) - held_up_s, mean), float)


def least_loaded_wait_s(load: float, choices: int) -> float:
    """Mean wait with exponential work of mean 1 on the least loaded of `choices` >= 2 random servers of very many.

    The share F(w) of servers with more than w of work solves the Bernoulli equation F' = -F + load F^d, F(0) = load:
    F(w) = (load + (load^(1 - d) - load) e^((d - 1) w))^(1 / (1 - d)). A task waits longer than w if all its choices do.
    """
    power = 1.0 / (1.0 - choices)

    def all_above(wait_s: float) -> float:
        grown = math.exp((choices - 1) * wait_s)
        return (load + (load ** (1 - choices) - load) * grown) ** (choices * power)

    return float(integrate.quad(all_above, 0.0, 60.0, limit=200)[0])


def bounded_queue(load: float, places: int) -> tuple[float, float]:
    """M/M/1/K with service of mean 1: share of tasks that is rejected, and mean wait of the others.

    p_n ~ load^n for n = 0, ..., K. Who comes finds K with p_K; by Little's law the mean number is lambda (1 - p_K)
    times the mean sojourn, of which the mean wait is all but the service.
    """
    weights = load ** np.arange(places + 1)
    law = weights / weights.sum()
    number = float(np.arange(places + 1) @ law)
    return float(law[-1]), number / (load * (1.0 - float(law[-1]))) - 1.0


def crash_loss(offered: float, capacity: int) -> float:
    """Share of tasks that is lost at a server that holds `capacity` at once and loses all when one more comes.

    Service is exponential with mean 1. The number there is a birth and death process with a fall from `capacity` to 0
    at the rate of arrivals: pi G = 0. Who comes finds the server full with pi_K; then K + 1 are lost.
    """
    rates = np.zeros((capacity + 1, capacity + 1))
    for there in range(capacity + 1):
        rates[there, there + 1 if there < capacity else 0] += offered
        if there:
            rates[there, there - 1] += there
    rates -= np.diag(rates.sum(axis=1))
    # One equation of balance follows from the others; the sum of the law takes its place.
    equations = np.vstack([rates.T[:-1], np.ones(capacity + 1)])
    law = np.linalg.solve(equations, np.append(np.zeros(capacity), 1.0))
    return (capacity + 1) * float(law[-1])
