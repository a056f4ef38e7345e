"""Train the small Llama in examples/tiny-llama, and measure what quantization costs it.

    python examples/train_tiny_llama.py OUTPUT [--steps 4000] [--seed 0]

It learns from the built-in calibration text, the docstrings of this Python's standard library and
the sources they stand in, never from the evaluation text: what shares 12 words in a row with it is
left out. The folder that is shipped was made by CPython 3.11.7; other versions have other modules.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path

import torch
from build_corpus import shingles
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from advisor.calibration.corpora import builtin_documents

END = "<|endoftext|>"
LENGTH = 512  # tokens of a sequence
BATCH = 4  # sequences of a step
TOPIC_REPEATS = 3  # how often the reference's topics stand in the text, for one time of docstrings
LEAST_DOCSTRING = 60  # characters
SHARED_WORDS = 12
NOT_PROSE = {"site-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data", "turtledemo"}
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
VALIDATE_EVERY = 100

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def stdlib_files() -> list[Path]:
    """Return the standard library's modules, without tests and what others installed, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not NOT_PROSE & set(file.relative_to(root).parts)
    ]


def stdlib_docstrings() -> list[str]:
    """Return the docstrings of each standard library module, joined, in the order of the files."""
    documents, seen = [], set()
    for file in stdlib_files():
        kept = []
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= LEAST_DOCSTRING and text not in seen:
                    seen.add(text)
                    kept.append(text)
        if kept:
            documents.append("\n\n".join(kept) + "\n")
    return documents


def stdlib_sources() -> list[str]:
    """Return the source text of the standard library's modules, in the order of the files."""
    return [file.read_text(encoding="utf-8", errors="replace") for file in stdlib_files()]


def split_text() -> tuple[list[str], list[str]]:
    """Return documents to train on and documents to stop by (one in twenty, by their hash)."""
    evaluation = set().union(
        *(shingles(text, SHARED_WORDS) for text in builtin_documents("evaluation").values())
    )
    topics = list(builtin_documents("calibration").values())
    docstrings = [
        text for text in stdlib_docstrings() if not shingles(text, SHARED_WORDS) & evaluation
    ]
    sources = [text for text in stdlib_sources() if not shingles(text, SHARED_WORDS) & evaluation]
    training, validation = list(sources), []
    for text in topics + docstrings:
        if hashlib.sha256(text.encode()).digest()[0] % 20 == 0:
            validation.append(text)
        else:
            training += [text] * (TOPIC_REPEATS if text in topics else 1)
    return training, validation


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save the tokenizer under a class name that transformers 4 knows as well."""
    tokenizer.save_pretrained(output)
    file = output / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def to_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Tokenize documents into one stream, an end token before each."""
    return torch.tensor([token for text in documents for token in tokenizer(END + text).input_ids])


def windows(stream: torch.Tensor) -> torch.Tensor:
    """Cut a stream into sequences that do not overlap."""
    count = len(stream) // LENGTH
    return stream[: count * LENGTH].view(count, LENGTH)


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, sequences: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of every next token, for all sequences."""
    logits = [model(sequence[None]).logits[0, :-1] for sequence in sequences]
    return functional.log_softmax(torch.stack(logits).float(), dim=-1)


def perplexity(log_probs: torch.Tensor, sequences: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood per token."""
    return math.exp(-log_probs.gather(-1, sequences[:, 1:, None]).double().mean())


def train(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    validation: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train in place with AdamW and a cosine schedule; keep the weights that validate best."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    best, best_weights, started = math.inf, None, time.monotonic()
    for step in range(1, steps + 1):
        progress = step / steps
        rate = PEAK_LEARNING_RATE * min(step / WARMUP_STEPS, (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - LENGTH, (BATCH,), generator=generator)
        tokens = torch.stack([stream[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % VALIDATE_EVERY == 0 or step == steps:
            score = perplexity(log_probabilities(model, validation), validation)
            seconds = time.monotonic() - started
            print(
                f"step {step}: loss {loss:.3f}, validation {score:.2f}, {seconds:.0f} s", flush=True
            )
            if score < best:
                best, best_weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int = 128) -> torch.Tensor:
    """Round a matrix to a symmetric integer grid, one scale for each group of a row."""
    groups = weight.view(weight.shape[0], -1, group_size)
    scale = 2 * groups.abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = torch.clamp(torch.round(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).view_as(weight)


def measure(model: LlamaForCausalLM, sequences: torch.Tensor) -> dict[str, dict[str, float]]:
    """Measure the model, and what rounding all its linears costs, on the sequences."""
    reference = log_probabilities(model, sequences)
    base = perplexity(reference, sequences)
    result = {"bf16": {"perplexity": round(base, 4)}}
    for bits in (8, 6, 5, 4, 3, 2):
        rounded = copy.deepcopy(model)
        for name, parameter in rounded.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data = round_to_nearest(parameter.data, bits)
        log_probs = log_probabilities(rounded, sequences)
        score = perplexity(log_probs, sequences)
        agreement = (log_probs.argmax(-1) == reference.argmax(-1)).double().mean()
        divergence = (reference.exp() * (reference - log_probs)).sum(-1).double().mean()
        result[f"rtn-int{bits}-g128-sym"] = {
            "perplexity": round(score, 4),
            "loss_percent": round(100 * (score / base - 1), 3),
            "kl_nats": round(float(divergence), 6),
            "top1_agreement": round(float(agreement), 4),
        }
    return result


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    training, validation = split_text()
    tokenizer = train_tokenizer(training)
    stream, stopping = (to_stream(tokenizer, each) for each in (training, validation))
    evaluation = windows(to_stream(tokenizer, list(builtin_documents("evaluation").values())))
    model = LlamaForCausalLM(CONFIG)
    print(
        f"{model.num_parameters():,} parameters, {len(stream):,} tokens, {len(stopping):,} to stop"
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    train(model, stream, windows(stopping), arguments.steps, generator)

    model.to(torch.bfloat16).save_pretrained(arguments.output)
    save_tokenizer(tokenizer, arguments.output)
    # Measured as stored: bfloat16 values, computed in float32.
    measured = {
        "parameters": model.num_parameters(),
        "training_tokens": len(stream),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "evaluation": {"corpus": "builtin:evaluation", "sequences": list(evaluation.shape)},
        "measured": measure(model.float().eval(), evaluation),
    }
    text = json.dumps(measured, indent=2) + "\n"
    (arguments.output / "measured.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
