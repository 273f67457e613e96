"""What tests share. Import it by its full name: `from tests.helpers import tiny`."""

from pathlib import Path

#: The checkout: docs, recipes, benchmarks and the package lie here.
ROOT = Path(__file__).parents[2]
