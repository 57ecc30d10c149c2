"""Rows of sites around class means, for tests of federated training."""

from collections.abc import Sequence

import numpy as np

from gmel.federation.training import SiteRows
from gmel.synthesis.photo import GOOD


def site_rows(labels: dict[str, Sequence[str]], each: int = 12, wide: int = 6, apart: float = 1.5) -> list[SiteRows]:
    """Weights as agreed: the rows of a class weigh one together over all sites."""
    random = np.random.default_rng(3)
    names = sorted({label for own in labels.values() for label in own})
    spots = apart * random.standard_normal((len(names), wide))
    # Centred, as standardised features are: gradient steps converge slowly otherwise.
    means = dict(zip(names, spots - spots.mean(axis=0), strict=True))
    owners = {name: sum(name in own for own in labels.values()) for name in names}
    return [
        SiteRows(
            site,
            np.concatenate([means[n] + random.standard_normal((each, wide)) for n in own]).astype(np.float32),
            np.repeat(np.asarray(own, np.str_), each),
            np.concatenate([np.full(each, 1.0 / (each * owners[n])) for n in own]),
        )
        for site, own in labels.items()
    ]


SITES = site_rows({"east": ["a", "b"], "north": ["c", "d"], "west": [GOOD, "e"]})
