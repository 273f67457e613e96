"""More clients cost no more memory: the slope of a run's peak over the number of clients, against the adapter's size."""

from __future__ import annotations

import json

from tests.helpers import tiny


def test_a_further_client_costs_next_to_nothing(cli, recipe_file, tmp_path):
    """Identical batches, a stateless optimiser; the adapter (3 MB) is large enough to be seen a hundred times over."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = tiny.save_model(tmp_path / "model", tiny.causal_lm(spread=0.05, num_key_value_heads=4, **shape))
    row = {"instruction": "copy: cow", "input": "", "output": "cow", "category": "copy"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 200)
    recipe = recipe_file({
        "model.name": str(model), "data.path": str(tmp_path / "rows.jsonl"), "adapter.rank": 32,
        "split.splitter": "uniform", "split.test": 0.0, "split.validation": 0.0, "federation.rounds": 1,
        "train.optimizer": "sgd", "train.steps": 1, "train.batch_size": 1, "evaluation.every": 0,
    })  # fmt: skip
    peaks, adapter = {}, 0
    for clients in (2, 50, 100):
        done = cli("run", recipe, f"split.num_clients={clients}", "--out", f"run-{clients}", "-q")
        assert done.code == 0, done.err
        summary = json.loads((tmp_path / f"run-{clients}" / "summary.json").read_text())
        assert summary["clients"] == clients
        peaks[clients], adapter = summary["cost"]["peak_memory_bytes"], summary["adapter"]["bytes"]
    assert adapter > 2_000_000
    slopes = [(peaks[50] - peaks[2]) / 48 / adapter, (peaks[100] - peaks[50]) / 50 / adapter]
    print(f"each further client costs {slopes[0]:.3f} and {slopes[1]:.3f} of an adapter")
    assert max(slopes) <= 1.1  # what issue 2 allows
    assert (peaks[100] - peaks[2]) / 98 / adapter <= 0.2  # updates are folded as they come, so it is far less
