"""Ways to reach edge servers, behind one interface (`engine.py`)."""
