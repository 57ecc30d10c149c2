"""Breaks a live plant on this machine again and again under load, and prints what that costs.

    python -m benchmarks.edge_faults [--tasks N] [--server-kills N] [--gateway-kills N] [--stalls N] [--out FILE]

The plant is that of the tests (`tests/edge_chaos.py`): a gateway, four servers that are pushed to and one that fetches,
tasks that only take their time, clients that submit an id until it is acknowledged.
"""

import argparse
import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.edge_chaos import Chaos, chaos


def table(found: Chaos) -> str:
    """The counts, as they stand in docs/live-faults.md."""
    toll = found.toll
    assert toll is not None
    rows: list[tuple[str, str]] = [
        ("tasks accepted", f"{toll.accepted:,}"),
        (
            "kills of servers, of the gateway; servers stopped",
            f"{found.server_kills}, {found.gateway_kills}; {found.stalls}",
        ),
        ("tasks lost", f"{toll.lost}"),
        ("results for each id", "exactly 1" if toll.results == toll.ids == toll.accepted else "NOT 1"),
        ("ends that were told and changed afterwards", f"{toll.changed}"),
        ("executions begun, ended", f"{toll.begun:,}, {toll.ended:,}"),
        ("ids that were begun more than once", f"{toll.repeated}"),
        ("results that came after the one that counts", f"{toll.late_results}"),
        ("tasks with more than one attempt; most attempts of one", f"{toll.second}; {toll.most_attempts}"),
        ("latency p50, p99, most", f"{found.p50_s:.2f}, {found.p99_s:.2f}, {found.most_s:.2f} s"),
    ]
    if found.left_s:
        rows += [
            ("a stopped server is left after (least to most)", f"{min(found.left_s):.2f} to {max(found.left_s):.2f} s"),
            ("and used again after it goes on", f"{min(found.again_s):.2f} to {max(found.again_s):.2f} s"),
        ]
    rows.append(("the whole run", f"{found.seconds:.0f} s"))
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Runs and prints."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge_faults", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000, help="at least so many are accepted")
    parser.add_argument("--server-kills", type=int, default=20)
    parser.add_argument("--gateway-kills", type=int, default=5)
    parser.add_argument("--stalls", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the faults")
    parser.add_argument("--out", type=Path, metavar="FILE", help="everything as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gmel-faults-") as folder:
        found = chaos(
            Path(folder), options.tasks, options.server_kills, options.gateway_kills, options.stalls, seed=options.seed
        )
    print(table(found))
    if options.out is not None:
        content: dict[str, Any] = {"when": datetime.now().astimezone().isoformat(timespec="seconds"), **found.as_json()}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
