from __future__ import annotations

from fedloom.testing import tiny


def test_rows_follow_from_the_seed_and_categories_differ_in_size():
    made = tiny.rows(60)
    assert made == tiny.rows(60)
    assert made != tiny.rows(60, seed=1)
    assert {c: sum(r["category"] == c for r in made) for c in ("copy", "last", "upper")} == {
        "copy": 10,
        "last": 20,
        "upper": 30,
    }
    assert all(r["output"] for r in made)


def test_the_recipe_runs_on_this_machine_alone_and_takes_other_keys(tmp_path):
    recipe = tiny.recipe(tmp_path, {"train.lr": 0.5})
    assert recipe.train.lr == 0.5
    assert recipe.model.name.startswith(str(tmp_path))
    assert (tmp_path / "rows.jsonl").is_file()
