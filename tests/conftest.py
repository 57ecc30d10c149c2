"""Array shapes and types are checked at run time: a wrong annotation, or an array that breaks one, fails its test."""

from jaxtyping import install_import_hook

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
