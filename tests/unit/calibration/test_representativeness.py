"""Calibration text against evaluation text: alike, and unlike in each way that is told."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from advisor.calibration import representativeness as module
from advisor.calibration.representativeness import (
    kept_representativeness,
    moment_distance,
    representativeness,
)
from advisor.calibration.tokens import TokenSequences, hash_tokens


def _sequences(low, high, seed, count=24, length=160):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (count, length), generator=generator)
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


def test_text_of_one_kind_is_near(random_llama):
    found = representativeness(random_llama, _sequences(2, 60, 1), _sequences(2, 60, 2))
    assert found.token_coverage == 1.0
    assert found.moment_ratio < 1.2
    assert found.warnings == ()


def test_text_of_another_kind_is_far_and_not_covered(random_llama):
    found = representativeness(random_llama, _sequences(2, 60, 1), _sequences(40, 200, 2))
    assert found.token_coverage == pytest.approx(20 / 160, abs=0.05)
    assert found.moment_ratio > 2
    assert re.match(r"of the evaluation text's tokens only \d+% occur in", found.warnings[0])
    assert any("layers' inputs differ" in warning for warning in found.warnings)


def test_perplexities_far_apart_are_said_of_each_text(random_llama):
    found = representativeness(random_llama, _sequences(2, 60, 1), _sequences(2, 60, 2))
    apart = replace(found, calibration_nll=math.log(87.5), evaluation_nll=math.log(40.6))
    assert apart.warnings == (
        "the 16-bit model's perplexity is 87.5 on the calibration text and 40.6 on the evaluation "
        "text",
    )


def test_log_loss_is_the_models_own(random_llama):
    calibration, evaluation = _sequences(2, 60, 1, count=8), _sequences(2, 60, 2, count=8)
    found = representativeness(random_llama, calibration, evaluation)
    for tokens, nll in (
        (calibration.tokens, found.calibration_nll), (evaluation.tokens, found.evaluation_nll),
    ):  # fmt: skip
        with torch.no_grad():
            output = random_llama.model(tokens, labels=tokens)
        assert nll == pytest.approx(float(output.loss), rel=1e-4)


def test_distance_forgives_the_amount_of_text_and_the_size_of_channels():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 12, generator=generator) * torch.logspace(-2, 2, 12)
    moment = rows.T @ rows
    scale = moment.diagonal().rsqrt()
    assert moment_distance(moment, 7 * moment, scale) == pytest.approx(0, abs=1e-6)
    small = moment.clone()
    small[0, :] *= 3
    small[:, 0] *= 3  # the smallest channel, three times as large
    assert moment_distance(moment, small, scale) > 0.3


def test_too_little_text_says_nothing(random_llama):
    short = _sequences(2, 60, 1, count=3)
    assert representativeness(random_llama, short, short) is None


def test_what_was_found_is_kept_by_model_and_texts(
    random_llama, llama_builder, tmp_path, monkeypatch
):
    from advisor.models.load import load_model

    texts = [_sequences(2, 60, seed, count=8) for seed in (1, 2, 3)]
    found = kept_representativeness(random_llama, texts[0], texts[1], tmp_path)
    assert found == representativeness(random_llama, texts[0], texts[1])
    ran = []
    monkeypatch.setattr(
        module, "_compare", lambda *_: ran.append(1) or ([1.0], [1.0], torch.ones(16))
    )
    assert kept_representativeness(random_llama, texts[0], texts[1], tmp_path) == found
    assert not ran
    other = load_model(llama_builder(rope_theta=500.0))
    for loaded, calibration, evaluation in (
        (other, texts[0], texts[1]), (random_llama, texts[2], texts[1]),
        (random_llama, texts[0], texts[2]), (random_llama, texts[0], texts[1].first(6)),
    ):  # fmt: skip
        before = len(ran)
        kept_representativeness(loaded, calibration, evaluation, tmp_path)
        assert len(ran) == before + 1, "something else was asked"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token_coverage": 1.0}', "null"])
def test_what_is_not_whole_is_found_again(random_llama, tmp_path, content):
    texts = [_sequences(2, 60, seed, count=8) for seed in (1, 2)]
    found = kept_representativeness(random_llama, *texts, tmp_path)
    (path,) = (tmp_path / "comparisons").iterdir()
    whole = path.read_text()
    path.write_text(content)
    assert kept_representativeness(random_llama, *texts, tmp_path) == found
    assert path.read_text() == whole
    short = _sequences(2, 60, 1, count=3)
    assert kept_representativeness(random_llama, short, short, tmp_path) is None
