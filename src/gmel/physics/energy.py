"""Energy of a task, equation (12): on the device, or upload + idle + server + model switch. Joules, watts, seconds."""

from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "idle_energy_j",
    "local_energy_j",
    "offload_energy_j",
    "power_energy_j",
    "switch_energy_j",
]

Real: TypeAlias = Float[Array, "..."] | float


def local_energy_j(
    effective_capacitance: Real, frequency_hz: Float[Array, "..."], cycles: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Energy kappa f^2 C of a processor that runs `cycles` at `frequency_hz`, equation (12), first line.

    `effective_capacitance` is kappa in J s^2 / cycle^3, 1e-27 for a mobile processor.
    """
    # The order keeps every factor in the range of float32: f^2 C alone is near 1e28.
    return effective_capacitance * frequency_hz * cycles * frequency_hz


def power_energy_j(power_w: Real, duration_s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Energy P t at constant power: the radio during an upload, a server or a device during a run."""
    return power_w * duration_s


def idle_energy_j(
    idle_power_w: Real, latency_s: Float[Array, "..."], upload_s: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Energy of a device that waits for its result after the upload, P_idle (L - L_up), equation (12)."""
    # Rounding may leave the latency a hair below the upload it contains.
    return idle_power_w * jnp.maximum(latency_s - upload_s, 0.0)


def switch_energy_j(switch_power_w: Real, switch_s: Float[Array, "..."]) -> Float[Array, "..."]:
    """Energy of loading a model, P_sw L_sw, equation (9)."""
    return switch_power_w * switch_s


def offload_energy_j(
    *,
    tx_power_w: Real,
    idle_power_w: Real,
    server_power_w: Real,
    switch_power_w: Real,
    upload_s: Float[Array, "..."],
    latency_s: Float[Array, "..."],
    run_s: Float[Array, "..."],
    switch_s: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Energy of an offloaded task, equation (12), second line: radio + idle + server + switch.

    `latency_s` is the whole latency, of which `upload_s`, `switch_s` and `run_s` are parts.
    """
    return (
        power_energy_j(tx_power_w, upload_s)
        + idle_energy_j(idle_power_w, latency_s, upload_s)
        + power_energy_j(server_power_w, run_s)
        + switch_energy_j(switch_power_w, switch_s)
    )
