"""Live: a gateway that loses nothing, edge servers that generate, and the same decision as in the simulator."""
