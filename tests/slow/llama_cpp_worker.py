"""Run inside an environment that has llama-cpp-python: load model.gguf, write its logits.

Arguments: the checkpoint's folder, a JSON file with ``prompts`` (lists of token ids), and the JSON
file to write.
"""

import json
import sys


def main(folder, questions, answers):
    """Load the file and write the answers."""
    from llama_cpp import Llama

    with open(questions, encoding="utf-8") as handle:
        prompts = json.load(handle)["prompts"]
    model = Llama(f"{folder}/model.gguf", n_ctx=256, logits_all=True, verbose=False)
    found = []
    for ids in prompts:
        model.reset()
        model.eval(ids)
        found.append(model.scores[: len(ids)].tolist())
    with open(answers, "w", encoding="utf-8") as handle:
        json.dump(found, handle)


if __name__ == "__main__":
    main(*sys.argv[1:4])
