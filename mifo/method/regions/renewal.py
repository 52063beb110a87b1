"""Shapes renewed from attention: clusters of self-attention, given to subjects by cross-attention.

Bounded Denoising of Bounded Attention (arXiv 2403.16990) with MIFO's settings (arXiv 2511.00542).
"""

import torch
from torch import Tensor

from mifo.method.regions.kmeans import kmeans

EPSILON = 1e-5
SHARPNESS = 10.0
MIDPOINT = 0.2


def soft_maps(cross_map: Tensor, shapes: Tensor) -> Tensor:
    """How much each pixel looks like each subject: cross-attention, sharpened and cut to the shape in force.

    x / (max x + ε), then σ(10·(x − 0.2)), then (x − min) / (max − min + ε), over pixels, times the shape.

    Args:
        cross_map: (B, n, S) mean attention of each pixel to each subject's leading token.
        shapes: bool (B or 1, S, R, R), n = R².

    Returns:
        (B, n, S) in [0, 1].
    """
    soft = cross_map / (cross_map.amax(dim=1, keepdim=True) + EPSILON)
    soft = torch.sigmoid(SHARPNESS * (soft - MIDPOINT))
    low, high = soft.amin(dim=1, keepdim=True), soft.amax(dim=1, keepdim=True)
    return (soft - low) / (high - low + EPSILON) * shapes.flatten(2).mT


def cluster_scores(labels: Tensor, soft: Tensor, clusters: int) -> Tensor:
    """Overlap coefficient of cluster k and subject s: Σ_{p∈k} C_s(p) / min(Σ_p C_s(p), |k|), and 0 for 0/0.

    Args:
        labels: (B, n) in [0, K). soft: C, (B, n, S) in [0, 1].

    Returns:
        (B, K, S) in [0, 1].
    """
    members = torch.nn.functional.one_hot(labels, clusters).to(soft.dtype)  # (B, n, K)
    shared = members.mT @ soft
    smaller = torch.minimum(soft.sum(dim=1)[:, None], members.sum(dim=1)[..., None])
    return torch.where(smaller > 0, shared / smaller, 0.0)


def renew_shapes(
    self_map: Tensor,
    cross_map: Tensor,
    shapes: Tensor,
    boxes: Tensor,
    clusters_per_subject: int = 3,
    threshold: float = 0.2,
    restarts: int = 100,
    seed: int = 0,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The shapes that have formed inside the shapes in force, for each sample by itself.

    The rows of the self-attention map are clustered, and a cluster goes to the subject of the largest score
    (the first on ties), or to none below `threshold`. Then, in order of subjects, one left without a pixel
    gets its box back, and the others lose those pixels.

    Args:
        self_map: (B, n, n) mean self-attention, queries × keys, n = R².
        cross_map: (B, n, S) mean cross-attention to each subject's leading token.
        shapes: bool (B or 1, S, R, R), the shapes in force: at first the boxes.
        boxes: bool (S, R, R).
        centres: (B, K, n) of the last renewal, where k-means goes on; None starts anew, `restarts` times.

    Returns:
        Bool shapes (B, S, R, R), disjoint over subjects, and centres (B, K, n).
    """
    subjects, side = boxes.shape[:2]
    clusters = clusters_per_subject * subjects
    points = self_map / (self_map.amax(dim=1, keepdim=True) + EPSILON)
    labels, centres = kmeans(points, clusters, restarts, seed, centres)
    score, owner = cluster_scores(labels, soft_maps(cross_map, shapes), clusters).max(dim=-1)  # (B, K)
    owner = torch.where(score >= threshold, owner, subjects)
    owned = owner.gather(1, labels)  # (B, n), S is nobody
    for subject in range(subjects):
        lost = ~(owned == subject).any(dim=1, keepdim=True)
        owned = torch.where(lost & boxes[subject].flatten(), subject, owned)
    renewed = owned[:, None] == torch.arange(subjects, device=owned.device)[:, None]
    return renewed.reshape(len(owned), subjects, side, side), centres
