"""Batched k-means on the device of its points, in 64 bits.

Distances come from products. Where those are rounded to TensorFloat-32, as on a GPU, it takes more iterations
and ends in looser clusters.
"""

import torch
from torch import Tensor

MAX_ITERATIONS = 300


def kmeans(
    points: Tensor, clusters: int, restarts: int = 10, seed: int = 0, centres: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means of each set of points by itself, from k-means++ starts (Arthur, Vassilvitskii, 2007).

    Args:
        points: (B, n, d).
        clusters: K, at most n.
        restarts: starts, of which the one of least inertia is kept.
        seed: seeds the starts, which are drawn alike for each of the B sets: a result does not depend on its
            batch.
        centres: (B, K, d) to start from instead; then there is one start.

    Returns:
        Labels (B, n) in [0, K) and centres (B, K, d), float64.
    """
    points = points.double()
    starts = _plus_plus(points, clusters, restarts, seed) if centres is None else centres[:, None].double()
    labels, centres, inertia = _lloyd(points, starts)
    best = inertia.argmin(dim=1)  # (B,)
    rows = torch.arange(len(points), device=points.device)
    return labels[rows, best], centres[rows, best]


def _plus_plus(points: Tensor, clusters: int, restarts: int, seed: int) -> Tensor:
    """Starts (B, restarts, K, d): each next centre is a point, drawn by squared distance to those before."""
    draws = torch.rand(restarts, clusters, generator=torch.Generator().manual_seed(seed)).to(points.device)
    batch, count, _ = points.shape
    rows = torch.arange(batch, device=points.device)[:, None]
    distances = points.new_ones(batch, restarts, count)
    up_to = points.new_ones(count, count).triu()  # a product: `cumsum` sums in no fixed order on a GPU
    centres = []
    for draw in draws.T:
        cumulated = distances @ up_to
        targets = draw[:, None].expand(batch, -1, -1) * cumulated[..., -1:]
        chosen = torch.searchsorted(cumulated, targets, right=True).squeeze(-1).clamp(max=count - 1)
        centre = points[rows, chosen]  # (B, restarts, d)
        centres.append(centre)
        to_centre = torch.cdist(centre, points).square()
        distances = to_centre if len(centres) == 1 else torch.minimum(distances, to_centre)
    return torch.stack(centres, dim=2)


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's iterations until no label changes: labels (B, r, n), centres (B, r, K, d), inertia (B, r).

    Args:
        points: (B, n, d). centres: (B, r, K, d). A cluster that loses all its points keeps its centre.
    """
    starts, clusters = centres.shape[1:3]
    labels = points.new_empty(0, dtype=torch.long)
    for _ in range(MAX_ITERATIONS):
        # the centres of all starts are rows of one product, so that points are not copied for each start
        distances = torch.cdist(points, centres.flatten(1, 2)).reshape(*points.shape[:2], starts, clusters)
        nearest, new_labels = distances.min(dim=-1)  # (B, n, r)
        if torch.equal(labels, new_labels):
            break
        labels = new_labels
        members = torch.nn.functional.one_hot(labels, clusters).to(points.dtype)  # (B, n, r, K)
        sizes = members.sum(dim=1)[..., None]
        sums = (members.flatten(2).mT @ points).reshape(centres.shape)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return labels.mT, centres, nearest.square().sum(dim=1)
