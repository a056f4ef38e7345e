"""Whether an engine can share a model among so many devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.engines import engine_name, load_engine
from advisor.engines.shapes import SPLITTING_ENGINES
from advisor.errors import InputError

if TYPE_CHECKING:
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec


def check_sharing(spec: ModelSpec, hardware: HardwareProfile, engine: str) -> None:
    """Refuse numbers of devices that cannot take equal parts of the attention.

    Raises:
        InputError: Tensor parallelism among numbers that do not divide the attention heads; names
            the nearest that do.

    Reference: vLLM ``config/model.py`` (``verify_with_parallel_config``); SGLang and TensorRT-LLM
    divide the heads in the same way.
    """
    config = spec.text_config
    heads = config.get("num_attention_heads") or config.get("n_head")
    count = hardware.count
    shares = hardware.kind == "gpu" and engine_name(engine) in SPLITTING_ENGINES
    if not shares or not isinstance(heads, int) or heads % count == 0:
        return
    able = [number for number in range(1, heads + 1) if heads % number == 0]
    fewer = max(number for number in able if number < count)
    more = min((number for number in able if number > count), default=None)
    named = [hardware.model_copy(update={"count": n}).argument for n in (fewer, more) if n]
    raise InputError(
        f"{load_engine(engine).title} shares the attention heads of a model equally among devices, "
        f"but {spec.id} has {heads} and {hardware.argument} are {count}. "
        f"Use --gpu {' or '.join(named)}."
    )
