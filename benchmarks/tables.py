"""What is shown of the measurements: tables with ratios side by side, and which aims are met."""

import os

from rich.table import Table

from benchmarks.sections import LARGE, SCENARIO, Row

CAPTION = (
    "An agent decision is one device in one slot, with a request or without: 20 a slot. A request decided is a row "
    "that is present: {requests:.2f} a slot (load 0.7). Actions are random, hashed inside the compiled loop (PCG4D, "
    "the simulator's own generator); NumPy and SimPy draw theirs with NumPy. No observation is made unless the row "
    "says so. us/slot is that of one environment. x NumPy, x SimPy: decisions per processor second over those of one "
    "environment in NumPy and in SimPy; processor time, because the clock of a shared machine measures the neighbours "
    "too."
)
LARGE_CAPTION = (
    "Both plants in turn in one process; actions are random over the device itself and the servers it may choose. "
    "us/slot is that of one environment, by the clock. us/request and ns/decision: processor time of a step over the "
    "requests decided in it, and over its agent decisions (device x slot); ratio: over the least of hall-20x5. State: "
    "bytes of all arrays of one environment."
)


def speed_table(results: dict[str, list[Row]]) -> Table | None:
    """Rates of the simulators and of training, side by side."""
    sections = ("numpy", "simpy", "simulator", "training")
    rows = [(section, row) for section in sections for row in results.get(section, [])]
    timed_rows = [(section, row) for section, row in rows if "missing" not in row]
    if not timed_rows:
        return None
    # Drawn requests differ a little by section; the compiled environments have the most slots.
    counts = {section: row["requests_per_slot"] for section, row in timed_rows}
    requests = counts.get("simulator", next(iter(counts.values())))
    table = Table(title=f"Speed on {SCENARIO}", caption=CAPTION.format(requests=requests), caption_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("decisions/s", "per CPU s", "requests/s", "us/slot", "x NumPy", "x SimPy", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for section, row in rows:
        if "missing" in row:
            table.add_row(f"{row['what']}: {row['missing']}")
            continue
        # What simulates and learns is no environment: its ratio would compare unlike things.
        bases = [None if section == "training" else base_row(results, base) for base in ("numpy", "simpy")]
        ratios = [row["decisions_per_cpu_s"] / base["decisions_per_cpu_s"] if base else None for base in bases]
        table.add_row(
            row["what"],
            f"{row['decisions_per_s']:,.0f}",
            f"{row['decisions_per_cpu_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{1e6 * row['wall_s'] / row['slots']:.2f}",
            *("" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    return table


def base_row(results: dict[str, list[Row]], section: str) -> Row | None:
    """The single environment of a section that others are compared with."""
    return next((row for row in results.get(section, []) if "missing" not in row), None)


def large_table(results: dict[str, list[Row]]) -> Table | None:
    """The large plant beside the small one."""
    rows = results.get("large")
    if not rows:
        return None
    table = Table(title=f"{LARGE} beside {SCENARIO}", caption=LARGE_CAPTION, caption_justify="left")
    table.add_column("", no_wrap=True)
    columns = ("decisions/s", "requests/s", "us/slot", "us/request", "ratio", "ns/decision", "ratio", "state")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ratios = {
            rate: best(rows, rate, SCENARIO) / row[rate] for rate in ("requests_per_cpu_s", "decisions_per_cpu_s")
        }
        table.add_row(
            row["what"],
            f"{row['decisions_per_s']:,.0f}",
            f"{row['requests_per_s']:,.0f}",
            f"{1e6 * row['wall_s'] / row['slots']:.2f}",
            f"{1e6 / row['requests_per_cpu_s']:.2f}",
            f"{ratios['requests_per_cpu_s']:.2f}",
            f"{1e9 / row['decisions_per_cpu_s']:.0f}",
            f"{ratios['decisions_per_cpu_s']:.2f}",
            f"{row['state_bytes']:,}",
        )
    return table


def best(rows: list[Row], rate: str, scenario: str | None = None) -> float:
    """The highest rate of the rows (of a scenario)."""
    return max(row[rate] for row in rows if scenario is None or row["scenario"] == scenario)


def aims(results: dict[str, list[Row]]) -> list[Row]:
    """What is aimed at and what was measured. Rates are those of the number of environments with the highest.

    `clock` and `processor` hold figures by time on the clock, on all cores of the machine, and by processor time. A
    rate that is to be reached on all cores is judged by the clock alone.
    """
    found: list[Row] = []

    def add(
        what: str, aim: float, clock: float, processor: float, *, at_most: bool = False, rate: bool = False
    ) -> None:
        measured = {"clock": clock, "processor": processor}
        met: dict[str, bool | None] = {
            name: value <= aim if at_most else value >= aim for name, value in measured.items()
        }
        if rate:
            met["processor"] = None
        found.append({"what": what, "aim": aim, "at_most": at_most, **measured, "met": met})

    # What is observed is more than the others do.
    plain = [row for row in results.get("simulator", []) if "observed" not in row["what"]]
    rates = ("decisions_per_s", "decisions_per_cpu_s")
    if plain:
        add(f"decisions/s, {SCENARIO}", 5e6, *(best(plain, rate) for rate in rates), rate=True)
        for section, name, aim in (("simpy", "SimPy", 100.0), ("numpy", "NumPy, one environment", 30.0)):
            base = base_row(results, section)
            if base is not None:
                add(f"decisions/s over those of {name}", aim, *(best(plain, rate) / base[rate] for rate in rates))
    rows = results.get("large", [])
    for what, unit in (("requests", "request decided"), ("decisions", "agent decision")) if rows else ():
        ratios = [
            best(rows, rate, SCENARIO) / best(rows, rate, LARGE) for rate in (f"{what}_per_s", f"{what}_per_cpu_s")
        ]
        add(f"time per {unit}, {LARGE} over {SCENARIO}", 2.0, *ratios, at_most=True)
    for row in results.get("training", []):
        add("decisions/s in training", 80e3, row["decisions_per_s"], row["decisions_per_cpu_s"], rate=True)
    return found


def aims_table(found: list[Row]) -> Table | None:
    """Aims, with met or not met."""
    if not found:
        return None
    table = Table(title=f"Aims, on {cores()} cores")
    table.add_column("", no_wrap=True)
    for name in ("aim", "by the clock", "", "by processor time", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for entry in found:
        cells: list[str] = []
        for name in ("clock", "processor"):
            cells += [figure(entry[name]), {True: "met", False: "not met", None: ""}[entry["met"][name]]]
        table.add_row(entry["what"], f"{'<=' if entry['at_most'] else '>='} {figure(entry['aim'])}", *cells)
    return table


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def figure(value: float) -> str:
    """A rate without decimals, a ratio with two."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}".rstrip("0").rstrip(".")


def other_table(results: dict[str, list[Row]]) -> Table | None:
    """Compilation and memory."""
    rows = [(f"compile {row['what']}, no cache", f"{row['compile_s']:.1f} s") for row in results.get("training", [])]
    for row in results.get("compile", []):
        # How much a second process saves.
        saved = row["cold_compile_s"] / max(row["cached_compile_s"], 1e-9)
        text = f"{row['cold_compile_s']:.1f} s cold, {row['cached_compile_s']:.1f} s cached ({saved:.1f} times as fast)"
        text += (
            f", tracing {row['cached_trace_s']:.1f} s, {row['cache_files']} files, {row['cache_bytes'] / 1e6:.1f} MB"
        )
        rows.append((f"compile {row['what']}", text))
        rows += [("", f"warning: {line}") for line in row["warnings"]]
    for row in results.get("memory", []):
        parts = ", ".join(f"{name} {size:,}" for name, size in row["parts"].items() if size)
        rows.append((row["what"], f"{row['bytes']:,} bytes ({parts})"))
    rows += [
        (f"peak of section {name}", f"{max(row['peak_bytes'] for row in section) / 1e6:,.0f} MB")
        for name, section in results.items()
    ]
    if not rows:
        return None
    table = Table(title="Compilation and memory", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table
