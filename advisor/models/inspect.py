"""Find the blocks and the quantizable linears of a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from advisor.errors import InputError, join_errors
from advisor.models.architectures import Architecture, get_architecture
from advisor.modelspec import LinearSpec, build_modelspec
from advisor.modelspec.outer import outer_modules, outer_statistics_specs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from advisor.modelspec import ModelSpec
    from advisor.modelspec.outer import OuterModule


def architecture_of(model: nn.Module) -> Architecture:
    """Return the layout of a loaded model.

    Raises:
        InputError: The model's class is unknown.
    """
    return get_architecture(type(model).__name__)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, in execution order."""
    return list(model.get_submodule(architecture_of(model).blocks).children())


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """Return a loaded model's configuration as its config.json has it."""
    config: Any = model.config
    content: dict[str, Any] = config.to_dict()
    return content | {"architectures": [type(model).__name__]}


def find_linears(model: nn.Module) -> tuple[LinearSpec, ...]:
    """Return every quantizable linear, in execution order.

    The table of :mod:`advisor.modelspec` says what should be there; the model is compared with it
    both ways, so that nothing is silently left out.

    Args:
        model: A loaded model, after :func:`advisor.models.layout.as_stored`.

    Raises:
        InputError: The architecture is unknown, or the blocks hold other linears than the table.
    """
    architecture = architecture_of(model)
    name = type(model).__name__
    spec = build_modelspec(config_of(model), model_id=name, where=f"the configuration of {name}")
    modules = dict(model.named_modules())
    problems: list[str] = []
    for linear in spec.linears:
        weight = getattr(modules.get(linear.name), "weight", None)
        if weight is None or weight.ndim != 2:
            problems.append(f"there is no linear named {linear.name!r}.")
        elif tuple(weight.shape) != (linear.out_features, linear.in_features):
            problems.append(
                f"{linear.name} has shape {list(weight.shape)}, not "
                f"{[linear.out_features, linear.in_features]}."
            )
    problems += _unlisted(model, architecture, spec)
    if problems:
        raise InputError(
            join_errors(problems) + f" The layout of {name} is not the one that this version knows."
        )
    return spec.linears


def _unlisted(model: nn.Module, architecture: Architecture, spec: ModelSpec) -> list[str]:
    """Return a complaint for every linear inside the blocks that the table does not have."""
    known = {tensor.name for tensor in spec.tensors}
    return [
        f"{name} is a linear that the table does not list."
        for name, module in model.named_modules()
        if name.startswith(f"{architecture.blocks}.")
        and isinstance(module, nn.Linear)
        and f"{name}.weight" not in known
    ]


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits of the normalised output of the last block, as the model scales them.

    Args:
        model: A loaded model.
        hidden: What its head reads, [..., hidden].
    """
    logits: Tensor = model.get_submodule(architecture_of(model).head)(hidden)
    config: Any = model.config
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def block_linears(linears: tuple[LinearSpec, ...], block: int) -> tuple[LinearSpec, ...]:
    """Return the linears of one block, in execution order."""
    return tuple(linear for linear in linears if linear.block == block)


def find_outer(model: nn.Module) -> tuple[OuterModule, ...]:
    """Return embedding and head where the model holds them under the checkpoint's names."""
    name = type(model).__name__
    spec = build_modelspec(config_of(model), model_id=name, where=f"the configuration of {name}")
    names = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    return tuple(m for m in outer_modules(spec) if f"{m.name}.weight" in names)


def embedded_tokens(model: nn.Module) -> int:
    """Return how many tokens a model of transformers has an embedding for."""
    embedding = cast("Any", model).get_input_embeddings()
    return int(embedding.weight.shape[0])


def outer_specs(model: nn.Module) -> tuple[LinearSpec, LinearSpec]:
    """Return under which names the statistics of a model's head and embedding are kept."""
    architecture = architecture_of(model)
    rows, width = model.get_parameter(f"{architecture.head}.weight").shape
    return outer_statistics_specs(len(find_blocks(model)), rows, width)
