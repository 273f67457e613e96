"""A suite of one task that a tiny model can pass, for runs whose answers are scored."""

SCORED = {"evaluation.suite": "right-length", "evaluation.limit": 6, "evaluation.answers": 2, "train.lr": 3e-2}

#: A suite that a random model gets right now and then, so that scores are not all zero.
SUITE = """
from fedloom.common import registry
from fedloom.evaluation.suites import Suite
right = lambda example, answer: len(answer) % 3 == len(example.output) % 3
registry.suites.register("right-length", Suite("right-length", "generate", 8, right, "for a test"))
"""
