"""Which features to clamp: statistics over corpora, selection, sweeps, and training an SAE."""
