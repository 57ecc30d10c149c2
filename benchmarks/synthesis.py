"""Adaptation and sampling of `generate` on one core, beside U-Nets of diffusers of the same GFLOP: one table, and JSON.

    python -m benchmarks.synthesis [--quick] [--rounds N] [--core N] [--out FILE]

Ours: the default adaptation to five shots a class of the built-in set (250 updates of 32 windows; compilation, windows
cut from photos and the average of weights are in it), the same again in the process, where nothing is compiled any
more, and 32 x 32 windows drawn in 12 evaluations. Beside it, where the
extra `diffusers` is installed, two UNet2DModel of the same GFLOP in eager PyTorch: the same number of updates of 32
windows by AdamW and of evaluations by DPM-Solver++; their windows are noise that costs nothing. One is built as usual,
the other sees blocks of 2 x 2 pixels as ours does. Each is measured in turn, in a process of its own, on one core.

GFLOP: ours as the compiler counts them, theirs by PyTorch's counter, which counts products alone.
"""

# ruff: noqa: PLC0415 -- a child must be on its core before it imports what it measures.

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

STEPS, WINDOWS, BATCH, SHOTS = 12, 128, 32, 5
OURS = "gmel"
# Each within 2 % of the GFLOP of our network: side, channels in and out, blocks of a level, widths.
THEIRS = {
    "diffusers, 32 x 32": (32, 5, 1, 1, (8, 16)),
    "diffusers, blocks of 2 x 2": (16, 20, 4, 2, (16, 32)),
}
AIMS = {"adaptation_s": 45.0, "images_per_s": 80.0, "ratio": 1.5}


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    began, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - used


def sampled(call: Callable[[], object], repeats: int, images: int) -> Row:
    """Images a second: the median by the clock, the best by processor time; the first, cold call does not count."""
    call()
    times = [clocked(call) for _ in range(repeats)]
    return {
        "images_per_s": images / statistics.median(wall for wall, _ in times),
        "images_per_cpu_s": images / min(cpu for _, cpu in times),
    }


def measure_ours(updates: int, repeats: int) -> Row:
    """Our adaptation from weights as they come, and our sampling."""
    from dataclasses import replace

    import equinox as eqx
    import jax
    import numpy as np

    from gmel.synthesis.data.procedural import procedural_dataset
    from gmel.synthesis.data.splits import few_shot_split
    from gmel.synthesis.diffusion.edm import Denoiser
    from gmel.synthesis.diffusion.examples import Examples
    from gmel.synthesis.diffusion.looks import Looks
    from gmel.synthesis.diffusion.prior import adapted
    from gmel.synthesis.diffusion.samplers import karras_sigmas
    from gmel.synthesis.diffusion.stitching import Field, draw_fields, window_gflop
    from gmel.synthesis.diffusion.unet import UNet
    from gmel.synthesis.generate import SIGMA_HIGH, SIGMA_LOW, Plan

    plan = Plan()
    split = few_shot_split(procedural_dataset(), SHOTS, 0)
    looks = Looks.fit(split.shots, split.good, plan.scale, plan.factorised)
    examples = Examples.of(split.shots, split.good, looks)
    start = Denoiser(UNet(plan.size, 0, jax.random.key(0)))
    training = replace(plan.adaptation, steps=updates)
    found: list[Any] = []

    def adapt() -> None:
        found.append(adapted(start, examples, len(looks.classes), training, 0, _Silent()).model)

    (wall_s, cpu_s), (again_s, again_cpu_s) = clocked(adapt), clocked(adapt)
    denoiser = found[0]
    rng = np.random.default_rng(0)
    empty, full, guide = (
        np.zeros((32, 32), np.float32),
        np.ones((32, 32), np.float32),
        np.zeros((32, 32, 2), np.float32),
    )
    fields = [
        Field(empty, empty, full, rng.standard_normal((32, 32), np.float32), guide, 1 + number % len(looks.classes))
        for number in range(WINDOWS)
    ]
    sigmas = karras_sigmas(STEPS, SIGMA_LOW, SIGMA_HIGH)
    speed = sampled(lambda: draw_fields(denoiser, fields, sigmas, plan.solver), repeats, WINDOWS)
    weights = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(denoiser, eqx.is_array)))
    about = {"gflop": window_gflop(denoiser), "parameters": weights, "version": f"jax {jax.__version__}"}
    times = {
        "adaptation_s": wall_s,
        "adaptation_cpu_s": cpu_s,
        "adaptation_again_s": again_s,
        "adaptation_again_cpu_s": again_cpu_s,
    }
    return {**about, **times, **speed}


class _Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None: ...

    def advance(self, done: float, total: float, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def measure_theirs(name: str, updates: int, repeats: int) -> Row:
    """The same work by a UNet2DModel."""
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    torch.manual_seed(0)
    side, inputs, outputs, layers, widths = THEIRS[name]
    net: Any = diffusers.UNet2DModel(
        sample_size=side,
        in_channels=inputs,
        out_channels=outputs,
        layers_per_block=layers,
        block_out_channels=widths,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=6,
    )
    schedule = diffusers.DDPMScheduler()
    counter = FlopCounterMode(display=False)
    one = torch.ones(1, dtype=torch.long)
    with torch.no_grad(), counter:
        net(torch.zeros(1, inputs, side, side), one, class_labels=one)

    def train() -> None:
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
        given, labels = torch.randn(BATCH, inputs - outputs, side, side), torch.arange(BATCH) % 6
        clean = torch.randn(BATCH, outputs, side, side)
        for _ in range(updates):
            noise, times = torch.randn_like(clean), torch.randint(0, 1000, (BATCH,))
            noisy = torch.cat([schedule.add_noise(clean, noise, times), given], 1)
            loss = torch.nn.functional.mse_loss(net(noisy, times, class_labels=labels).sample, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

    def draw(batch: int) -> None:
        given, labels = torch.zeros(batch, inputs - outputs, side, side), torch.arange(batch) % 6
        with torch.inference_mode():
            for _ in range(WINDOWS // batch):
                solver = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
                solver.set_timesteps(STEPS)
                assert len(solver.timesteps) == STEPS
                x = torch.randn(batch, outputs, side, side)
                for moment in solver.timesteps:
                    predicted = net(torch.cat([x, given], 1), moment, class_labels=labels).sample
                    x = solver.step(predicted, moment, x).prev_sample

    wall_s, cpu_s = clocked(train)
    net.eval()
    # The number of windows at once that it does best.
    speeds = [sampled(lambda batch=batch: draw(batch), repeats, WINDOWS) for batch in (8, 32, 128)]
    speed = max(speeds, key=lambda row: row["images_per_cpu_s"])
    weights = sum(part.numel() for part in net.parameters())
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    about = {"gflop": counter.get_total_flops() / 1e9, "parameters": weights, "version": versions}
    # Nothing is compiled: the first time is like any other.
    times = {f"adaptation_{when}s": wall_s for when in ("", "again_")}
    times |= {f"adaptation_{when}cpu_s": cpu_s for when in ("", "again_")}
    return {**about, **times, **speed}


def child(name: str, core: int, quick: bool) -> Row:
    """Measures one in a fresh process on one core.

    Raises:
        RuntimeError: it failed; its output has been shown.
    """
    command = [sys.executable, "-m", "benchmarks.synthesis", "--part", name, "--core", str(core), *["--quick"] * quick]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # A program that was kept from another run would take the compilation out of the time.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with {done.returncode}: {done.stdout[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def pin(core: int) -> None:
    """Leaves one core to this process, as `taskset` does, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def summary(rounds: list[Row]) -> Row:
    """Of several rounds: medians by the clock, the best by processor time."""
    first = rounds[0]
    return {
        **{key: first[key] for key in ("gflop", "parameters", "version")},
        **{key: statistics.median(row[key] for row in rounds) for key in ("adaptation_s", "adaptation_again_s")},
        **{key: min(row[key] for row in rounds) for key in ("adaptation_cpu_s", "adaptation_again_cpu_s")},
        "images_per_s": statistics.median(row["images_per_s"] for row in rounds),
        "images_per_cpu_s": max(row["images_per_cpu_s"] for row in rounds),
    }


def ratios(ours: Row, theirs: Row) -> Row:
    """How many times ours is faster, by the clock and by processor time."""
    return {
        "adaptation": theirs["adaptation_s"] / ours["adaptation_s"],
        "adaptation_cpu": theirs["adaptation_cpu_s"] / ours["adaptation_cpu_s"],
        "adaptation_again_cpu": theirs["adaptation_again_cpu_s"] / ours["adaptation_again_cpu_s"],
        "sampling": ours["images_per_s"] / theirs["images_per_s"],
        "sampling_cpu": ours["images_per_cpu_s"] / theirs["images_per_cpu_s"],
    }


def table(rows: dict[str, Row], updates: int) -> Table:
    """All side by side; ratios say how many times ours is faster, by processor time."""
    made = Table(
        title=f"One core: {updates} updates of {BATCH} windows of 32 x 32, then {STEPS} evaluations a window",
        caption=f"Aims: adaptation at most {AIMS['adaptation_s']:.0f} s, at least {AIMS['images_per_s']:.0f} images/s, "
        f"{AIMS['ratio']} times as fast as diffusers. ours x: how many times ours is faster, by processor time; "
        "again: without the compilation.",
        caption_justify="left",
    )
    made.add_column("", no_wrap=True)
    for name in (
        "GFLOP",
        "weights",
        "adapt s",
        "CPU s",
        "ours x",
        "again CPU s",
        "ours x",
        "images/s",
        "per CPU s",
        "ours x",
    ):
        made.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        found = ratios(rows[OURS], row)
        made.add_row(
            name,
            f"{row['gflop']:.4f}",
            f"{row['parameters']:,}",
            f"{row['adaptation_s']:.1f}",
            f"{row['adaptation_cpu_s']:.1f}",
            f"{found['adaptation_cpu']:.2f}",
            f"{row['adaptation_again_cpu_s']:.1f}",
            f"{found['adaptation_again_cpu']:.2f}",
            f"{row['images_per_s']:.1f}",
            f"{row['images_per_cpu_s']:.1f}",
            f"{found['sampling_cpu']:.2f}",
        )
    return made


def main() -> int:
    """Measures in turn, prints the table and writes it."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthesis", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the updates, one round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each of them measures all in turn (default: 3)")
    parser.add_argument("--core", type=int, help="number of the core (default: the last)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default: runs/benchmarks/<time>.json)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    updates, repeats = (25, 2) if options.quick else (250, 5)
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    core = usable[-1] if options.core is None else options.core
    if core not in usable or options.rounds < 1:
        parser.error(f"--core must be one of {usable}, --rounds 1 or more")
    if options.part:
        pin(core)
        ours = options.part == OURS
        found = measure_ours(updates, repeats) if ours else measure_theirs(options.part, updates, repeats)
        print(json.dumps(found))
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=140)
    there = all(find_spec(name) is not None for name in ("torch", "diffusers"))
    rounds: dict[str, list[Row]] = {OURS: [], **({name: [] for name in THEIRS} if there else {})}
    before = os.getloadavg()[0]
    for _ in range(1 if options.quick else options.rounds):
        for name, rows in rounds.items():
            try:
                rows.append(child(name, core, options.quick))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
    after = os.getloadavg()[0]
    summaries = {name: summary(rows) for name, rows in rounds.items()}
    console.print(table(summaries, updates))
    if not there:
        console.print("diffusers: not installed (extra `diffusers`)")
    console.print(
        f"load average {before:.1f} before, {after:.1f} after; with neighbours on the core, wall times are late"
    )
    content = {
        "schema": 1,
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_average": {"before": before, "after": after},
        "updates": updates,
        "steps": STEPS,
        "aims": AIMS,
        "rows": summaries,
        "ratios": {name: ratios(summaries[OURS], row) for name, row in summaries.items() if name != OURS},
        "rounds": rounds,
    }
    out: Path = options.out or Path("runs") / "benchmarks" / f"{datetime.now():%Y-%m-%d-%H%M%S}-synthesis.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(out)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
