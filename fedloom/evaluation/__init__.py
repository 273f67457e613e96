"""Evaluation: what is measured of a model, and whether an answer is right."""
