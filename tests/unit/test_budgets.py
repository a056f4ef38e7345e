from __future__ import annotations

import pytest

from advisor.budgets import Budgets, parse_duration, parse_fraction, parse_points, parse_size
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
