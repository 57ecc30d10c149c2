"""`gmel federate`: what sites reach together without sharing photos."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gmel.cli.extras import need
from gmel.cli.photos import Builtin, Draws, Folder, Good, Layout, SplitSeed, TestPerClass
from gmel.cli.progress import ConsoleReporter

__all__ = ["federate"]


def federate(
    folder: Folder = None,
    builtin: Builtin = False,
    layout: Layout = "auto",
    good: Good = "good",
    sites: Annotated[int, typer.Option(help="Number of sites.")] = 3,
    split: Annotated[str, typer.Option(help="disjoint classes, dirichlet shares, or site: as the photos say.")] = (
        "disjoint"
    ),
    alpha: Annotated[float, typer.Option(help="Of the Dirichlet shares: small is uneven.")] = 0.5,
    shots: Annotated[int, typer.Option(help="Photos of each defect class, over all sites.")] = 5,
    draws: Draws = 10,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of a photo in the private exchange; 0: none.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Rounds of federated training.")] = 10,
    generator_rounds: Annotated[
        int, typer.Option(help="Rounds of federated training of one generator; 0: leave it out.")
    ] = 20,
    drop_out: Annotated[float, typer.Option(help="Probability that a site is absent in a round.")] = 0.0,
    straggler: Annotated[float, typer.Option(help="Probability that a site manages only a part of a round.")] = 0.0,
    over: Annotated[
        str,
        typer.Option(help="Where FedAvg of the detector runs: process (here); once more over http or flower servers."),
    ] = "process",
    round_timeout: Annotated[
        float, typer.Option(help="Over Flower: seconds to wait for the answers of a round.")
    ] = 120.0,
    tls_authority: Annotated[
        Path | None, typer.Option(help="Over Flower: certificate that the sites trust, PEM; without: no encryption.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="Over Flower: certificate of the server, for 127.0.0.1.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Over Flower: its key.")] = None,
    test_per_class: TestPerClass = None,
    seed: SplitSeed = None,
    out: Annotated[Path | None, typer.Option(help="Write the experiment into this file, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the experiment as JSON.")] = False,
) -> None:
    """Sites with different defects: alone, averaging rounds, one exchange of generators, and with all photos."""
    from gmel.federation.experiment import Settings, lines, run_experiment  # noqa: PLC0415
    from gmel.federation.flower import elsewhere_of  # noqa: PLC0415
    from gmel.federation.shared_generator import GeneratorPlan  # noqa: PLC0415
    from gmel.federation.training import Plan  # noqa: PLC0415
    from gmel.synthesis.data.source import Source  # noqa: PLC0415
    from gmel.synthesis.data.splits import SPLIT_SEED  # noqa: PLC0415

    source = Source(folder, builtin, layout, good)
    settings = Settings(
        sites,
        split,
        alpha,
        shots,
        draws,
        epsilon or None,
        test_per_class=test_per_class,
        split_seed=SPLIT_SEED if seed is None else seed,
        plan=Plan(rounds=rounds, drop_out=drop_out, straggler=straggler),
        generator=GeneratorPlan(generator_rounds, drop_out=drop_out, straggler=straggler) if generator_rounds else None,
    )
    if over == "http":
        need("edge", "httpx", "starlette", "uvicorn")
        from gmel.edge.rounds import train_over_servers  # noqa: PLC0415

        elsewhere = train_over_servers
    else:
        elsewhere = elsewhere_of(over, round_timeout, tls_authority, tls_certificate, tls_key)
    with ConsoleReporter() as reporter:
        found = run_experiment(source, settings, out, reporter, elsewhere)
    typer.echo(json.dumps(found, allow_nan=False) if as_json else "\n".join(lines(found)))
