"""Collected sums against a slow explicit computation in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from advisor.calibration import end_passes, passes
from advisor.calibration import settings as settings_module
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.fisher import sign_source
from advisor.errors import AdvisorError, InputError
from advisor.models.inspect import outer_specs
from advisor.models.load import load_model
from tests.oracles.reference_fisher import sent_back


def explicit(loaded, sequences, seed=0):
    """Inputs and output gradients of every linear, one sequence at a time, in float64."""
    model = copy.deepcopy(loaded.model).double()
    inputs = {linear.name: [] for linear in loaded.linears}
    outputs = {}
    gradients = {linear.name: [] for linear in loaded.linears}

    def hook(name):
        def record(module, arguments, output):
            inputs[name].append(arguments[0][0].detach())
            output.retain_grad()
            outputs[name] = output

        return record

    for linear in loaded.linears:
        model.get_submodule(linear.name).register_forward_hook(hook(linear.name))
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(True)
    )
    for tokens in sequences.tokens:
        logits = model(tokens[None]).logits[0]
        logits.backward(sent_back(logits.detach(), sign_source(tokens, seed)))
        for name, output in outputs.items():
            gradients[name].append(output.grad[0])
    return inputs, gradients


@pytest.fixture(scope="module")
def truth(random_llama, sequences):
    return explicit(random_llama, sequences)


def weighted(loaded, linear, truth, samples=None):
    """Σ w x xᵀ and Σ w; w is the sum of |g|² over the linears that read the same input."""
    inputs, gradients = truth
    rows = torch.cat(inputs[linear.name][:samples])
    readers = [m.name for m in loaded.linears if m.input_group == linear.input_group]
    weights = sum(torch.cat(gradients[name][:samples]).square().sum(1) for name in readers)
    return (rows * weights[:, None]).T @ rows, weights


def test_moments_equal_the_explicit_sums(random_llama, sequences, store, truth):
    inputs, gradients = truth
    for linear in random_llama.linears:
        statistics = store.layer(linear)
        rows = torch.cat(inputs[linear.name])
        back = torch.cat(gradients[linear.name])
        assert statistics.tokens == statistics.gradient_tokens == 6 * 24
        expected, weights = weighted(random_llama, linear, truth)
        torch.testing.assert_close(
            statistics.second_moment.double(), expected, rtol=1e-3, atol=1e-4 * expected.max()
        )
        assert statistics.rows == pytest.approx(float(weights.sum()), rel=1e-4)
        torch.testing.assert_close(
            store.weights(linear).double(), weights, rtol=1e-3, atol=1e-4 * weights.max()
        )
        expected = back.T @ back
        torch.testing.assert_close(
            statistics.gradient_moment.double(), expected, rtol=1e-3, atol=1e-4 * expected.max()
        )
        torch.testing.assert_close(
            statistics.absolute_maximum.double(), rows.abs().amax(0), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            statistics.absolute_sum.double(), rows.abs().sum(0), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(statistics.second_moment, statistics.second_moment.T)


@pytest.mark.parametrize("samples", [2, 3, 6])
def test_a_prefix_is_the_sum_of_its_samples(random_llama, store, truth, samples):
    assert store.prefixes == (2, 3, 6)
    linear = random_llama.linears[-1]
    statistics = store.layer(linear, samples)
    expected, weights = weighted(random_llama, linear, truth, samples)
    assert statistics.tokens == samples * 24
    assert statistics.rows == pytest.approx(float(weights.sum()), rel=1e-4)
    torch.testing.assert_close(
        statistics.second_moment.double(), expected, rtol=1e-3, atol=1e-4 * expected.max()
    )


def test_without_a_backward_pass_every_token_counts_alike(random_llama, sequences, truth, tmp_path):
    plain = open_store(random_llama, sequences, root=tmp_path, gradient="none")
    collect_statistics(random_llama, sequences, plain, gradients=False)
    inputs, _ = truth
    for linear in random_llama.linears:
        statistics = plain.layer(linear)
        rows = torch.cat(inputs[linear.name])
        assert statistics.moment_weight is None
        assert statistics.rows == statistics.tokens == 6 * 24
        assert plain.weights(linear) is None
        torch.testing.assert_close(
            statistics.second_moment.double(), rows.T @ rows, rtol=1e-4, atol=1e-3
        )


def test_a_prefix_has_the_bits_of_a_collection_of_only_that_many(
    random_llama, sequences, store, tmp_path
):
    fewer = sequences.first(3)
    small = open_store(random_llama, fewer, root=tmp_path, prefixes=[2])
    collect_statistics(random_llama, fewer, small, prefixes=[2])
    for linear in random_llama.linears:
        ours, theirs = small.layer(linear), store.layer(linear, 3)
        assert torch.equal(ours.second_moment, theirs.second_moment)
        assert torch.equal(ours.absolute_sum, theirs.absolute_sum)
        assert ours.rows == theirs.rows


def test_signs_belong_to_the_sequence(sequences):
    tokens = sequences.tokens

    def drawn(sequence, seed):
        return torch.rand(20, generator=sign_source(sequence, seed))

    assert torch.equal(drawn(tokens[1], 0), drawn(tokens[1].clone(), 0))
    assert not torch.equal(drawn(tokens[1], 0), drawn(tokens[2], 0))
    assert not torch.equal(drawn(tokens[1], 0), drawn(tokens[1], 1))


def test_signs_do_not_depend_on_batches(random_llama, sequences, store, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 1)
    monkeypatch.setattr(end_passes, "head_tokens", lambda *_: 7)
    single = open_store(random_llama, sequences, root=tmp_path, prefixes=[2, 3])
    collect_statistics(random_llama, sequences, single, prefixes=[2, 3])
    for linear in random_llama.linears:
        expected = store.layer(linear).gradient_moment
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            single.layer(linear).gradient_moment, expected, rtol=1e-3, atol=1e-4 * scale
        )


def test_diagonal_is_the_diagonal(random_llama, sequences, store, tmp_path):
    diagonal = open_store(random_llama, sequences, root=tmp_path, gradient="diagonal")
    collect_statistics(random_llama, sequences, diagonal, gradient="diagonal")
    for linear in random_llama.linears:
        moment = diagonal.layer(linear).gradient_moment
        assert moment.shape == (linear.out_features,)
        torch.testing.assert_close(moment, store.layer(linear).gradient_moment.diagonal())


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 7])
def test_a_killed_run_goes_on_and_gives_the_same_bits(
    random_llama, sequences, store, tmp_path, after
):
    def kill(done, total):
        assert total == 2 * 2 * 3
        if done > after:
            raise Killed

    resumed = open_store(random_llama, sequences, root=tmp_path, prefixes=[2, 3])
    with pytest.raises(Killed):
        collect_statistics(random_llama, sequences, resumed, prefixes=[2, 3], progress=kill)
    again = open_store(random_llama, sequences, root=tmp_path, prefixes=[2, 3])
    assert not again.complete
    steps = []
    collect_statistics(
        random_llama, sequences, again, prefixes=[2, 3], progress=lambda *step: steps.append(step)
    )
    assert steps[-1][0] == steps[-1][1] == 12
    if after >= 3:
        assert steps[0][0] >= 3  # at least one block was not run again
    assert again.complete
    assert not again.work_folder.exists()
    for linear in random_llama.linears:
        for name in ("second_moment", "absolute_maximum", "absolute_sum", "gradient_moment"):
            ours, theirs = getattr(again.layer(linear), name), getattr(store.layer(linear), name)
            assert torch.equal(ours, theirs)


def test_a_complete_store_is_not_collected_again(random_llama, sequences, store):
    def refuse(done, total):
        raise AssertionError

    collect_statistics(random_llama, sequences, store, prefixes=[2, 3], progress=refuse)


def test_keys_tell_everything_apart(random_llama, sequences, tmp_path, llama_builder):
    def key(loaded=random_llama, tokens=sequences, **options):
        return open_store(loaded, tokens, root=tmp_path, **options).key

    other = load_model(llama_builder(rope_theta=500.0))
    keys = [
        key(), key(seed=1), key(gradient="diagonal"), key(prefixes=[4]),
        key(tokens=sequences.first(5)), key(other),
        key(load_model(random_llama.folder, torch.bfloat16)),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(seed=1, gradient="none") == key(seed=2, gradient="none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "half"}, "full, diagonal, none"),
        ({"prefixes": [0]}, "between 1 and 6"),
        ({"prefixes": [7]}, "between 1 and 6"),
        ({"max_bytes": 1000}, "need 0.00 GB of disk"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    random_llama, sequences, tmp_path, options, message
):
    store = open_store(random_llama, sequences, root=tmp_path)
    with pytest.raises(InputError, match=message):
        collect_statistics(random_llama, sequences, store, **options)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_first(random_llama, sequences, tmp_path, monkeypatch):
    usage = passes.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda path: usage)
    store = open_store(random_llama, sequences, root=tmp_path)
    with pytest.raises(InputError, match="ADVISOR_CACHE"):
        collect_statistics(random_llama, sequences, store)


def test_damage_is_found_when_read(random_llama, sequences, tmp_path):
    store = open_store(random_llama, sequences, root=tmp_path, gradient="none")
    collect_statistics(random_llama, sequences, store, gradient="none")
    path = store.folder / "inputs-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    fresh = open_store(random_llama, sequences, root=tmp_path, gradient="none")
    fresh.layer(random_llama.linears[0])
    with pytest.raises(AdvisorError, match=r"damaged.*Delete the folder"):
        fresh.layer(random_llama.linears[-1])


def test_an_unknown_prefix_lists_the_known(random_llama, store):
    with pytest.raises(InputError, match="2, 3, 6 samples, but not for 4"):
        store.layer(random_llama.linears[0], 4)


def test_an_unfinished_store_is_not_read(random_llama, sequences, tmp_path):
    store = open_store(random_llama, sequences, root=tmp_path)
    with pytest.raises(InputError, match="not complete"):
        store.layer(random_llama.linears[0])


def test_prediction_of_disk_use(random_llama, sequences, store):
    settings = settings_module.CollectionSettings((2, 3, 6), "full", 0, "float32")
    outer = outer_specs(random_llama.model)
    kept = settings_module.kept_bytes(random_llama.linears, settings, 6 * 24, outer)
    states = 6 * 24 * 64 * 4
    headers = 2 * (2 + len(outer)) * 4000
    assert kept <= store.size_bytes <= kept + headers
    needed = passes.needed_bytes(random_llama.linears, settings, 6 * 24, 64, outer)
    assert needed == kept + 3 * states  # more than the sums of inputs and (2 blocks + 3) states


def test_a_model_run_in_an_unknown_way_is_refused(random_llama, sequences, tmp_path, monkeypatch):
    from advisor.models.blocks import BlockRunner

    monkeypatch.setattr(BlockRunner, "head", lambda self, hidden: hidden @ torch.ones(64, 300))
    store = open_store(random_llama, sequences, root=tmp_path)
    with pytest.raises((AdvisorError, RuntimeError)):
        collect_statistics(random_llama, sequences, store)


def test_two_processes_collect_once(random_llama_folder, tmp_path):
    """The second waits for the first, and then finds everything done."""
    import subprocess
    import sys

    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from advisor.calibration.collect import collect_statistics, open_store\n"
        "from advisor.calibration.tokens import TokenSequences, hash_tokens\n"
        "from advisor.models.load import load_model\n"
        f"loaded = load_model(Path({str(random_llama_folder)!r}))\n"
        "tokens = torch.randint(2, 300, (64, 32), generator=torch.Generator().manual_seed(0))\n"
        "sequences = TokenSequences(tokens, 'r', '0', 0, hash_tokens(tokens))\n"
        f"store = open_store(loaded, sequences, root=Path({str(tmp_path)!r}))\n"
        "steps = []\n"
        "collect_statistics(loaded, sequences, store, progress=lambda d, t: steps.append(d))\n"
        "assert store.complete\n"
        "print(len(steps))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    steps = [int(process.communicate(timeout=240)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(steps)[0] == 0
    assert sorted(steps)[1] > 0
