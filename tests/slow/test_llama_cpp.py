"""Our GGUF files in llama.cpp, in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from advisor.evaluation.runtime import quantized_model
from advisor.formats.export import write_checkpoint
from advisor.formats.read import read_checkpoint
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.schemes import parse_scheme
from advisor.search.assignment import by_block_type
from advisor.search.realise import realise

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("file_type", ["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_s", "q8_0"])
def test_llama_cpp_computes_what_we_measure(tmp_path, ask, file_type):
    loaded = load_model(MODEL)
    chosen = {linear.name: parse_scheme(f"gguf-{file_type}") for linear in loaded.linears}
    made = realise(loaded, by_block_type(chosen, loaded.linears), QuantizationSettings(), None)
    output = tmp_path / "out"
    write_checkpoint(MODEL, output, format="gguf", weights=made.weights, replaced=made.replaced)
    ids = loaded.tokenizer("The town lies on a river, and its people build small boats.")[
        "input_ids"
    ]
    answer = ask("llama-cpp", "llama_cpp_worker.py", [ids], output, "answers.json")
    theirs = torch.tensor(json.loads(answer.read_text())[0]).log_softmax(-1)
    with torch.no_grad(), quantized_model(loaded.model, made.weights, made.replaced):
        ours = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    # llama.cpp rounds inputs to 8 bits on the way; a wrong layout or rotation costs nats.
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 0.003


@pytest.mark.parametrize(
    ("tied", "ends"),
    [
        (True, {"model.embed_tokens": "iq4_nl"}),
        (True, {"model.embed_tokens": "q5_0"}),
        (True, {"model.embed_tokens": "q3_k"}),
        (False, {"model.embed_tokens": "q2_k", "lm_head": "q4_k"}),
        (False, {"lm_head": "q4_0"}),
    ],
)
def test_llama_cpp_reads_the_types_chosen_for_embedding_and_head(
    tmp_path, ask, model_folder, untied_folder, tied, ends
):
    folder = model_folder if tied else untied_folder
    loaded = load_model(folder)
    chosen = {linear.name: parse_scheme("gguf-q8_0") for linear in loaded.linears}
    chosen |= {name: parse_scheme(f"gguf-{kind}") for name, kind in ends.items()}
    made = realise(loaded, chosen, QuantizationSettings(), None)
    write_checkpoint(
        folder, tmp_path / "out", format="gguf", weights=made.weights, replaced=made.replaced
    )
    stored = read_checkpoint(tmp_path / "out").stored.headers
    assert {name: stored[f"{name}.weight"].dtype.lower() for name in ends} == ends
    ids = list(range(2, 66))
    answer = ask("llama-cpp", "llama_cpp_worker.py", [ids], tmp_path / "out", "answers.json")
    theirs = torch.tensor(json.loads(answer.read_text())[0]).log_softmax(-1)
    with torch.no_grad(), quantized_model(loaded.model, made.weights, made.replaced):
        ours = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    difference = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert difference < 0.01
    with torch.no_grad():
        plain = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    # As stored, not as the unquantized model has it: the ends' rounding is what counts here.
    assert (plain.exp() * (plain - theirs)).sum(-1).mean() > 3 * difference
