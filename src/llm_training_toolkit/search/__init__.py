"""A search for good hyperparameters: its space, its rungs, what its trials have shown. Knows no Ray and no torch."""
