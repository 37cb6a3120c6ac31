"""Command lines as people type them."""

import pytest

from lth_sparse.arguments import assignment, parse

FIND, RUN = ["lenet-300-100", "digits", "data"], ["figure4", "data"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("find-ticket lenet-300-100 digits data --trials 2", FIND),
        ("find-ticket --trials 2 lenet-300-100 digits data", FIND),
        ("find-ticket lenet-300-100 --trials 2 digits data", FIND),
        ("find-ticket lenet-300-100 --trials 2 digits --seed=3 data", FIND),
        ("find-ticket lenet-300-100 digits --quiet data", FIND),
        ("find-ticket --trials 2", []),
        ("run figure4 data --set trials=2", RUN),
        ("run figure4 --set trials=2 data", RUN),
        ("run --set trials=2 figure4 data", RUN),
        ("run --set trials=2 figure4 --quiet data --json", RUN),
        ("run --list", []),
    ],
)
def test_words_stand_anywhere(line, words):
    options = parse(line.split())
    assert options.words == words and options.command == line.split()[0]
    assert getattr(options, "trials", "2" if "trials" in line else None) == ("2" if "trials" in line else None)


@pytest.mark.parametrize(
    "line, said",
    [
        ("run figure4 data --nothing", "unrecognized arguments: --nothing"),
        ("run figure4 data --nothing 3", "unrecognized arguments: --nothing 3"),
        ("report runs/a other", "unrecognized arguments: other"),
        ("find-tickets lenet", "invalid choice"),
        ("", "the following arguments are required"),
        ("report", "the following arguments are required: RUN"),
        ("bench --level huge", "invalid choice: 'huge'"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(line, said):
    with pytest.raises(ValueError, match=said) as caught:
        parse(line.split())
    assert "\n" not in str(caught.value) and "--help)" in str(caught.value)


def test_assignments():
    assert assignment("lr = 0.1") == ("lr", "0.1") and assignment("a=b=c") == ("a", "b=c")
    with pytest.raises(ValueError, match="--set takes KEY=VALUE, got 'lr'"):
        assignment("lr")
