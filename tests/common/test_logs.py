"""What fedloom says: nothing by itself, everything to who asks for it, and to nobody what another run says."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest

from fedloom import run
from fedloom.common import logs
from fedloom.common.logs import heard_by, reworded, same_hearers
from fedloom.federation.watch import Watch

log = logging.getLogger("fedloom.tests.logs")

LIBRARY = """
import sys
from fedloom import Recipe, run
run(Recipe.load(sys.argv[1]), out=sys.argv[2])
"""


def test_a_run_from_python_prints_nothing(tiny_recipe, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        tiny_recipe({"train.precision": "bf16"}).to_yaml()
    )  # which a warning may follow, on some machines
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(recipe), str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("heard", [False, True])
def test_a_warning_goes_to_no_last_resort(heard):
    """Python shows a library's warnings on stderr where it finds no handler at all."""
    code = "import contextlib, logging, fedloom; from fedloom.common.logs import heard_by; log = logging.getLogger('fedloom.x')"
    code += f"\nwith heard_by(lambda text: None) if {heard} else contextlib.nullcontext(): log.warning('a trouble')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_whoever_configures_logging_hears_the_sentences(tiny_recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fedloom")
    run(tiny_recipe(), tmp_path / "run")
    names = {record.name for record in caplog.records if record.getMessage().startswith("loading ")}
    assert names == {"fedloom.data.loading"}
    assert all(record.levelno >= logging.INFO for record in caplog.records)


def test_a_watch_hears_once_what_a_run_says_and_what_came_before_stays(tiny_recipe, tmp_path):
    logger = logging.getLogger("fedloom")
    before = logger.level, logger.propagate, list(logger.handlers)
    said: list[str] = []
    with heard_by(said.append):
        run(tiny_recipe(), tmp_path / "run", watch=Watch(say=said.append))
    assert sum(text.startswith("loading ") for text in said) == 1
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_a_users_own_handlers_get_what_they_asked_for(caplog):
    """To hear INFO for a while does not show it to a handler whose user asked for warnings; and takes no warning away."""
    said: list[str] = []
    with heard_by(said.append):
        log.info("a step")
        log.warning("a trouble")
    log.info("nobody hears this")
    assert said == ["a step", "a trouble"]
    assert caplog.messages == ["a trouble"]
    caplog.clear()
    caplog.set_level(logging.INFO, logger="fedloom")
    with heard_by(said.append):
        log.info("a second step")
    assert caplog.messages == ["a second step"] == said[2:]


def test_two_threads_hear_their_own():
    both = threading.Barrier(2)
    said: dict[str, list[str]] = {"a": [], "b": []}

    def work(name: str) -> None:
        with heard_by(said[name].append):
            for number in range(20):
                both.wait()
                log.info("%s %d", name, number)
            both.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {name: [f"{name} {number}" for number in range(20)] for name in said}


def test_two_runs_in_two_threads_do_not_mix(tiny_recipe, tmp_path):
    """Each says how many test questions are asked, and each asks its own number."""
    said: dict[int, list[str]] = {2: [], 3: []}

    def work(count: int) -> None:
        recipe = tiny_recipe({"evaluation.answers": count, "federation.rounds": 1})
        run(recipe, tmp_path / str(count), watch=Watch(say=said[count].append))

    threads = [threading.Thread(target=work, args=(count,)) for count in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, lines in said.items():
        asked = [line for line in lines if "test questions" in line]
        assert asked == [f"asking {count} test questions before training"]


def test_a_threads_helpers_may_hear_what_it_hears():
    said: list[str] = []
    with heard_by(said.append):
        take = same_hearers()

        def helper() -> None:
            log.info("not heard")
            take()
            log.info("heard")

        thread = threading.Thread(target=helper)
        thread.start()
        thread.join()
    assert said == ["heard"]


def test_sentences_can_be_reworded_and_kept_back():
    said: list[str] = []
    with heard_by(said.append):
        with reworded(lambda text: None if text == "secret" else f"inner: {text}"):
            log.info("one")
            log.info("secret")
        log.info("two")
    assert said == ["inner: one", "two"]


def test_an_error_of_a_hearer_comes_out_where_the_sentence_was_said():
    def full(text: str) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"), heard_by(full):
        log.info("a step")
    log.info("nobody hears this")


def test_a_process_with_a_log_file_prints_each_sentence_as_a_line(tmp_path):
    code = "import logging; from fedloom.common.logs import print_sentences; print_sentences(); print('first');"
    code += "logging.getLogger('fedloom.x').info('a step'); logging.getLogger('fedloom.x').warning('100 %')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("first\na step\n100 %\n", "")
    assert logs.ROOT.name == "fedloom"
