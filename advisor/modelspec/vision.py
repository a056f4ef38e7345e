"""Vision towers of multimodal models: counted in size and memory, never quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from advisor.errors import InputError
from advisor.modelspec.types import TensorSpec

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")


def vision_tensors(config: Mapping[str, Any], where: str) -> Iterator[TensorSpec]:
    """Yield the tensors of a SigLIP tower and Gemma 3's projector.

    Raises:
        InputError: The multimodal architecture is another one, or its sizes are missing.
    """
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return
    name = config["architectures"][0]
    if name != "Gemma3ForConditionalGeneration":
        raise InputError(
            f"the vision tower of {name!r} in {where} is not known from its configuration alone. "
            "Give a local folder with the safetensors, whose headers say what is in it."
        )
    missing = [key for key in _REQUIRED if vision.get(key) is None]
    if missing:
        raise InputError(f"{where}: vision_config lacks {', '.join(missing)}.")
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    tower = "vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (hidden,),
        f"{tower}.embeddings.position_embedding.weight": (patches, hidden),
    }
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{prefix}.{part}.weight"] = shapes[f"{prefix}.{part}.bias"] = (hidden,)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}.self_attn.{part}.weight"] = (hidden, hidden)
            shapes[f"{prefix}.self_attn.{part}.bias"] = (hidden,)
        shapes[f"{prefix}.mlp.fc1.weight"], shapes[f"{prefix}.mlp.fc1.bias"] = (
            (inner, hidden),
            (inner,),
        )
        shapes[f"{prefix}.mlp.fc2.weight"], shapes[f"{prefix}.mlp.fc2.bias"] = (
            (hidden, inner),
            (hidden,),
        )
    shapes[f"{tower}.post_layernorm.weight"] = shapes[f"{tower}.post_layernorm.bias"] = (hidden,)
    width = config["text_config"]["hidden_size"]
    shapes["multi_modal_projector.mm_input_projection_weight"] = (hidden, width)
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (hidden,)
    for tensor, shape in shapes.items():
        yield TensorSpec(tensor, shape, "other")
