"""From what a user names to what it is: the hardware, the engine, the model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from advisor.hardware.profile import HardwareProfile
    from advisor.plan.schema import ModelIdentity

_PREFERENCES = ("accuracy", "size", "speed", "balanced")


def resolve_hardware(gpu: str) -> HardwareProfile:
    """Return the profile of a named device, or of what is in this machine (``auto``, ``cpu``).

    ``auto`` takes the GPU of most memory, else the CPU. What ``advisor profile --measure`` found of
    it stands where nothing else is known.

    Raises:
        InputError: The name fits no device of the catalogue, or several.
    """
    if gpu.strip().lower() in ("auto", "cpu"):
        from advisor.hardware.detect import detect
        from advisor.hardware.kept import with_kept
        from advisor.plan.folders import cache_root

        machine = detect()
        found = machine.cpu if gpu.strip().lower() == "cpu" else machine.hardware
        return with_kept(found, cache_root())
    from advisor.hardware.catalogue import find_profile

    return find_profile(gpu)


def resolve_engine(engine: str, hardware: HardwareProfile) -> str:
    """Return the engine's name, with its release if one is named (``vllm==0.27``).

    ``auto`` is the usual one for the hardware.

    Raises:
        InputError: Unknown engine or release.
    """
    from advisor.engines import default_engine, load_engine

    if engine.strip().lower() == "auto":
        return default_engine(hardware)
    return load_engine(engine).name


def check_preference(prefer: str) -> str:
    """Return the preference, or say which there are.

    Raises:
        InputError: Unknown preference.
    """
    if prefer not in _PREFERENCES:
        raise InputError(
            f"--prefer must be one of {', '.join(_PREFERENCES)}, but got {prefer!r}."
            f"{did_you_mean(prefer, _PREFERENCES)}"
        )
    return prefer


def check_model_name(model: str | Path) -> None:
    """Refuse what can be no model without asking the network for it.

    Raises:
        InputError: It is no folder and no Hugging Face id.
    """
    if not _may_be_on_the_hub(model):
        resolve_model_folder(model)


def _may_be_on_the_hub(model: str | Path) -> bool:
    text = str(model)
    return not (text.startswith((".", "/", "~")) or text.count("/") != 1) and not (
        Path(model).expanduser().exists()
    )


def planned_model_folder(identity: ModelIdentity, model: str | Path | None) -> Path:
    """Return the folder of a plan's 16-bit model, or of where the user says that it is now.

    Args:
        identity: The plan's model.
        model: Overrides where the plan says that it is.

    Raises:
        InputError: It is not there, and cannot be downloaded.
    """
    if model:
        return resolve_model_folder(model)
    try:
        return resolve_model_folder(identity.id, identity.revision)
    except InputError as error:
        raise InputError(
            f"{error} The plan names it: where it lies elsewhere now, say --model PATH."
        ) from error


def resolve_model_folder(model: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a model with weights; a Hugging Face id is downloaded.

    Args:
        model: A folder or a Hugging Face id.
        revision: Commit of the repository; by default its newest.

    Raises:
        InputError: No such folder, and no such model can be reached.
    """
    text = str(model)
    if not text.strip():
        raise InputError(f"the model must be named, but got {text!r}. Give a folder, or an id.")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        kept = " What is in a GGUF file is quantized already." if folder.suffix == ".gguf" else ""
        raise InputError(
            f"{text} is a file. Give the folder of the 16-bit model, with config.json and "
            f"safetensors, or a Hugging Face id.{kept}"
        )
    if not _may_be_on_the_hub(model):
        from advisor.predict.models import find_model

        meant = find_model(text)
        example = "such as meta-llama/Llama-3.1-8B" if meant is None else f"({meant[1]})"
        raise InputError(
            f"no model folder at {text}. Give a folder with config.json and safetensors, "
            f"or a Hugging Face id {example}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from advisor.predict.hub import network_errors

    try:
        path = snapshot_download(
            text,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
        )
    except (
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, *network_errors(),
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0].rstrip(". ") + "."
        raise InputError(
            f"{text} is neither a folder here nor a model that can be downloaded: {reason} "
            "Check the name and the network, or download it and give the folder."
        ) from error
    return Path(path)
