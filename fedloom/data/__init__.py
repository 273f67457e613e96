"""Data: where a corpus comes from, how it is split among clients, and how it is written for a model."""
