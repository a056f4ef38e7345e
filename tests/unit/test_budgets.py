from __future__ import annotations

import pytest

from advisor.budgets import (
    Budgets,
    as_option,
    loosened,
    parse_duration,
    parse_fraction,
    parse_points,
    parse_size,
)
from advisor.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000), ("6GiB", 6_442_450_944), ("5.73 GB", 5_730_000_000),
        ("120MB", 120_000_000), ("1.5kib", 1536), ("1024", 1024), (".5gb", 500_000_000),
        (42, 42),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "6 gigs", "-6GB", "6GBB", "1e9", "0", "0GB", "six"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="must be"):
        parse_size(text, "--max-size")


def test_a_bare_number_is_a_slip_of_gigabytes():
    with pytest.raises(InputError, match=r"--max-size must have a unit.* did you mean 6\.5GB"):
        parse_size("6.5", "--max-size")


@pytest.mark.parametrize(
    ("text", "value"), [("3%", 0.03), ("0.03", 0.03), ("150%", 1.5), ("0", 0.0), (0.05, 0.05)]
)
def test_fractions(text, value):
    assert parse_fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["3", "-1%", "three", "3%%", "1"])
def test_what_is_no_fraction(text):
    with pytest.raises(InputError):
        parse_fraction(text)


@pytest.mark.parametrize(("text", "value"), [("1pp", 0.01), ("0.5pp", 0.005), ("0.01", 0.01)])
def test_points(text, value):
    assert parse_points(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1", "100pp", "-1pp", "pp"])
def test_what_is_no_number_of_points(text):
    with pytest.raises(InputError, match="percentage points such as 1pp"):
        parse_points(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200)])
def test_durations(text, seconds):
    assert parse_duration(text, "--time-budget") == seconds


@pytest.mark.parametrize("text", ["soon", "0s", "-1m", ""])
def test_what_is_no_duration(text):
    with pytest.raises(InputError, match="--time-budget must be a duration"):
        parse_duration(text, "--time-budget")


def test_every_offender_is_listed():
    with pytest.raises(InputError) as error:
        Budgets.from_text(max_size="big", max_loss="3", min_speed="-4")
    assert str(error.value).splitlines()[0] == "3 problems:"
    for word in ("--max-size", "did you mean 3%", "--min-speed"):
        assert word in str(error.value)


def test_all_budgets_at_once():
    budgets = Budgets.from_text(
        max_size="6GB", max_memory="12GiB", max_loss="3%", max_kl="0.05",
        max_accuracy_drop="1pp", task="mmlu", min_speed="40",
    )  # fmt: skip
    assert budgets == Budgets(6_000_000_000, 12 * 2**30, 0.03, 0.05, 0.01, "mmlu", 40.0)


@pytest.mark.parametrize("limits", [{"task": "mmlu"}, {"max_accuracy_drop": 0.01}])
def test_a_task_and_its_drop_come_together(limits):
    with pytest.raises(InputError, match="needs --"):
        Budgets(**limits)


@pytest.mark.parametrize(
    ("budget", "value", "limit", "option"),
    [
        ("max_size", 9_081_264_000, 9_090_000_000, "--max-size 9.09GB"),
        ("max_size", 2_018_856, 2_020_000, "--max-size 2.02MB"),
        ("max_size", 6 * 10**9, 6 * 10**9, "--max-size 6GB"),
        ("max_memory", 123_456_789_012, 124 * 10**9, "--max-memory 124GB"),
        ("max_loss", 0.0314, 0.032, "--max-loss 3.2%"),
        ("max_loss", 0.032, 0.032, "--max-loss 3.2%"),
        ("max_loss", 1.234, 1.3, "--max-loss 130%"),
        ("max_kl", 0.0012345, 0.00124, "--max-kl 0.00124"),
        ("max_accuracy_drop", 0.01234, 0.013, "--max-accuracy-drop 1.3pp"),
        ("min_speed", 56.19, 56.1, "--min-speed 56.1"),
    ],
)
def test_a_loosened_limit_is_round_and_met_as_typed(budget, value, limit, option):
    assert loosened(budget, value) == limit
    assert as_option(budget, limit) == option
    name, text = option.removeprefix("--").split()
    task = {"task": "t"} if budget == "max_accuracy_drop" else {}
    (read,) = Budgets.from_text(**{name.replace("-", "_"): text}, **task).limits().values()
    assert read == pytest.approx(limit, rel=1e-12)
    assert read <= value if budget == "min_speed" else read >= value


def test_a_size_is_typed_as_it_was_given():
    assert as_option("max_memory", 12 * 2**30) == "--max-memory 12GiB"
    assert as_option("max_memory", 12 * 2**30 + 1) == f"--max-memory {12 * 2**30 + 1}"
