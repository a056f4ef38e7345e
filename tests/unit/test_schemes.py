from __future__ import annotations

import pytest

from advisor.errors import InputError
from advisor.schemes import BF16, Scheme, parse_scheme


@pytest.mark.parametrize(
    "name",
    [
        "gptq-int4-g128-sym-actorder", "awq-int4-g128-asym", "rtn-int8-gch-sym",
        "smoothquant-int8-gch-sym-aint8", "rtn-fp8-gch-afp8", "rtn-fp8-gtensor-afp8",
        "rtn-fp8-b128-afp8", "bnb-nf4", "bnb-nf4-dq", "llm.int8", "hqq-int4-g64-asym",
        "gguf-q4_k_m", "mxfp4", "nvfp4", "nvfp4-anvfp4", "bf16", "mixed-4.25bpw",
        "gptq-int4-g128-sym-afp8",
    ],
)  # fmt: skip
def test_documented_names_print_as_they_parse(name):
    assert str(parse_scheme(name)) == name


def test_what_a_name_means():
    scheme = parse_scheme("gptq-int4-g128-sym-actorder")
    assert scheme == Scheme("gptq", "int4", "group", 128, True, activation_order=True)
    assert parse_scheme("rtn-int8-gch-asym").group_size == -1
    assert parse_scheme("mixed-4.25bpw").bits == 4.25


def test_shorthand_has_one_canonical_name():
    assert str(parse_scheme(" GPTQ-INT4-G128 ")) == "gptq-int4-g128-sym"
    assert str(parse_scheme("rtn-fp8")) == "rtn-fp8-gch"


@pytest.mark.parametrize(
    ("name", "bits"),
    [("bf16", 16), ("llm.int8", 8), ("bnb-nf4", 4), ("gguf-q4_k_m", 4), ("gptq-int3-g64-sym", 3),
     ("rtn-fp8-gch", 8), ("mxfp4", 4)],
)  # fmt: skip
def test_bits_of_a_code(name, bits):
    scheme = parse_scheme(name)
    assert scheme.bits == bits
    assert scheme.is_quantized == (bits < 16)


def test_transforms():
    assert parse_scheme("awq-int4-g128-asym").transform == "awq-scale"
    assert parse_scheme("gptq-int4-g128-sym").transform is None
    assert not BF16.is_quantized


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtpq-int4-g128", "unknown method 'gtpq'.*Did you mean 'gptq'"),
        ("Q4_K_M", "unknown method 'q4_k_m'.*Did you mean 'gguf-q4_k_m'"),
        ("nf4-dq", "Did you mean 'bnb-nf4-dq'"),
        ("int4-g128", "Did you mean 'rtn-int4-g128' or 'gptq-int4-g128' or 'awq-int4-g128'"),
        ("gptq", "names no weight type"),
        ("gptq-int9-g128", "no weight type 'int9'"),
        ("bnb-int4-g64", "no weight type 'int4'.*nf4, fp4"),
        ("gptq-int4", "needs a group size, for example gptq-int4-g128-sym"),
        ("gptq-int4-g0", "group_size must be at least 1"),
        ("gptq-int4-g128-symm", "unknown part 'symm'.*Did you mean 'sym'"),
        ("gptq-int4-g128-g64", "group_size"),
        ("gptq-int4-g128-sym-asym", "gives symmetric twice"),
        ("rtn-int4-g128-sym-actorder", "act-order is a setting of gptq"),
        ("bnb-nf4-sym", "nf4 has no sym or asym form"),
        ("bf16-sym", "takes no part 'sym'"),
        ("mixed", "mixed-<bits>bpw"),
        ("mixed-4", "mixed-<bits>bpw"),
        ("rtn-int8-gch-sym-aint7", "unknown part 'aint7'.*Did you mean 'aint8'"),
        ("", "unknown method ''"),
    ],
)
def test_what_is_no_scheme(name, message):
    with pytest.raises(InputError, match=message):
        parse_scheme(name)
