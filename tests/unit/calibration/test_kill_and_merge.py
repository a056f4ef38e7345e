"""A collection that is killed goes on; one that is shared out comes out the same."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.merging import collect_part, merge_parts
from advisor.errors import AdvisorError, InputError
from advisor.models.load import load_model

FIELDS = ("second_moment", "absolute_maximum", "absolute_sum", "gradient_moment")


# Two blocks of three batches: steps 1 to 6 are forward, 7 to 12 backward (last block first).
@pytest.mark.parametrize(
    ("step", "kept", "steps_left"),
    [
        (5, ["inputs-00000"], [3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12]),
        # The head's sums are files of their own, as if it were a third block.
        (
            11,
            ["gradients-00001", "gradients-00002", "inputs-00000", "inputs-00001", "inputs-00002"],
            [6, 9, 10, 11, 12],
        ),
    ],
    ids=["forward", "backward"],
)
def test_a_process_killed_in_the_middle_of_a_block(
    random_llama, random_llama_folder, sequences, store, tmp_path, step, kept, steps_left
):
    code = f"""
import os, signal, torch
from pathlib import Path
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.models.load import load_model
loaded = load_model(Path({str(random_llama_folder)!r}))
tokens = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3))
sequences = TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens))
store = open_store(loaded, sequences, root=Path({str(tmp_path)!r}), prefixes=[2, 3])
def progress(done, total):
    if done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
collect_statistics(loaded, sequences, store, prefixes=[2, 3], progress=progress)
"""
    found = subprocess.run([sys.executable, "-c", code], timeout=240, check=False)
    assert found.returncode == -signal.SIGKILL
    again = open_store(random_llama, sequences, root=tmp_path, prefixes=[2, 3])
    assert not again.complete
    assert sorted(name.split(".")[0] for name in again.manifest["files"]) == kept
    unfinished = [path for path in again.work_folder.iterdir() if path.name.startswith(".")]
    assert unfinished  # what was being written when it was killed
    steps = []
    collect_statistics(
        random_llama, sequences, again, prefixes=[2, 3], progress=lambda done, _: steps.append(done)
    )
    assert steps == steps_left  # blocks that were finished are not run again
    assert again.complete
    assert not again.work_folder.exists()
    for linear in random_llama.linears:
        ours, theirs = again.layer(linear), store.layer(linear)
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS)


def collect_in_two(loaded, sequences, root, cut, **options):
    for start, stop in ((0, cut), (cut, sequences.sequences)):
        part = collect_part(loaded, sequences, start, stop, root=root, **options)
        assert part.complete


@pytest.mark.parametrize("cut", [3, 4])
def test_two_parts_merge_into_the_whole(random_llama, sequences, store, tmp_path, cut):
    collect_in_two(random_llama, sequences, tmp_path, cut, prefixes=[2, 3])
    merged = merge_parts(random_llama, sequences, [cut], root=tmp_path, prefixes=[2, 3])
    assert merged.key == store.key
    assert merged.prefixes == (2, 3, 6)
    for linear in random_llama.linears:
        for samples in (2, 3, None):
            ours, theirs = merged.layer(linear, samples), store.layer(linear, samples)
            assert ours.tokens == theirs.tokens
            assert ours.gradient_tokens == theirs.gradient_tokens == 6 * 24
            assert torch.equal(ours.absolute_maximum, theirs.absolute_maximum)
            for name in FIELDS:
                expected = getattr(theirs, name)
                scale = float(expected.abs().max())
                torch.testing.assert_close(
                    getattr(ours, name), expected, rtol=1e-5, atol=1e-6 * scale
                )
            if cut == 3:  # a prefix ends where the parts meet: no sum of inputs is divided
                assert torch.equal(ours.second_moment, theirs.second_moment)
                assert torch.equal(ours.absolute_sum, theirs.absolute_sum)
    # The whole's own place: nothing is left to collect.
    collect_statistics(random_llama, sequences, merged, prefixes=[2, 3])


def test_missing_and_damaged_parts(random_llama, sequences, tmp_path):
    with pytest.raises(InputError, match=r"2 problems(.|\n)*0 to 3(.|\n)*3 to 6"):
        merge_parts(random_llama, sequences, [3], root=tmp_path)
    with pytest.raises(InputError, match="within 6 sequences, but got 4 to 7"):
        collect_part(random_llama, sequences, 4, 7, root=tmp_path)
    collect_in_two(random_llama, sequences, tmp_path, 3)
    part = collect_part(random_llama, sequences, 3, 6, root=tmp_path)
    path = part.folder / "inputs-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdvisorError, match="damaged"):
        merge_parts(random_llama, sequences, [3], root=tmp_path)


def test_parts_of_another_model_are_not_taken(random_llama, sequences, tmp_path, llama_builder):
    collect_in_two(load_model(llama_builder(rope_theta=500.0)), sequences, tmp_path, 3)
    with pytest.raises(InputError, match="2 problems"):
        merge_parts(random_llama, sequences, [3], root=tmp_path)
