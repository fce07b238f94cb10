"""What can be known before a long run: a probe on all ranks, started as training is, and a table of what it found."""
