"""A model on the Hugging Face hub: config.json and the safetensors headers, no weights."""

from __future__ import annotations

from typing import Any

from advisor.errors import InputError
from advisor.modelspec import ModelSpec, build_modelspec
from advisor.modelspec.folder import parse_config, with_headers
from advisor.modelspec.headers import StoredTensor

_OFFLINE = (
    "Download the model's config.json into a folder and give that folder, or use a name of "
    "`advisor profiles list models`."
)

_TIMEOUT_S = 10.0


def fetch_modelspec(model: str, hint: str = "") -> ModelSpec:
    """Describe a model of the hub.

    Args:
        model: Its id, organisation/name.
        hint: What to add to the message when it cannot be had.

    Raises:
        InputError: No connection, no such model, no access, or no config.json.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise InputError(
            f"model {model!r} is not in the catalogue, and huggingface_hub is not installed to "
            f"look further.{hint} {_OFFLINE}"
        ) from error
    try:
        # Asked once: a download asks again and again for half a minute where there is no network.
        HfApi().model_info(model, timeout=_TIMEOUT_S)
        path = hf_hub_download(model, "config.json")
    except GatedRepoError as error:
        raise InputError(
            f"model {model!r} asks for a licence first: accept it on its page and log in with "
            f"`hf auth login`. {_OFFLINE}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the Hugging Face hub knows no model {model!r}.{hint}") from error
    except LocalEntryNotFoundError as error:
        raise InputError(_unreachable(model, hint)) from error
    except EntryNotFoundError as error:
        raise InputError(f"model {model!r} has no config.json on the hub.") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"the Hugging Face hub did not answer for {model!r}: {error}.{hint} {_OFFLINE}"
        ) from error
    except network_errors() as error:
        known = try_to_load_from_cache(model, "config.json")
        if not isinstance(known, str):
            raise InputError(_unreachable(model, hint)) from error
        path = known
    with open(path, "rb") as file:
        config = parse_config(file.read(), f"config.json of {model}")
    spec = build_modelspec(config, model_id=model, where=f"config.json of {model}")
    return with_headers(spec, _headers(HfApi(), model), model)


def _unreachable(model: str, hint: str) -> str:
    return (
        f"model {model!r} is not in the catalogue, and the Hugging Face hub cannot be reached "
        f"from here.{hint} {_OFFLINE}"
    )


def network_errors() -> tuple[type[Exception], ...]:
    """Return what a missing connection raises: of its own library since huggingface_hub 1.0."""
    try:
        from httpx import HTTPError
    except ImportError:
        return (OSError,)
    return (OSError, HTTPError)


def _headers(api: Any, model: str) -> dict[str, StoredTensor]:
    """Read the headers through ranged requests; empty where there is no safetensors."""
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        metadata = api.get_safetensors_metadata(model)
    except (NotASafetensorsRepoError, HfHubHTTPError, *network_errors()):
        # config.json alone gives every shape; ModelSpec.source says which of the two it was.
        return {}
    return {
        name: StoredTensor(
            info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0]
        )
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
