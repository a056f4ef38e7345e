"""Where ``tune``, ``apply``, ``verify`` and ``compare`` compute: one place decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.models.device import ComputeDevice
    from advisor.modelspec import ModelSpec
    from advisor.plan.schema import Plan


def check_device_name(wanted: str) -> None:
    """Refuse a device that is not in this machine, without a look at the model.

    Raises:
        InputError: It says what there is.
    """
    if wanted.strip().lower() not in ("auto", "cpu"):  # of these nothing heavy need be imported
        from advisor.models.device import check_device

        check_device(wanted)


def device_for(
    wanted: str, spec: ModelSpec, *, length: int, sequences: int, quantizing: bool = True
) -> ComputeDevice:
    """Return where to compute with a model; torch's threads are held to this process's cores.

    Args:
        wanted: ``cpu``, an accelerator such as ``cuda`` or ``cuda:1``, or ``auto``: an accelerator
            of this machine with room for a block and what is computed with it, else the CPU.
        spec: The model's tensors.
        length: Tokens of a sequence.
        sequences: Calibration sequences.
        quantizing: Whether weights are also quantized, not only measured.

    Raises:
        InputError: There is no such device, or not enough room on it.
    """
    from advisor.models.device import choose_device, keep_to_own_cores
    from advisor.search.memory import needed_on_device

    keep_to_own_cores()
    needed = needed_on_device(spec, length=length, sequences=sequences, quantizing=quantizing)
    return choose_device(wanted, needed)


def device_of_plan(
    wanted: str, plan: Plan, folder: Path, *, quantizing: bool = True
) -> ComputeDevice:
    """Return where to compute what a plan says of a model; see :func:`device_for`."""
    from advisor.predict.models import load_modelspec

    text = (plan.calibration if quantizing else plan.evaluation) or plan.evaluation
    length, sequences = (text.sequence_length, text.sequences) if text else (1, 1)
    spec = load_modelspec(str(folder))
    return device_for(wanted, spec, length=length, sequences=sequences, quantizing=quantizing)


def describe_device(choice: ComputeDevice) -> dict[str, Any]:
    """Return what ``--json`` says of where a command computed."""
    from advisor.search.planning import computed_on

    return computed_on(choice.device).model_dump() | {"reason": choice.reason or None}
