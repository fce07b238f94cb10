"""GenEval (arXiv 2310.11513) by its published rules: prompts, detectors, scoring, statistics and report."""
