"""ModelSpec: every tensor's name and shape of a language model, without its weights (no torch).

The catalogue and Hugging Face ids are resolved one layer up, by
:func:`advisor.predict.models.load_modelspec`; this package is the arithmetic from a configuration
or from safetensors headers to tensors.
"""

from __future__ import annotations

from advisor.modelspec.build import build_modelspec, known_architectures
from advisor.modelspec.folder import read_model_folder
from advisor.modelspec.types import (
    AttentionLayer,
    LinearSpec,
    ModelSpec,
    ShapeClass,
    TensorRole,
    TensorSpec,
)

__all__ = [
    "AttentionLayer",
    "LinearSpec",
    "ModelSpec",
    "ShapeClass",
    "TensorRole",
    "TensorSpec",
    "build_modelspec",
    "known_architectures",
    "read_model_folder",
]
