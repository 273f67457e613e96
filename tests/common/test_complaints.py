"""What is wrong with settings, as one sentence: an unknown key, a value, and a sentence of fedloom's own."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedloom.common.complaints import first_complaint, parse_options
from fedloom.common.errors import UserError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    share: float = Field(0.5, lt=1)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rounds: int = 1
    inner: Inner = Inner()

    @model_validator(mode="after")
    def fits(self) -> Options:
        if self.rounds == 13:
            raise ValueError("Rounds may be anything but 13")
        return self


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"round": 2}, "at x: unknown option a.round of it: did you mean a.rounds?"),
        ({"inner": {"share": 1}}, "at x: a.inner.share=1 is not valid for it: input should be less than 1"),
        ({"rounds": 13}, "at x: it: Rounds may be anything but 13"),
    ],
)
def test_options_that_are_wrong_give_one_sentence(values, sentence):
    with pytest.raises(UserError) as caught:
        parse_options(Options, values, "it", "a.", "at x: ")
    assert str(caught.value) == sentence
    assert caught.value.__context__ is None, "pydantic's own words are many lines"


def test_options_of_what_has_none():
    assert parse_options(NoOptions, {}, "it") == NoOptions()
    with pytest.raises(UserError, match=r"^unknown option any of it: it has no options$"):
        parse_options(NoOptions, {"any": 1}, "it")


def test_a_complaint_names_its_place_in_a_file_and_not_where_it_is_about_the_whole():
    def complaint(values: object):
        with pytest.raises(ValidationError) as caught:
            Options.model_validate(values)
        return first_complaint(caught.value)

    assert str(complaint({"inner": {"share": "a lot"}})).startswith("inner.share: input should be a valid number")
    assert complaint({"rounds": "many"}).of().startswith("rounds='many' is not valid: input should be a valid integer")
    assert str(complaint({"rounds": 13})) == complaint({"rounds": 13}).of() == "Rounds may be anything but 13"
