"""What is known of one layer from data: a matrix and the number of tokens that it is a mean over."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kind = Literal["input_covariance", "output_gradient_covariance", "weight_gradient"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Statistic:
    """``matrix``: a mean over ``tokens`` tokens, fp32, on the CPU.

    Input covariance: mean of x xᵀ, (in, in). Output-gradient covariance: mean of δ δᵀ, (out, out). Weight gradient:
    mean of δ xᵀ, (out, in).
    """

    matrix: torch.Tensor
    tokens: int
