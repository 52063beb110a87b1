"""Similarities of features, and how much of each instance a crop holds."""

import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F


def similarity_matrix(crops: Tensor, references: Tensor) -> Tensor:
    """Cosines of crop features (C, D) with reference features (N, D): (C, N) in [−1, 1]."""
    return F.normalize(crops.float(), dim=-1) @ F.normalize(references.float(), dim=-1).T


def mixing_shares(crops: Tensor, references: Tensor) -> Tensor:
    """Return how much of each instance every crop holds: (C, N), non-negative, rows sum to 1.

    The crop's unit feature e is unmixed into the unit reference features R (N, D) by non-negative least
    squares,

        w = argmin_{w ≥ 0} ‖e − Rᵀw‖² = argmin_{w ≥ 0} wᵀGw − 2 wᵀs,    share_j = w_j / Σ_k w_k,

    s = Re being the crop's row of the similarity matrix and G = RRᵀ the references' own matrix. G is the
    calibration: references that resemble each other do not count as mixing. A crop that equals reference i
    has share 1 at i, even if i is swapped for another instance; a crop that only resembles i more weakly
    (a·rᵢ + what is orthogonal to all references) has share 1 at i too. A crop that resembles none (w = 0)
    says nothing: 1/N each.
    """
    basis = F.normalize(references.double(), dim=-1).T.cpu().numpy()  # (D, N)
    features = F.normalize(crops.double(), dim=-1).cpu().numpy()
    weights = torch.stack([torch.from_numpy(nnls(basis, feature)[0]) for feature in features])
    total = weights.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, weights / total.clamp_min(1e-12), 1 / weights.shape[1])
    return shares.float().to(crops.device)
