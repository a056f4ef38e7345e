"""What the codes of a weight need to make up for each other's errors: H's factor, and G."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.methods.checks import require_statistics
from advisor.methods.descent import damped_moment
from advisor.methods.gptq import check_settings
from advisor.methods.ordering import ordered_factor
from advisor.methods.outputs import output_metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings


class Feedback:
    """What all rows and all types of a weight share.

    Attributes:
        settings: ``damping``, ``descent`` passes and their damping, output feedback.
        importance: What an error of each input costs once others have made up for it, float32 [in].
        order: Columns in activation order, int64 [in].
        factor: U with UᵀU = H⁻¹, damped, in that order, float32 [in, in].
        damped: H as the descent reads it, in the model's order, float32 [in, in].
        metrics: G of each linear that has a whole one.
        couples: Whether rows depend on each other.
    """

    def __init__(
        self,
        statistics: Sequence[LayerStatistics],
        weights: Sequence[Tensor],
        settings: QuantizationSettings,
        method: str,
    ) -> None:
        """Factor H.

        Args:
            statistics: Of each linear: the same inputs, and with ``settings.output_feedback`` a
                whole G of its own, all of them or none.
            weights: Of each linear, [out_i, in]; the codes are those of all, one below the other.
            settings: See above.
            method: Its name, for messages.

        Raises:
            InputError: Statistics or settings cannot be used, or G is of another linear.
        """
        found = require_statistics(statistics[0], weights[0].shape[1], method)
        check_settings(settings)
        self.settings = settings
        moment = found.second_moment.to(device=weights[0].device, dtype=torch.float32)
        made = ordered_factor(moment, settings.damping, by_activation=True)
        self.importance = made.left_over()
        self.order, self.factor = made.order, made.inverse.factor
        self.damped = damped_moment(moment, settings)
        metrics = [
            output_metric(own, settings, len(weight))
            for own, weight in zip(statistics, weights, strict=True)
        ]
        self.metrics = [metric for metric in metrics if metric is not None]
        self.couples = len(self.metrics) == len(weights)
