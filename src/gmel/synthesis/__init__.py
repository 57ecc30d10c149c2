"""Few-shot synthesis: photos of rare defects, generators that learn from a handful of them, and what they are worth."""
