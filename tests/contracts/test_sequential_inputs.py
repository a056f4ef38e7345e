"""What linears read behind blocks that are not quantized is what they read in the model."""

from __future__ import annotations

import pytest
import torch

from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.search.sequential import QuantizedPrefix


@pytest.mark.parametrize("name", ["llama", "olmo2", "opt-350m"])
def test_both_streams_are_one_while_nothing_is_quantized(name, tiny, tmp_path):
    """OLMo 2 and OPT-350m have no norm in front: their first linears read the stream itself."""
    loaded = load_model(tiny(name)[0])
    tokens = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    prefix = QuantizedPrefix(loaded, tokens, tmp_path, QuantizationSettings())
    for linear in loaded.linears:
        inputs = prefix.inputs(linear, {})
        weight = loaded.tensor(f"{linear.name}.weight")
        # Nothing is to be made up for: the weight that gives the same outputs is itself.
        assert torch.allclose(inputs.target(weight, 1.0), weight, atol=1e-4)
