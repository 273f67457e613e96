"""Which examples are in which step, over all rounds; and where labels lie in a batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.tokenization import TokenSequence

EXAMPLES = tuple(range(100, 113))  # 13 indices that are not 0…12


def flat(plan: Plan, round: int, seed: int = 0, client: str = "c", examples=EXAMPLES) -> list[int]:
    return [i for step in round_indices(examples, plan, round, seed, client) for passes in step for i in passes]


# ------------------------------------------------------------------ rounds


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_cover_every_example_once_a_pass(epochs):
    plan = Plan(4, accumulation=2, epochs=epochs)
    for round in (1, 2, 5):
        seen = flat(plan, round)
        passes = [seen[i * 13 : (i + 1) * 13] for i in range(epochs)]
        assert len(seen) == 13 * epochs
        assert all(sorted(p) == list(EXAMPLES) for p in passes)
    steps = list(round_indices(EXAMPLES, plan, 1, 0, "c"))
    assert len(steps) == plan.steps_per_round(13) == 2 * epochs
    assert [[len(p) for p in step] for step in steps[:2]] == [[4, 4], [4, 1]]  # the end of a pass is smaller


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 17), st.integers(0, 3))
def test_steps_read_one_stream_of_whole_passes_through_all_rounds(size, accumulation, steps, count, seed):
    """Rounds joined together are passes over the data, one after another: no gap, no overlap, no repeat in a pass."""
    plan, examples = Plan(size, accumulation, steps=steps), range(count)
    stream = [i for round in range(1, 6) for i in flat(plan, round, seed, examples=examples)]
    assert len(stream) == 5 * steps * size * accumulation
    for start in range(0, len(stream), count):
        part = stream[start : start + count]
        assert len(set(part)) == len(part)
        if len(part) == count:
            assert sorted(part) == list(examples)


def test_a_round_needs_nothing_of_the_rounds_before_it():
    plan = Plan(3, 2, steps=2)
    in_order = [flat(plan, r) for r in (1, 2, 3)]
    assert [flat(plan, r) for r in (3, 1, 2)] == [in_order[2], in_order[0], in_order[1]]


def test_every_step_has_its_passes_and_every_pass_its_examples():
    steps = list(round_indices(EXAMPLES, Plan(3, 2, steps=4), 7, 0, "c"))
    assert [[len(p) for p in step] for step in steps] == [[3, 3]] * 4


def test_a_client_smaller_than_a_batch_repeats_its_examples():
    (step,) = round_indices((7, 8), Plan(5, steps=1), 1, 0, "c")
    assert Counter(step[0]) in (Counter({7: 3, 8: 2}), Counter({7: 2, 8: 3}))


def test_accumulation_only_cuts_the_same_examples_into_passes():
    whole = list(round_indices(EXAMPLES, Plan(8, 1, steps=3), 2, 0, "c"))
    parts = list(round_indices(EXAMPLES, Plan(4, 2, steps=3), 2, 0, "c"))
    assert [step[0] for step in whole] == [step[0] + step[1] for step in parts]


def test_the_order_depends_on_seed_client_and_pass():
    plan = Plan(13, epochs=1)
    start = flat(plan, 1)
    assert flat(plan, 1) == start
    assert flat(plan, 2) != start
    assert flat(plan, 1, seed=1) != start
    assert flat(plan, 1, client="d") != start
    assert start != sorted(start)


def test_the_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    before, plan = (torch.get_rng_state(), np.random.get_state()[1].copy()), Plan(3, steps=2)
    one = flat(plan, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    np.random.seed(2)
    assert flat(plan, 1) == one


# ------------------------------------------------------------------ batches


def sequence(length: int, prompt: int, start: int = 10) -> TokenSequence:
    return TokenSequence(np.arange(start, start + length, dtype=np.int32), prompt)


SEQUENCES = [sequence(5, 3), sequence(2, 1, 40), sequence(4, 0, 60)]


def test_a_packed_batch_by_hand():
    batch = collate(SEQUENCES, packed=True, pad=0, examples=(7, 8, 9))
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 40, 41, 60, 61, 62, 63]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]
    assert batch.lengths == (5, 2, 4)
    assert batch.mask is None
    assert batch.packed
    assert batch.labels.tolist() == [13, 14, 41, 61, 62, 63]
    assert batch.where.tolist() == [2, 3, 5, 7, 8, 9]
    assert batch.owners.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.tokens == 11
    assert batch.examples == (7, 8, 9)


def test_a_padded_batch_by_hand():
    batch = collate(SEQUENCES, packed=False, pad=2)
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14], [40, 41, 2, 2, 2], [60, 61, 62, 63, 2]]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.where.tolist() == [2, 3, 5, 10, 11, 12]
    assert batch.labels.tolist() == [13, 14, 41, 61, 62, 63]
    assert batch.tokens == 11
    assert not batch.packed


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6))
def test_a_label_is_the_token_after_its_place_and_never_a_first_one(shapes):
    sequences = [sequence(n, prompt, 100 * k) for k, (n, prompt) in enumerate(shapes)]
    supervised = [t for s in sequences for t in s.ids[max(1, s.prompt) :].tolist()]
    firsts = {int(s.ids[0]) for s in sequences}
    for packed in (True, False):
        batch = collate(sequences, packed=packed, pad=-1)
        assert batch.labels.tolist() == supervised
        assert not firsts & set(batch.labels.tolist())
        ids = batch.ids.flatten()
        assert (ids[batch.where] + 1).tolist() == supervised  # ids count upwards within a sequence
        assert [int(i) // 100 for i in batch.labels] == batch.owners.tolist()


def test_what_was_pad_is_never_a_label():
    batch = collate([sequence(9, 2), sequence(3, 1, 50)], packed=False, pad=77)
    assert 77 not in batch.labels.tolist()
    assert 77 in batch.ids.flatten().tolist()


def test_moving_a_batch_keeps_everything():
    batch = collate(SEQUENCES, packed=False, pad=2, examples=(1, 2, 3))
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.ids, moved.mask, moved.where, moved.labels, moved.owners)} == {"meta"}
    assert (moved.lengths, moved.examples) == (batch.lengths, batch.examples)
    packed = collate(SEQUENCES, packed=True, pad=2).to("meta")
    assert packed.positions.device.type == "meta"
    assert (packed.mask, moved.positions) == (None, None)


def test_a_plan_takes_one_batch_a_step_unless_it_says_otherwise():
    assert Plan(4, steps=3) == Plan(4, 1, 3, None)
    assert [Plan(4, epochs=2).steps_per_round(n) for n in (1, 4, 5, 8, 9)] == [2, 2, 4, 4, 6]
    assert [Plan(4, 2, epochs=1).steps_per_round(n) for n in (1, 8, 9)] == [1, 1, 2]
    assert Plan(4, 2, steps=7).steps_per_round(1) == 7
