from __future__ import annotations

import json

import pytest

from advisor.cli import output
from advisor.cli.options import state


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unknown"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (94_528, "94.5 kB"),
        (120_000_000, "120 MB"),
        (5_728_000_000, "5.73 GB"),
        (16_060_556_376, "16.1 GB"),
        (1_340_000_000_000, "1.34 TB"),
    ],
)
def test_size_is_decimal_with_three_digits(value, text):
    assert output.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0013, "0.13%"), (0.031, "3.1%"), (0.5, "50.0%"), (5.49, "549%"), (-0.002, "-0.20%")],
)
def test_percent(value, text):
    assert output.percent(value) == text


def test_intervals():
    loss = {"low": 0.0044, "expected": 0.0112, "high": 0.0287}
    assert output.interval(loss, middle="expected") == "1.12% [0.44, 2.87]"
    assert output.short_interval(loss, middle="expected") == "1.1% [0.44-2.9]"
    assert output.interval({"low": 0.01, "value": 0.02, "high": 0.03}, middle="value",
                           kind="number") == "0.0200 [0.0100, 0.0300]"  # fmt: skip
    assert output.interval(None, middle="value") == "unknown"


def test_short_interval_of_nothing_lost_is_not_a_range():
    assert output.short_interval({"low": 0, "expected": 0, "high": 0}, middle="expected") == "0%"
    wide = {"low": 0.12, "expected": 0.37, "high": 1.47}
    assert output.short_interval(wide, middle="expected") == "37% [12-147]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "unknown"),
        (59.6, "1 min 00 s"),
        (8, "8 s"),
        (125, "2 min 05 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_duration(seconds, text):
    assert output.duration(seconds) == text


def test_columns_go_in_the_order_given_until_the_rest_fits():
    rows = [{"name": "a" * 20, "extra": "b" * 10, "kernel": "c" * 10}]
    columns = ("name", "extra", "kernel")
    dropped = ("extra", "kernel")
    assert output.fitting_columns(columns, rows, 44, dropped=dropped) == ["name", "extra", "kernel"]
    assert output.fitting_columns(columns, rows, 43, dropped=dropped) == ["name", "kernel"]
    assert output.fitting_columns(columns, rows, 20, dropped=dropped) == ["name"]
    assert output.fitting_columns(columns, [], 80, dropped=dropped) == list(columns)


def test_json_is_the_only_thing_on_stdout(capsys):
    state.json = True
    output.show({"size": "5 µ"}, lambda console, document: console.print("never"))
    assert json.loads(capsys.readouterr().out) == {"size": "5 µ"}


def test_width_of_a_pipe_is_columns_or_110(monkeypatch):
    monkeypatch.setenv("COLUMNS", "91")
    assert output.console().width == 91
    monkeypatch.delenv("COLUMNS")
    assert output.console().width == 110


@pytest.mark.parametrize(
    ("value", "text"), [(0.2, "under 1 min"), (16.4, "16 min"), (150, "2.5 h")]
)
def test_minutes(value, text):
    assert output.minutes(value) == text


def test_tables_and_sentences_round_a_loss_alike():
    """0.03849 shown by way of 0.0385 would be 3.9% in one place and 3.8% in the other."""
    from advisor.predict.explain import percent
    from advisor.predict.loss import estimate_loss
    from advisor.schemes import parse_scheme

    for billions in (0.5, 1.1, 3, 7, 8.03, 13, 34, 70):
        for name in ("awq-int4-g64-asym", "gptq-int4-g128-sym", "rtn-fp8-gch-afp8", "bnb-nf4"):
            loss = estimate_loss("llama-3", billions, parse_scheme(name))
            shown = output.short_interval(loss.to_dict(), middle="expected")
            low, high = (percent(value).rstrip("%") for value in (loss.low, loss.high))
            numbers = [float(part) for part in shown.split("[")[1].rstrip("]").split("-")]
            assert numbers == [float(low), float(high)], (billions, name)


def test_tiny_numbers_keep_their_digits():
    value = {"low": 9.81e-6, "value": 1.02e-5, "high": 1.06e-5}
    found = output.interval(value, middle="value", kind="number")
    assert found == "1.0e-05 [9.8e-06, 1.1e-05]"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (None, ""),
        ({"device": "cpu", "name": "EPYC", "reason": None}, ""),
        ({"device": "cuda:1", "name": "L4", "reason": None}, "Computed on L4 (cuda:1)."),
        ({"device": "cpu", "name": "EPYC", "reason": "no room"}, "Computed on the CPU: no room."),
    ],
)
def test_where_it_was_computed_is_said_if_there_is_more_than_a_cpu(where, text, capsys):
    output.computed_on(output.console(), where)
    assert capsys.readouterr().out.strip() == text


@pytest.mark.parametrize("failed", [False, True])
def test_profile_draws_what_was_measured(capsys, monkeypatch, failed):
    """Its table reads the document that the workflow gives."""
    from advisor import workflows
    from advisor.cli.main import main
    from advisor.hardware import measure as measuring

    def measure(device, profile):
        found = []
        for quantity in measuring.QUANTITIES:
            value = None if failed else 123.4
            found.append(
                measuring.Measured(quantity, value, value, value, 200.0, "so many", "no kernel")
            )
        return measuring.Measurements(device, profile.name, 2, tuple(found), "2.0")

    monkeypatch.setattr(measuring, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        main(["profile", "--gpu", "cpu", "--measure"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Measured on" in text
    assert text.count("no kernel" if failed else "123") >= 4
    assert ("GB/s" in text) is not failed
    assert workflows.profile("cpu").measurements is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(8_030_261_248, "8.03 B"), (134_515_008, "135 M"), (335_936, "336 K"), (999_900_000, "1 B"),
     (671_026_419_200, "671 B"), (7, "7")],
)  # fmt: skip
def test_parameters_in_the_unit_that_people_say(value, text):
    assert output.count(value) == text
