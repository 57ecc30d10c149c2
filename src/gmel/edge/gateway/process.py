"""A gateway as a process: from options to the last request."""

import math
from collections.abc import Callable

from gmel.edge.engines.engine import Engine
from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import LEDGER, RESULTS, Settings
from gmel.edge.ledger_file import check_ledger
from gmel.edge.logs import structured_logs
from gmel.edge.plant import Plant, plant_of
from gmel.edge.recovery import recover_ledger
from gmel.edge.serving import Place, check_open, listen, run, serve
from gmel.edge.store import StoreError, store_at
from gmel.edge.traces import traces_of
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario

__all__ = ["run_gateway"]


def run_gateway(
    scenario: str,
    place: Place,
    settings: Settings,
    say: Callable[[str], None],
    recover: bool = False,
    engine_of: Callable[[Plant], Engine] | None = None,
    traced: bool = False,
) -> None:
    """Runs a gateway until it is told to end.

    Args:
        scenario: preset or file of the plant.
        place: where it listens.
        settings: how.
        say: is told its address, and what was taken back.
        recover: whether a damaged ledger is taken back as far as it can be read.
        engine_of: makes the engine of the plant; HTTP if left out.
        traced: whether spans of tasks are sent also where the environment names no collector.

    Raises:
        InputError: anything that cannot be used.
    """
    check_open(place, settings.keys, "gateway")
    for name, value in (("--keep-days", settings.keep_days), ("--keep-gb", settings.keep_gb)):
        if value is not None and not math.isfinite(value):
            raise InputError(f"{name} is {value}; must be a number")
    plant = plant_of(load_scenario(scenario))
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{settings.folder}: cannot be made ({error.strerror}); choose another folder") from error
    ledger = settings.folder / LEDGER
    store = store_at(settings.store, settings.folder, RESULTS)
    if recover:
        try:
            say(f"ledger: {recover_ledger(ledger, store)}")
        except StoreError as error:
            raise InputError(f"--recover: {error}; nothing was changed") from error
    traces = traces_of("gmel-gateway", traced)
    app = gateway_app(plant, settings, None if engine_of is None else engine_of(plant), traces)
    check_ledger(ledger)
    door = listen(place)
    structured_logs()
    address = f"{place.scheme}://{place.host}:{door.getsockname()[1]}"
    run(serve(app, door, place, lambda: say(f"gateway at {address}")))
