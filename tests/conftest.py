"""What all tests share.

Array shapes and types are checked at run time: a wrong annotation, or an array that breaks one, fails its test.
Compiled programs are kept between tests, workers and runs: compilation is most of the time.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# No test fails because the machine is busy.
settings.register_profile("gmel", deadline=None)
settings.load_profile("gmel")

# Before JAX is imported. Commands that tests start inherit it, unless they set their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Programs here run for moments: XLA takes half as long without its optimisations and its fusions by MLIR. The slow
# tests run what users run (make test-slow).
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

# Shells have what they start in the background ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers share the cores; threads of BLAS beside them spend their time waiting for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Before the first import of the package. The schema and the command line hold no arrays.
install_import_hook(
    [
        "gmel.physics",
        "gmel.simulator",
        "gmel.policies",
        # Not all of the room: beartype cannot read the generic named tuple of the replay.
        "gmel.learning.networks",
        "gmel.learning.rollout",
        "gmel.learning.clipped",
        "gmel.learning.amarl",
    ],
    "beartype.beartype",
)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops the compiled programs of a module where a process holds many: each takes a few memory maps, of which Linux
    allows a process 65,530; beyond them it dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
