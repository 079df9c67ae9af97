"""How compactly the leading components of W·C̃ hold what a task needs (CorDA++, §IV-A and §IV-B).

Truncating the r smallest components moves the layer's output by at most π(C)·σ_{-r} (Eq. 6), with σ_{-r} the r-th
singular value from the end and π(C) = √(d_out·σ_max(C)) / σ_min(C). Both strategies of CorDA++ weigh singular values
with log π(C). C is symmetric and positive definite once damped, so its singular values are its eigenvalues, and only
the two at the ends are needed.

Warning:
    π has a unit: inputs c times as large make it 1/c of what it was. Scores of different layers are comparable because
    every covariance is a mean over tokens of the same rows, not because they are free of scale. (The reference code
    divides each sample by its largest entry instead.)
"""

import math

import torch


def log_compactness(C_damped: torch.Tensor, out_features: int) -> float:
    """log π(C̃) of a damped input covariance, (in, in), positive definite, for a layer with ``out_features`` outputs.

    Computed in float64. An eigenvalue below ε·σ_max(C̃) cannot be told from zero there and is taken as ε·σ_max(C̃).
    """
    eigenvalues = torch.linalg.eigvalsh(C_damped.double())
    largest = float(eigenvalues[-1])
    smallest = max(float(eigenvalues[0]), torch.finfo(torch.float64).eps * largest)
    return 0.5 * (math.log(out_features) + math.log(largest)) - math.log(smallest)


def selection_score(sigma: torch.Tensor, log_pi: float) -> float:
    """Covariance selection score, Eq. 7: log π(C̃) · Σ_r σ_{-r}/σ_max. The smaller, the more compact.

    ``sigma``: all singular values of W·C̃, descending. A weight of zero has no components; its score is 0.
    """
    largest = float(sigma[0])
    return log_pi * float((sigma / largest).sum()) if largest > 0 else 0.0
