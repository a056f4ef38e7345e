"""Give a loaded model the modules that its checkpoint names: one linear per stored matrix.

transformers keeps GPT-2's matrices as [in, out] (Conv1D), and since its fifth release the experts
of a mixture as one parameter [experts, out, in], under another name than the checkpoint's. Engines
and quantized checkpoints have linears [out, in], one per expert. With the latter in the model,
statistics, codes and simulation need no special case, and an expert's hooks see its own tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from advisor.models.architectures import get_architecture

if TYPE_CHECKING:
    from advisor.models.architectures import Experts


class Expert(nn.Module):
    """One expert of a mixture: down(act(gate x) * up x), under the checkpoint's names."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: Any, names: Experts) -> None:
        """Take views of the fused parameters; nothing is copied.

        Args:
            gate_up: [2 * intermediate, hidden].
            down: [hidden, intermediate].
            act_fn: The gate's activation.
            names: What the checkpoint calls the three.
        """
        super().__init__()
        gate, up = gate_up.chunk(2, dim=0)
        self._names = (names.gate, names.up, names.down)
        for name, weight in zip(self._names, (gate, up, down), strict=True):
            self.add_module(name, _linear(weight, None))
        self._act_fn = act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's output for the tokens routed to it, [tokens, hidden]."""
        gate, up, down = (cast("nn.Linear", self._modules[name]) for name in self._names)
        result: Tensor = down(self._act_fn(gate(hidden)) * up(hidden))
        return result


class ExpertList(nn.ModuleList):
    """The experts of a block, each run on the tokens that the router gives it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Chosen experts, int64 [tokens, k].
            top_k_weights: Their weights, [tokens, k].
        """
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == index)
            if len(tokens):
                output = expert(hidden_states[tokens]) * top_k_weights[tokens, places, None]
                result = result.index_add(0, tokens, output.to(result.dtype))
        return result


def as_stored(model: nn.Module) -> None:
    """Replace, in place, what transformers holds in another way than the checkpoint.

    The model computes what it did; its parameters now have the names and, as linears, the shapes
    [out, in] of quantized checkpoints. Calling it again changes nothing.

    Args:
        model: A model of an architecture that can be quantized.

    Raises:
        InputError: The architecture is unknown.
    """
    architecture = get_architecture(type(model).__name__)
    for block in model.get_submodule(architecture.blocks).children():
        if architecture.transposed:
            _untranspose(block)
        if architecture.experts is not None:
            _separate_experts(block, architecture.experts)


def _untranspose(block: nn.Module) -> None:
    """Replace every Conv1D by a linear."""
    for name, module in list(block.named_modules()):
        if type(module).__name__ == "Conv1D":
            weight, bias = cast("Tensor", module.weight), cast("Tensor", module.bias)
            block.set_submodule(name, _linear(weight.detach().T, bias.detach()))


def _separate_experts(block: nn.Module, names: Experts) -> None:
    """Replace fused experts by one module each, and give their parent the checkpoint's name."""
    parent_name, _, leaf = names.path.rpartition(".")
    parent = block._modules.get(parent_name)
    fused = None if parent is None else parent._modules.get(leaf)
    if parent is None or fused is None or isinstance(fused, ExpertList):
        return
    gate_up, down = cast("Tensor", fused.gate_up_proj), cast("Tensor", fused.down_proj)
    experts = [
        Expert(gate_up.detach()[index], down.detach()[index], fused.act_fn, names)
        for index in range(gate_up.shape[0])
    ]
    parent.add_module(leaf, ExpertList(experts).train(parent.training))
    if names.stored_as != parent_name:
        del block._modules[parent_name]
        block.add_module(names.stored_as, parent)
        # The block's own forward still calls it by its name in transformers.
        object.__setattr__(block, parent_name, parent)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear around tensors, not copied; they ask for no gradient."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
