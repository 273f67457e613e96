"""The built-in recipes, and how to find a recipe by its name."""

from __future__ import annotations

from pathlib import Path

from fedloom.common.errors import UserError, suggest


def recipes_folder() -> Path:
    """Return the folder of the built-in recipes: inside an installed package, next to it in a checkout."""
    packaged = Path(__file__).parent / "builtin"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Return name → file of every built-in recipe, the quickstart first."""
    found = {path.stem: path for path in recipes_folder().glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "quickstart", item[0])))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe's name, its path, or a run's folder. Raises UserError."""
    builtin = builtin_recipes()
    if str(source) in builtin:
        return builtin[str(source)]
    path = Path(source)
    if (path / "recipe.yaml").is_file():  # a run's folder has the recipe of the run
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or "/" in str(source):
        raise UserError(
            f"there is no recipe file {source}: give a YAML file, or a built-in name (see `fedloom recipes`)"
        )
    raise UserError(f"unknown recipe {str(source)!r}: {suggest(str(source), builtin)}")
