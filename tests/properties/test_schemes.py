"""Printing and parsing a scheme are inverse over the whole grammar."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import InputError
from advisor.schemes import GGUF_MIXTURES, Scheme, parse_scheme

METHODS = st.sampled_from(["rtn", "gptq", "awq", "hqq", "autoround"])
ACTIVATIONS = st.sampled_from([None, "int8", "fp8"])
GROUPS = st.sampled_from([("channel", -1), ("tensor", None), ("group", 32), ("group", 128)])


@st.composite
def integer_schemes(draw):
    method = draw(METHODS)
    granularity, group_size = draw(GROUPS)
    return Scheme(
        method,
        f"int{draw(st.integers(2, 8))}",
        granularity,
        group_size if granularity != "group" else draw(st.integers(1, 4096)),
        draw(st.booleans()),
        activation_order=method == "gptq" and draw(st.booleans()),
        activation=draw(ACTIVATIONS),
    )


def float_schemes():
    return st.one_of(
        st.builds(
            lambda group, activation: Scheme("rtn", "fp8", *group, activation=activation),
            st.sampled_from([("channel", -1), ("tensor", None), ("block", 128), ("group", 128)]),
            ACTIVATIONS,
        ),
        st.builds(
            lambda weight, double: Scheme("bnb", weight, double_quantization=double),
            st.sampled_from(["nf4", "fp4"]),
            st.booleans(),
        ),
        st.sampled_from(GGUF_MIXTURES).map(lambda weight: Scheme("gguf", weight)),
        st.sampled_from(["mxfp4", "nvfp4", "bf16", "fp16"]).map(lambda name: Scheme(name, name)),
        st.floats(1, 16, allow_nan=False)
        .map(lambda bits: round(bits, 2))
        .map(lambda bits: Scheme("mixed", "mixed", target_bits=bits)),
    )


@given(st.one_of(integer_schemes(), float_schemes()))
def test_parse_is_the_inverse_of_print(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert parse_scheme(str(scheme).upper()) == scheme


PARTS = ["gptq", "rtn", "int4", "int8", "fp8", "g128", "gch", "sym", "asym", "actorder", "dq",
         "aint8", "afp8", "bf16", "mxfp4", "", "nf4", "bnb"]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("-".join))
def test_any_text_is_a_scheme_with_one_name_or_a_clear_error(text):
    with contextlib.suppress(InputError):
        scheme = parse_scheme(text)
        assert parse_scheme(str(scheme)) == scheme


@given(st.text(max_size=30))
def test_no_text_breaks_the_parser(text):
    with contextlib.suppress(InputError):
        parse_scheme(text)
