"""A model that is quantized when it is first asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class OnDemand(ExitStack):
    """A context that is entered when first asked for: what is all on disk needs no codes."""

    def __init__(self, make: Callable[[], AbstractContextManager[nn.Module]]) -> None:
        """Prepare.

        Args:
            make: Makes the context whose value is the model.
        """
        super().__init__()
        self._make = make
        self._model: nn.Module | None = None

    def __enter__(self) -> Any:
        """Return what gives the model, entering its context the first time."""
        return super().__enter__() and self._get

    def _get(self) -> nn.Module:
        if self._model is None:
            self._model = self.enter_context(self._make())
        return self._model
