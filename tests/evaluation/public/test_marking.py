"""Marks of single answers against what can be counted by hand, and pass@k against every draw there is."""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations

import pytest

from fedloom.evaluation.public import datasets as benchmarks
from fedloom.evaluation.public import documents as asked
from fedloom.evaluation.public import readers
from fedloom.evaluation.public.marking import exact_match, f1, last_number, pass_at_k, rouge, stated_number
from fedloom.evaluation.sandbox.languages import trim_answer


def test_pass_at_k_is_the_mean_over_all_draws():
    for samples in range(1, 8):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                draws = list(combinations([True] * passed + [False] * (samples - passed), k))
                assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at_k(2, 1, 3)


def test_numbers_of_answers():
    assert stated_number("so #### 1,234.\nQuestion: more\n#### 7") == Decimal("1234")
    assert stated_number("#### $-5") is None and stated_number("#### -$5") == Decimal(-5)
    assert stated_number("the answer is 5") is None
    assert last_number("3 + 4 = 7, so it is $7.50.") == Decimal("7.50")
    assert last_number("8-3") == Decimal(3)
    assert last_number("none") is None
    doc = {"target": "2 + 2 = 4\n#### 4"}
    assert asked.mark_gsm8k(doc, ["it is 4.0"]) == {"strict": 0.0, "flexible": 1.0}
    assert asked.mark_gsm8k(doc, ["#### 4\n\n#### 9"]) == {"strict": 1.0, "flexible": 0.0}


def test_words_in_common():
    assert exact_match("The Beatles!", ["beatles", "x"]) == 1.0
    assert exact_match("Beatle", ["beatles"]) == 0.0
    assert f1("a red big house", ["the red house"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1("red red", ["red blue"]) == pytest.approx(0.5)  # a word counts as often as both have it
    assert f1("", ["red"]) == 0.0 and f1("no", ["yes", "no"]) == 1.0


def test_rouge_is_that_of_the_library():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2"], use_stemmer=False)
    pairs = [
        ("The cat sat on the mat.", "A cat sat on a mat"),
        ("one", "one two"),
        ("", "x y"),
        ("a b a b c", "a b c a-b"),
    ]
    for said, right in pairs:
        expected = scorer.score(right, said)
        assert rouge(said, right, 1) == pytest.approx(expected["rouge1"].fmeasure)
        assert rouge(said, right, 2) == pytest.approx(expected["rouge2"].fmeasure)


def test_rows_of_the_hub_and_of_the_carrier_are_the_same_question():
    pairs = [
        (
            readers.options_in_full,
            {
                "question_stem": "Fog?",
                "choices": {"label": ["A", "B"], "text": ["a marsh", "a desert"]},
                "answerKey": "B",
            },
            {"question": "Fog? ", "options": "\nA. a marsh\nB. a desert", "answer": "B. a desert"},
        ),
        (
            readers.boolq,
            {"question": "is it so", "passage": "It is.", "answer": True},
            {"question": "is it so", "passage": "It is.", "answer": "True", "title": "x"},
        ),
        (readers.imdb, {"text": "fine", "label": 1}, {"text": "fine", "label": "1"}),
        (readers.nq_open, {"question": "who", "answer": ["he"]}, {"question": "who?", "answer": ["he"]}),
        (readers.truthfulqa, {"question": "Q", "correct_answers": ["a", "b"]}, {"question": "Q", "answer": ["a", "b"]}),
        (
            readers.options_by_letter,
            {"question": "Q", "choices": ["x", "y"], "answer": 1},
            {"question": "Q", "options": "A. x\nB. y", "answer": "B. y"},
        ),
    ]
    for read, hub, carrier in pairs:
        (one,), (other,) = read(hub), read(carrier)
        assert one == other, read
        assert not one.choices or one.output in one.choices
    med = {"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "subject_name": "Anatomy"}
    (question,) = readers.options_in_full(med)
    assert (question.output, question.category) == ("C. y", "Anatomy")
    assert not list(readers.hellaswag({"ctx": "c", "endings": ["a"], "label": ""}))  # a hidden answer is no question


def test_answers_of_a_dialogue_keep_their_commas():
    passage = "In May, she left him, a composer, and went home."
    row = {
        "passage": passage,
        "question": "question1: what?\nquestion2: who?\nquestion3: why?",
        "answer": "possible answers for question1:\nshe left him, she left him, a composer, she left him,\n"
        "possible answers for question2:\na composer,\npossible answers for question3:\nCANNOTANSWER,",
    }
    first, second, third = readers.quac(row)
    assert first.reference == {"answers": ["she left him", "she left him, a composer"]}
    assert second.input.endswith("Question: what?\nAnswer: she left him\nQuestion: who?")
    assert third.output == "CANNOTANSWER"


def test_questions_take_turns_and_examples_are_not_among_them(tmp_path, monkeypatch):
    import io
    import tarfile

    path = tmp_path / "mmlu" / "mmlu_small.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for part, count in (("dev", 3), ("test", 2)):
            for subject in ("art", "law"):
                text = "question,c0,c1,c2,c3,answer\n" + "".join(
                    f"{subject} {part} {i},w,x,y,z,{i}\n" for i in range(count)
                )
                info = tarfile.TarInfo(f"mmlu/{part}/{subject}_{part}.csv")
                info.size = len(text)
                archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    found = benchmarks.find("mmlu")
    assert [q.category for q in found.asked] == ["art", "law", "art", "law"]
    shots = found.shots(found.asked[1], 2)
    assert [s.input.split("\n")[0] for s in shots] == ["law dev 0", "law dev 1"]
    assert shots[1].output == "B"
    assert not set(found.asked) & set(found.shown)


@pytest.mark.parametrize(
    ("language", "prompt", "answer", "kept"),
    [
        ("JavaScript", "const f = (x) => {\n", "  if (x) { return '}' }\n  return 1;\n}\nf(2)", "  if (x) { return '}' }\n  return 1;\n}\n"),
        ("CPP", "int f(){\n", "  // }\n  return 1;\n}\nint g(){}", "  // }\n  return 1;\n}\n"),
        ("Java", "class S {\n  int f() {\n", "    return 1;\n  }\n  int g() {}\n}", "    return 1;\n  }\n}\n"),
        ("Go", "func f() int {\n", "    return 1\n", "    return 1\n"),
        ("Python", "def f():\n", "    return {}\n", "    return {}\n"),
    ],
)  # fmt: skip
def test_what_follows_the_function_is_left_out(language, prompt, answer, kept):
    assert trim_answer({"task_id": f"{language}/0", "prompt": prompt}, answer) == kept


def test_no_accepted_answer_is_never_met():
    assert f1("anything", []) == 0.0
    assert f1("", []) == 0.0
    assert exact_match("anything", []) == 0.0
    assert f1("", [""]) == 1.0
    assert f1("the a an", ["?!"]) == 1.0  # nothing is left of either
    assert f1("owl", [""]) == f1("", ["owl"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "n", "expected"),
    [
        ("the cat sat", "the cat", 1, 2 * 2 / 5),
        ("the cat sat", "the cat", 2, 2 * 1 / 3),
        ("The CAT, sat!", "the cat sat", 2, 1.0),
        ("a a b", "a c", 1, 2 * 1 / 5),  # a word counts as often as both have it
        ("the cat", "cat the", 2, 0.0),
        ("cat", "cat", 2, 0.0),  # too short for any pair
        ("", "", 1, 0.0),
        ("don't", "don t", 1, 1.0),
    ],
)
def test_rouge_by_hand(answer, reference, n, expected):
    """Without the library, which is not installed everywhere."""
    assert rouge(answer, reference, n) == pytest.approx(expected)
    assert rouge(reference, answer, n) == pytest.approx(expected)


def test_pass_at_k_by_hand():
    assert [pass_at_k(5, passed, 1) for passed in (0, 2, 5)] == pytest.approx([0.0, 0.4, 1.0])
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 2, 4) == pass_at_k(5, 5, 5) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match=r"pass@6 of 5 samples"):
        pass_at_k(5, 5, 6)
