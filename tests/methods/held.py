"""Statistics held in memory, for tests of methods."""

import torch

from harness.statistics.statistic import Kind, Statistic


class Held:
    """Statistics of one layer, whatever its name: input covariances by round, other kinds by keyword."""

    def __init__(self, *covariances: torch.Tensor, tokens: int = 4000, **others: torch.Tensor) -> None:
        self._covariances = [Statistic(matrix, tokens) for matrix in covariances]
        self._others: dict[Kind, Statistic] = {kind: Statistic(matrix, tokens) for kind, matrix in others.items()}

    def input_covariance(self, layer: str, sampling_round: int = 0) -> Statistic:
        return self._covariances[sampling_round]

    def output_gradient_covariance(self, layer: str) -> Statistic:
        return self._others["output_gradient_covariance"]

    def weight_gradient(self, layer: str) -> Statistic:
        return self._others["weight_gradient"]

    def rounds(self, layer: str) -> int:
        return len(self._covariances)
