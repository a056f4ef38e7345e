"""What a plan says of the kernel that its checkpoint runs on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search.planning import _kernel


@pytest.mark.parametrize(
    ("gpu", "names", "kernel", "dtype"),
    [
        # vLLM on AMD: exllama multiplies in float16 alone, whatever config.json says.
        ("mi300x", ["gptq-int8-g128-sym"], "exllama", "float16"),
        ("mi300x", ["rtn-fp8-gch-afp8", "gptq-int8-g128-sym"], "hipblaslt-fp8", "float16"),
        ("l4", ["gptq-int4-g128-sym", "gptq-int8-g128-sym"], "marlin", None),
        ("l4", ["bf16"], None, None),
    ],
)
def test_the_type_that_a_kernel_is_bound_to_is_in_the_plan(gpu, names, kernel, dtype):
    spec = load_modelspec("llama-3.1-8b")
    schemes = [parse_scheme(name) for name in names]
    assignment = {
        linear.name: schemes[index % len(schemes)] for index, linear in enumerate(spec.linears)
    }
    task = SimpleNamespace(
        engine="vllm", hardware=find_profile(gpu), spec=spec, format_name="compressed-tensors"
    )
    found = _kernel(task, SimpleNamespace(assignment=assignment))
    assert (found.name, found.dtype) == (kernel, dtype)
