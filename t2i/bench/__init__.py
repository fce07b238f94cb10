"""Benchmarks of decoding and of the training step, against the published way of computing and a floor."""
