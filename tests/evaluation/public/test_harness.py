"""lm-eval with the live model: the numbers of its own command line, of the merged model, and of fedloom's own scoring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'fedloom[evaluation]'")

from lm_eval.api.instance import Instance

from fedloom.common.errors import UserError
from fedloom.common.logs import heard_by
from fedloom.data.corpus import Example
from fedloom.data.prompts import Template
from fedloom.evaluation import score as scoring
from fedloom.evaluation.public import harness
from fedloom.evaluation.public.suites import TASKS, TaskMetric, TaskSuite
from fedloom.evaluation.sandbox.bubblewrap import Bubblewrap
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.saved import export_merged
from fedloom.recipe.adapter import AdapterConfig
from fedloom.recipe.recipe import ModelConfig

WORDS = ("red", "green", "blue", "white")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
sandbox_works = not Bubblewrap().trouble()


def program(number: int, body: str, result: int) -> dict[str, str]:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def f{number}(x):\n",
        "canonical_solution": f"    return {body}\n",
        "test": f"def check(f):\n    assert f(3) == {result}\n",
        "entry_point": f"f{number}",
    }


PROGRAMS = [program(0, "x + 1", 4), program(1, "x * x", 9), program(2, "-x", -3)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FEDLOOM_DATA with a few questions of three benchmarks, made here."""
    folder = tmp_path_factory.mktemp("data")
    for part, first in (("train", 10), ("test", 0)):
        rows = [
            {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
            for i in range(first, first + 5)
        ]
        write(folder / "gsm8k" / f"{part}.jsonl", rows)
    options = "\n".join(f"{'ABCD'[i]}. {word}" for i, word in enumerate(WORDS))
    rows = [
        {"question": f"Colour {i}?", "options": options, "answer": f"{'ABCD'[i % 4]}. {WORDS[i % 4]}"}
        for i in range(12)
    ]
    write(folder / "openbookqa" / "test.jsonl", rows)
    write(folder / "humaneval" / "test.jsonl", PROGRAMS)
    return folder


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> TaskSuite:
    """Our own task files, with short answers: what a package's own folder of tasks looks like."""
    folder = tmp_path_factory.mktemp("tasks")
    tasks = {"gsm8k": TaskMetric("strict", 2), "openbookqa": TaskMetric("acc", 2)}
    if sandbox_works:
        tasks["humaneval"] = TaskMetric("pass@1", 2)  # one command line: nothing lies there that could be shown
    for name in tasks:
        text = f"include: {TASKS / f'{name}.yaml'}\ntask: {name}\n"
        if name != "openbookqa":
            text += 'generation_kwargs: {until: ["### Instruction:"], max_gen_toks: 16, do_sample: false}\n'
        (folder / f"{name}.yaml").write_text(text)
    return TaskSuite("short", "a test's", tasks, folder=folder)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base"), tiny.causal_lm(max_position_embeddings=2048))


def adapted(folder: Path, config: AdapterConfig | None = None, *, trained: bool) -> AdaptedModel:
    model = Models(ModelConfig(name=str(folder)), config or AdapterConfig(), 0).adapted()
    if trained:
        noise = torch.randn(model.adapter.flat.shape, generator=torch.Generator().manual_seed(1))
        model.adapter.flat.data.add_(0.3 * noise)
    return model


@pytest.fixture(scope="session")
def merged_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merged")
    adapted(base_folder, trained=True).save(place / "adapter", str(base_folder))
    export_merged(ModelConfig(name=str(base_folder)), place / "adapter", place / "model")
    return place / "model"


@pytest.fixture(scope="session")
def command_line(
    base_folder: Path,
    merged_folder: Path,
    suite: TaskSuite,
    benchmark_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """{model: {task: (numbers, what the model said)}} of lm-eval's command line, all in one process."""
    place = tmp_path_factory.mktemp("command-line")
    template = Template.choose(tiny.tokenizer(), "auto")
    lines = []
    for name, folder in (("base", base_folder), ("merged", merged_folder)):
        for number, line in enumerate(harness.command(str(folder), suite, template, 4, None)):
            lines.append(
                [*line[2:], "--output_path", str(place / name / str(number)), "--log_samples", "--device", "cpu"]
            )
    text = "import json, sys\nfrom lm_eval.__main__ import cli_evaluate\nfrom lm_eval import evaluator\n"
    text += "evaluator.add_env_info = lambda results: None\n"  # seconds of asking pip and compilers, no number
    text += "from lm_eval.tasks import TaskManager\n"
    text += "TaskManager.__init__.__defaults__ = (None, None, False, None)\n"  # not thousands of its own task files
    text += "for line in json.loads(sys.argv[1]):\n    sys.argv[1:] = line\n    cli_evaluate()\n"
    environment = {**os.environ, "FEDLOOM_DATA": str(benchmark_data), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", text, json.dumps(lines)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, dict[str, Any]] = {}
    for name in ("base", "merged"):
        for results in (place / name).rglob("results_*.json"):
            for task, numbers in json.loads(results.read_text())["results"].items():
                (samples,) = results.parent.glob(f"samples_{task}_*.jsonl")
                rows = [json.loads(line) for line in samples.read_text().splitlines()]
                found.setdefault(name, {})[task] = numbers, said(sorted(rows, key=lambda row: row["doc_id"]))
    return found


def said(samples: list[dict[str, Any]]) -> list[Any]:
    """What the model said to each question: log-likelihoods and greedy marks, texts, or whether programs passed."""
    return [plain(row["filtered_resps"]) for row in samples]


def plain(value: Any) -> Any:
    """Lists of text: lm-eval's log writes numbers so, every digit of them."""
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else str(value)


def ours(
    model: AdaptedModel, suite: TaskSuite, data: Path, patch: pytest.MonkeyPatch, **how: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what `harness.score` returns, {task: what the model said})."""
    seen: dict[str, Any] = {}
    real = harness.evaluate

    def watched(**kwargs: Any) -> Any:
        found = real(**kwargs)
        seen.update({task: said(rows) for task, rows in found["samples"].items()})
        return found

    patch.setenv("FEDLOOM_DATA", str(data))
    patch.setattr(harness, "evaluate", watched)
    template = Template.choose(model.tokenizer, "auto")
    options = {"batch_size": 4, "limit": None, "shots": None, "allow_unsafe": False}
    return harness.score(model, suite, template, **{**options, **how}), seen


def close(mine: list[Any], theirs: list[Any]) -> bool:
    """Likelihoods within rounding, everything else equal."""
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            same = (
                x[1] == y[1] and abs(float(x[0]) - float(y[0])) < 1e-3
                if isinstance(x, list) and len(x) == 2
                else x == y
            )
            if not same:
                return False
    return True


def test_our_numbers_are_those_of_lm_evals_own_command_line(
    base_folder, suite, benchmark_data, command_line, monkeypatch
):
    """A choice, a text and a program; not only the score: all that the model said."""
    measured, texts = ours(adapted(base_folder, trained=False), suite, benchmark_data, monkeypatch)
    assert set(texts) == set(suite.tasks)
    for task, values in measured["tasks"].items():
        numbers, theirs = command_line["base"][task]
        assert texts[task] == theirs
        expected = {k.partition(",")[0]: v for k, v in numbers.items() if "," in k and "stderr" not in k}
        assert values["metrics"] == expected
        assert values["questions"] == len(theirs)
    assert len({str(answer) for answer in texts["gsm8k"]}) > 1  # an oracle that could fail


def test_the_adapter_is_on_and_says_what_the_merged_model_says(
    base_folder, suite, benchmark_data, command_line, monkeypatch
):
    _, on = ours(adapted(base_folder, trained=True), suite, benchmark_data, monkeypatch)
    for task, (_, theirs) in command_line["merged"].items():
        assert close(on[task], theirs), task
    assert not close(on["openbookqa"], command_line["base"]["openbookqa"][1])
    assert on["gsm8k"] != command_line["base"]["gsm8k"][1]


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_stand_in_front(base_folder, method):
    """fedloom's own generation and likelihoods of one row at a time, which peft's forward was the oracle for."""
    config = AdapterConfig(method=method, virtual_tokens=4)
    model = adapted(base_folder, config, trained=True)
    template = Template.choose(model.tokenizer, "alpaca")
    questions = [Example(f"Say {'x' * (3 * i)}", "", "yes", choices=("yes", "no")) for i in range(3)]
    lm = harness.LiveModel(model, 3, None)
    assert lm.max_length == 2048 - 4
    how = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (template.prompt_text(q), dict(how)), i) for i, q in enumerate(questions)]
    texts = [text.strip() for text in lm.generate_until(asked, disable_tqdm=True)]
    expected = scoring.generate(model, template, questions, batch_size=1, max_length=256, max_new_tokens=12)
    assert texts == expected == [greedy(lm, template.prompt_ids(q), 12) for q in questions]
    assert all(texts)
    pairs = [(template.prompt_text(q), text) for q in questions for text in ("yes", "no")]
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    picked = ["yes" if found[2 * i][0] > found[2 * i + 1][0] else "no" for i in range(len(questions))]
    without_end = [likelihood(model, template, q, text) for q in questions for text in ("yes", "no")]
    assert [value for value, _ in found] == pytest.approx(without_end, abs=1e-3)
    assert set(picked) <= {"yes", "no"}


def greedy(lm: harness.LiveModel, ids: list[int], count: int) -> str:
    """The likeliest token, again and again, each time from the whole sequence anew."""
    answer: list[int] = []
    for _ in range(count):
        answer.append(int(lm._model_call(torch.tensor([ids + answer]))[0, -1].argmax()))
        if answer[-1] == lm.tokenizer.eos_token_id:
            break
    return str(lm.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def likelihood(model: AdaptedModel, template: Template, question: Example, answer: str) -> float:
    """log p(the prompt's last line break and the answer), which is what lm-eval scores, by fedloom's packed forward."""
    from fedloom.data.tokenization import TokenSequence
    from fedloom.models.forward import batch_by_length, token_losses

    ids = template.prompt_ids(question) + template.answer_ids(answer)[:-1]
    sequence = TokenSequence(torch.tensor(ids, dtype=torch.int32).numpy(), len(template.prompt_ids(question)) - 1)
    (batch,) = batch_by_length([sequence], 1, packed=True, pad=0, examples=[0])
    with torch.no_grad():
        return -float(token_losses(model, batch).sum())


@pytest.mark.parametrize("style", ["alpaca", "plain", "chat"])
def test_lm_eval_reads_prompts_as_the_tokens_that_training_saw(base_folder, style):
    model = adapted(base_folder, trained=False)
    model.tokenizer.chat_template = CHAT
    template = Template.choose(model.tokenizer, style)
    lm = harness.LiveModel(model, 1, False if style == "chat" else None)
    question, answer = Example("Which?", "A. red\nB. blue", "A. red"), "A. red"
    context, rest = lm._encode_pair(template.prompt_text(question), answer)
    assert context + rest == template.prompt_ids(question) + template.answer_ids(answer)[:-1]
    ids, _ = lm.tok_batch_encode([template.prompt_text(question)])
    assert ids[0].tolist() == template.prompt_ids(question)
    harness._check_prompts(lm, template)
    with pytest.raises(UserError, match="into other tokens than training did"):
        harness._check_prompts(
            harness.LiveModel(model, 1, style == "chat"), Template(model.tokenizer, style)
        ) if style == ("chat") else harness._check_prompts(harness.LiveModel(model, 1, False), template)


def test_limit_shots_and_what_is_not_there(base_folder, benchmark_data, monkeypatch):
    from fedloom.common import registry

    model = adapted(base_folder, trained=False)
    few = TaskSuite(
        "few", "a test's", {"openbookqa": TaskMetric("acc"), "hellaswag": TaskMetric("acc_norm")}, partial=True
    )
    notes: list[str] = []
    with heard_by(notes.append):
        measured, texts = ours(model, few, benchmark_data, monkeypatch, limit=3)
    assert (len(texts["openbookqa"]), measured["tasks"]["openbookqa"]["questions"]) == (3, 3)
    assert not measured["complete"] and list(measured["left_out"]) == ["hellaswag"]
    assert measured["score"] == measured["tasks"]["openbookqa"]["score"]
    assert "no source of hellaswag was found" in measured["left_out"]["hellaswag"]
    with pytest.raises(UserError, match=r"no source of hellaswag was found .*FEDLOOM_DATA"):
        ours(model, TaskSuite("one", "", {"hellaswag": TaskMetric("acc_norm")}), benchmark_data, monkeypatch)
    with pytest.raises(UserError, match="has no file of it"):
        ours(model, TaskSuite("one", "", {"helaswag": TaskMetric("acc")}), benchmark_data, monkeypatch)
    named = {task for name in registry.task_suites.names() for task in registry.task_suites.get(name).tasks}
    there = {p.stem for p in TASKS.glob("*.yaml") if not p.stem.startswith("_")}
    assert named == there  # a suite's tasks have files, and each file a suite


def test_the_live_model_is_as_it_was(base_folder, suite, benchmark_data, monkeypatch):
    model = adapted(base_folder, trained=True)
    before, draws = model.adapter.flat.clone(), torch.get_rng_state()
    kind = model.causal_lm.config._attn_implementation
    one = TaskSuite("one", "", {"openbookqa": TaskMetric("acc")}, folder=suite.folder)
    ours(model, one, benchmark_data, monkeypatch, limit=1)
    assert torch.equal(model.adapter.flat, before)
    assert torch.equal(torch.get_rng_state(), draws)
    assert model.causal_lm.config._attn_implementation == kind


def test_the_command_prints_a_table_and_writes_its_numbers(base_folder, benchmark_data, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fedloom.cli.app import app

    monkeypatch.setenv("FEDLOOM_DATA", str(benchmark_data))
    place = tmp_path / "numbers.json"
    arguments = ["evaluate", str(base_folder), "--suite", "gsm8k", "--limit", "1", "--shots", "1", "--out", str(place)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "strict*" in ran.stdout and "evaluation score" in ran.stdout
    numbers = json.loads(place.read_text())
    assert numbers["tasks"]["gsm8k"]["questions"] == numbers["tasks"]["gsm8k"]["shots"] == numbers["limit"] == 1
    assert '"shots": 1' in " ".join(numbers["command"][0])
    for line, words in (
        (["--suite", "gsm8"], "did you mean gsm8k?"),
        (["--shots", "3"], "--shots is for public benchmarks"),
        (["--suite", "humaneval-x"], "no source of humaneval-x-python was found"),
    ):
        ran = CliRunner().invoke(app, ["evaluate", str(base_folder), *line])
        assert (ran.exit_code, words in ran.stderr) == (2, True), ran.output
    ran = CliRunner().invoke(
        app, ["run", "quickstart", "evaluation.suite=mmlu", f"model={base_folder}", "--out", str(tmp_path / "run")]
    )
    assert ran.exit_code == 2 and "fedloom evaluate RUN --suite mmlu" in ran.stderr, ran.output


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "fedloom.evaluation.public.harness")
    with pytest.raises(UserError, match=r'lm-eval: pip install "fedloom\[evaluation\]"'):
        import_module("fedloom.evaluation.public.harness")
