"""Sizes to the byte against files that the libraries themselves wrote, and against arithmetic."""

from __future__ import annotations

import pytest

from advisor.errors import InputError
from advisor.modelspec import build_modelspec
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import BF16, parse_scheme

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "intermediate_size": 768,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def spec():
    return build_modelspec(CONFIG, model_id="tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    fields = {key: value for key, value in CONFIG.items() if key != "architectures"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _file(folder):
    path = folder / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - header, header


@pytest.mark.parametrize(
    ("scheme", "options", "slack"),
    [
        ("bf16", None, 0),
        ("bnb-nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0),
        ("bnb-fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 0),
        # One printed decimal per module, 17 to 21 characters long by its value.
        ("bnb-nf4-dq", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                        "bnb_4bit_use_double_quant": True}, 3 * 14),
        ("llm.int8", {"load_in_8bit": True}, 0),
    ],
)  # fmt: skip
def test_real_files_to_the_byte(saved, spec, tmp_path, scheme, options, slack):
    folder = saved
    if options is not None:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("bitsandbytes")
        if "load_in_4bit" in options:
            options = options | {"bnb_4bit_compute_dtype": torch.bfloat16}
        model = transformers.LlamaForCausalLM.from_pretrained(
            saved,
            quantization_config=transformers.BitsAndBytesConfig(**options),
            dtype=torch.bfloat16,
            device_map="cpu",
        )
        folder = tmp_path
        model.save_pretrained(folder)
    size = checkpoint_size(spec, parse_scheme(scheme), "bitsandbytes" if options else "safetensors")
    data, header = _file(folder)
    assert abs(size.weight_bytes - data) <= slack
    assert abs(size.header_bytes - header) <= 0.05 * header


def test_compressed_tensors_compressor_agrees(spec):
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = getattr(compressors, "PackedQuantizationCompressor", None)
    if base is None or not hasattr(base, "compression_param_names"):
        pytest.skip("this compressed-tensors has another compressor interface")
    arguments = quantization.QuantizationArgs(
        num_bits=4, strategy="group", group_size=64, symmetric=False
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    parts = base.compress(
        {
            "weight": torch.zeros(128, 256, dtype=torch.bfloat16),
            "weight_scale": torch.ones(128, 4, dtype=torch.bfloat16),
            "weight_zero_point": torch.zeros(128, 4, dtype=torch.int8),
        },
        scheme,
    )
    from advisor.predict.storage import module_parts

    ours = module_parts(parse_scheme("rtn-int4-g64-asym"), "compressed-tensors", 256, 128)
    assert {part.suffix[1:]: part.size_bytes for part in ours} == {
        name: value.numel() * value.element_size() for name, value in parts.items()
    }


@pytest.mark.parametrize(
    ("scheme", "format_name", "bits"),
    [
        # 4 bits + (16-bit scale + 4-bit zero) / 128, and 32 bits of g_idx per input row.
        ("gptq-int4-g128-sym", "gptq", 4 + 20 / 128),
        ("awq-int4-g128-asym", "awq", 4 + 20 / 128),
        ("gptq-int3-g128-sym", "gptq", 3 + 19 / 128),
        ("rtn-int4-g128-sym", "compressed-tensors", 4 + 16 / 128),
        ("rtn-fp8-gch-afp8", "compressed-tensors", 8),
        ("nvfp4", "compressed-tensors", 4.5),
        ("mxfp4", "compressed-tensors", 4.25),
        ("bnb-nf4", "bitsandbytes", 4.5),
        ("bnb-nf4-dq", "bitsandbytes", 4.127),
    ],
)
def test_bits_per_weight_of_a_large_model(scheme, format_name, bits):
    size = checkpoint_size(load_modelspec("Llama-2-70b-hf"), parse_scheme(scheme), format_name)
    assert size.bits_per_weight == pytest.approx(bits, abs=0.006)


def test_published_gptq_and_awq_files():
    # Bytes of the safetensors file, rounded to 0.01 GB on the model card.
    small, large = load_modelspec("Llama-2-7b-hf"), load_modelspec("Llama-2-70b-hf")
    gptq = parse_scheme("gptq-int4-g128-sym-actorder")
    assert checkpoint_size(small, gptq, "gptq").total_bytes / 1e9 == pytest.approx(3.90, rel=0.0025)
    awq = parse_scheme("awq-int4-g128-asym")
    assert checkpoint_size(large, awq, "awq").total_bytes / 1e9 == pytest.approx(36.61, rel=0.0025)


@pytest.mark.parametrize(
    ("scheme", "gibibytes"),
    [("q2_k", 2.96), ("q3_k_m", 3.74), ("q3_k_l", 4.03), ("q4_0", 4.34), ("q4_k_s", 4.37),
     ("q4_k_m", 4.58), ("q5_k_s", 5.21), ("q5_k_m", 5.33), ("q6_k", 6.14), ("q8_0", 7.96)],
)  # fmt: skip
def test_published_gguf_files(scheme, gibibytes):
    spec = load_modelspec("Llama-3-8B")
    size = checkpoint_size(spec, parse_scheme(f"gguf-{scheme}"), "gguf")
    assert size.total_bytes / 2**30 == pytest.approx(gibibytes, rel=0.0025)


def test_modules_that_a_mapping_leaves_out_stay_16_bit(spec):
    scheme = parse_scheme("gptq-int4-g128-sym")
    whole = checkpoint_size(spec, scheme, "gptq")
    every = {linear.name: scheme for linear in spec.linears}
    assert checkpoint_size(spec, every, "gptq") == whole
    last = spec.linears[-1]
    del every[last.name]
    mixed = checkpoint_size(spec, every, "gptq")
    # int4 codes, 6 groups of 16-bit scales and 4-bit zeros, and g_idx against 16 bits.
    quantized = 768 * 256 // 2 + 6 * 256 * 2 + 6 * 256 // 2 + 768 * 4
    assert mixed.weight_bytes - whole.weight_bytes == 2 * last.parameters - quantized
    none = checkpoint_size(spec, {}, "gptq")
    assert none.weight_bytes == checkpoint_size(spec, BF16, "safetensors").weight_bytes


def test_tied_heads_stay_tied_unless_asked(spec):
    scheme = parse_scheme("gptq-int4-g128-sym")
    tied = checkpoint_size(spec, scheme, "gptq")
    untied = checkpoint_size(spec, scheme, "gptq", untied=True)
    assert tied.head_bytes == 0
    assert untied.weight_bytes - tied.weight_bytes == 2 * 320 * 256


def test_bad_requests(spec):
    with pytest.raises(InputError, match=r"group_size=512 for 14 modules.*256 and 768"):
        checkpoint_size(spec, parse_scheme("gptq-int4-g512-sym"), "gptq")
    with pytest.raises(InputError, match="Did you mean 'gptq'"):
        checkpoint_size(spec, BF16, "gtpq")
    with pytest.raises(InputError, match="cannot store 'bnb-nf4'"):
        checkpoint_size(spec, parse_scheme("bnb-nf4"), "gptq")
    with pytest.raises(InputError, match=r"not quantizable linears.*lm_head"):
        checkpoint_size(spec, {"lm_head": BF16}, "gptq")
