"""Statistics where the disk is short: moments in 16 bits, of fewer parts of the text."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.moments import (
    SecondMoment,
    compacted,
    expanded,
    packed_length,
    unpack_moment,
)
from advisor.calibration.settings import default_prefixes
from advisor.calibration.sources import collect, open_statistics, predicted_bytes
from advisor.calibration.tokens import TokenSequences, hash_tokens

STEP = 1.0 / (2 * (2**15 - 1))
"""The most that a correlation may be off."""


def _rows(size, count=40):
    """Rows whose channels differ by six orders of magnitude; one of them is always zero."""
    generator = torch.Generator().manual_seed(size)
    scales = torch.logspace(-3, 3, size)[torch.randperm(size, generator=generator)]
    scales[size // 2] = 0.0
    common = torch.randn(count, 1, generator=generator)  # so that channels go together
    return (torch.randn(count, size, generator=generator) + common) * scales


@pytest.mark.parametrize("size", [3, 255, 256, 257, 700])
def test_a_compact_moment_is_off_by_half_a_step_of_correlation(size):
    rows = _rows(size)
    moment = SecondMoment(size)
    moment.add(rows)
    packed = moment.take()
    before = packed.clone()
    steps, roots = compacted(packed)
    assert torch.equal(packed, before)
    assert steps.dtype == torch.int16
    assert len(steps) == packed_length(size)
    found = unpack_moment(expanded(steps, roots), size).double()
    exact = rows.double().T @ rows.double()
    diagonal = exact.diagonal()
    most = (diagonal[:, None] * diagonal).sqrt()
    assert bool(((found - exact).abs() <= 1.02 * STEP * most).all())
    torch.testing.assert_close(found.diagonal(), diagonal, rtol=2e-6, atol=0.0)
    # It is not exact, so that the bound above is one of the codes and not of float32.
    assert float(((found - exact).abs() / most.clamp_min(1e-30)).max()) > 0.4 * STEP


@pytest.mark.parametrize(
    ("count", "expected"), [(8, (8,)), (12, (12,)), (16, (8, 16)), (32, (16, 32)), (128, (64, 128))]
)
def test_parts_of_the_text(count, expected):
    assert default_prefixes(count, compact=True) == expected
    assert set(expected) <= set(default_prefixes(count))


def _sequences(count, sources=("a",)):
    tokens = torch.randint(2, 300, (count, 24), generator=torch.Generator().manual_seed(1))
    names = tuple(sources[i % len(sources)] for i in range(count))
    return TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens), names)


@pytest.fixture(scope="module")
def thirty_two():
    return _sequences(32)


@pytest.fixture(scope="module")
def both(random_llama, thirty_two, tmp_path_factory):
    """The same statistics, as usual and compact."""
    root = tmp_path_factory.mktemp("both")
    found = []
    for compact in (False, True):
        store = open_store(random_llama, thirty_two, root=root, compact=compact)
        collect_statistics(random_llama, thirty_two, store)
        found.append(open_store(random_llama, thirty_two, root=root, compact=compact))
    assert found[0].key != found[1].key
    return found


@pytest.mark.parametrize("samples", [16, None])
def test_a_compact_store_has_the_same_sums(random_llama, both, samples):
    usual, compact = both
    assert compact.prefixes == (16, 32)
    for linear in random_llama.linears:
        a, b = usual.layer(linear, samples), compact.layer(linear, samples)
        diagonal = a.second_moment.diagonal()
        most = (diagonal[:, None] * diagonal).sqrt()
        off = (a.second_moment - b.second_moment).abs()
        assert bool((off <= 1.02 * STEP * most + 1e-6 * most).all())
        assert torch.equal(a.absolute_maximum, b.absolute_maximum)
        assert torch.equal(a.gradient_moment, b.gradient_moment)
        assert (a.tokens, a.rows) == (b.tokens, b.rows)


def test_it_takes_a_third_of_the_bytes_of_moments(random_llama, thirty_two, both):
    def moments(store):
        files = store.folder.glob("*.safetensors")
        return sum(path.stat().st_size for path in files)

    usual, compact = map(moments, both)
    gradients = sum(4 * packed_length(linear.out_features) for linear in random_llama.linears)
    assert (compact - gradients) / (usual - gradients) < 0.45  # headers and sums count, too


def test_what_is_predicted_of_it(random_llama, thirty_two, both):
    for store, compact in zip(both, (False, True), strict=True):
        fresh = open_statistics(random_llama, thirty_two, compact=compact)
        _, kept = predicted_bytes(random_llama, thirty_two, fresh)
        files = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
        assert kept == pytest.approx(files, abs=30_000)  # headers


def test_what_a_killed_run_has_left_is_not_needed_once_more(random_llama, thirty_two):
    store = open_statistics(random_llama, thirty_two)
    before = predicted_bytes(random_llama, thirty_two, store)

    def stop(done, total):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(random_llama, thirty_two, store, stop)
    again = open_statistics(random_llama, thirty_two)
    after = predicted_bytes(random_llama, thirty_two, again)
    assert again.disk_bytes > again.size_bytes > 0  # hidden states lie there, too
    assert after[0] == before[0] - again.disk_bytes
    assert after[1] == before[1] - again.size_bytes


def test_of_several_sources(random_llama):
    drawn = _sequences(32, ("a", "b", "a"))
    found = open_statistics(random_llama, drawn, compact=True)
    collect(random_llama, drawn, found)
    assert found.complete
    assert found.compact
    usual = open_statistics(random_llama, drawn)
    collect(random_llama, drawn, usual)
    linear = random_llama.linears[0]
    for samples in (16, 32):
        a, b = (store.layer(linear, samples).second_moment for store in (usual, found))
        torch.testing.assert_close(a, b, rtol=0, atol=float(2 * STEP * a.diagonal().max()))
