"""Which features to clamp: statistics over corpora, selection, sweeps."""
