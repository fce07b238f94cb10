"""Neighboring autoregressive text-to-image models: training, sampling, export and command line."""
