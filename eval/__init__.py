"""Evaluation of text-to-image models: picture generation over prompt sets, GenEval judging and reports."""
