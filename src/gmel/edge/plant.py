"""What a gateway or a device knows of the plant: servers and models with their numbers, and nothing that is drawn.

Plain data: a device gets it as JSON from the gateway and needs neither pydantic nor JAX for it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gmel.scenario.errors import InputError

if TYPE_CHECKING:
    from gmel.scenario.schema import Scenario

__all__ = ["Model", "Plant", "Server", "plant_of"]


@dataclass(frozen=True)
class Model:
    """What a task of a model costs: work = images x (fixed_work + steps x step_work + steps^2 x square_work) + bits x
    work_per_bit, in work units of the scenario (equation (1))."""

    name: str
    memory_gb: float
    load_s: float
    fixed_work: float
    step_work: float
    square_work: float
    work_per_bit: float
    steps: int
    bits_out_per_image: float

    def work(self, images: int, steps: int | None, bits: float) -> float:
        """Work units of a task."""
        count = self.steps if steps is None else steps
        each = self.fixed_work + count * self.step_work + count**2 * self.square_work
        return images * each + bits * self.work_per_bit


@dataclass(frozen=True)
class Server:
    """A server as the scenario describes it: `speed` in work units per second on each of `gpus`."""

    name: str
    speed: float
    gpus: int
    memory_gb: float
    position_m: tuple[float, float] | None


@dataclass(frozen=True)
class Plant:
    """Servers and models by name, in the order of the scenario."""

    name: str
    work_unit: str
    slot_s: float
    devices: int
    device_speed: float
    hall_m: tuple[float, float]
    device_positions_m: tuple[tuple[float, float], ...] | None
    servers: Mapping[str, Server]
    models: Mapping[str, Model]
    local: bool = False
    """Whether devices may run tasks themselves."""
    device_memory_gb: float = 0.0
    """For models on a device; 0 for any."""

    def as_json(self) -> dict[str, Any]:
        """For a body."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Plant":
        """A plant from what :meth:`as_json` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            servers = {name: Server(**_place(fields)) for name, fields in content["servers"].items()}
            models = {name: Model(**fields) for name, fields in content["models"].items()}
            rest = {name: value for name, value in content.items() if name not in ("servers", "models")}
            return cls(**rest, servers=servers, models=models)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"plant: not the description of a plant ({error}); is that a gateway of this version?"
            ) from error


def _place(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"position_m": None if fields["position_m"] is None else tuple(fields["position_m"])}


def plant_of(scenario: "Scenario") -> Plant:
    """The plant of a scenario.

    Raises:
        InputError: its tasks are not those of a catalogue of models, or its servers are not first in, first out.
    """
    if not scenario.models:
        raise InputError(f"scenario {scenario.name!r}: has no [[models]]; a live plant needs some")
    if scenario.service.discipline != "fifo":
        kind = scenario.service.discipline
        raise InputError(f'scenario {scenario.name!r}: service.discipline = "{kind}"; a live plant needs "fifo"')
    models = {
        each.name: Model(
            name=each.name,
            memory_gb=each.memory_gb,
            load_s=each.load.mean * each.load_scale,
            fixed_work=each.fixed_work,
            step_work=each.step_work.mean if each.step_work else 0.0,
            square_work=each.square_work,
            work_per_bit=each.work_per_bit.mean if each.work_per_bit else 0.0,
            steps=max(1, round(each.steps.mean)),
            bits_out_per_image=each.bits_out_per_image,
        )
        for each in scenario.models
    }
    servers = {
        each.name: Server(each.name, each.speed, each.gpus, each.memory_gb, each.position_m)
        for each in scenario.servers
    }
    places = scenario.devices.positions_m
    return Plant(
        name=scenario.name,
        work_unit=scenario.work_unit,
        slot_s=scenario.slot.length_s,
        devices=scenario.devices.count,
        device_speed=scenario.devices.speed.mean,
        hall_m=(float(scenario.radio.hall_m[0]), float(scenario.radio.hall_m[1])),
        device_positions_m=None if places is None else tuple(places),
        servers=servers,
        models=models,
        local=scenario.devices.local,
        device_memory_gb=scenario.devices.memory_gb,
    )
