"""Boxes, k-means and renewed shapes: against the reference vectors, brute force and the definition."""

import itertools

import pytest
import torch

from mifo.errors import MifoError
from mifo.method.regions.boxes import check_boxes
from mifo.method.regions.grids import rasterise_boxes, resize_shapes
from mifo.method.regions.kmeans import kmeans
from mifo.method.regions.renewal import cluster_scores, renew_shapes, soft_maps


def test_halves_are_rounded_to_even_edges():
    # 16 · (1, 3, 5, 7)/32 = 0.5, 1.5, 2.5, 3.5, which Python rounds to 0, 2, 2, 4
    (grid,) = rasterise_boxes([(1 / 32, 3 / 32, 5 / 32, 7 / 32)], 16)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:4, 0:2] = True
    assert torch.equal(grid, expected)


def test_a_box_covers_rows_by_y_and_columns_by_x_up_to_the_border():
    (grid,) = rasterise_boxes([(0.5, 0.0, 1.0, 0.25)], 8)
    assert grid.nonzero().tolist() == [[row, column] for row in (0, 1) for column in (4, 5, 6, 7)]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0.1, 0.1, 1.2, 0.5), "leaves the picture"),
        ((-0.1, 0.1, 0.2, 0.5), "leaves the picture"),
        ((float("nan"), 0.1, 0.2, 0.5), "leaves the picture"),
        ((0.1, 0.6, 0.4, 0.5), "upside down"),
        ((0.4, 0.1, 0.4, 0.5), "upside down"),
        ((0.1, 0.1, 0.4), "four numbers"),
        ((0.1, 0.1, 0.4, 0.11), "too small"),
    ],
)
def test_impossible_boxes_are_refused_by_name(box, reason):
    with pytest.raises(MifoError, match=f"<asset1>.*{reason}"):
        check_boxes({"<asset0>": (0, 0, 1, 1), "<asset1>": box}, side=16)


@pytest.mark.parametrize("side", [4, 8, 12, 16, 32, 64])
def test_shapes_are_resized_by_the_nearest_pixel_centre(side):
    shapes = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    source = [int((pixel + 0.5) * 16 / side) for pixel in range(side)]
    assert torch.equal(resize_shapes(shapes, side), shapes[:, :, source][:, :, :, source])


def test_kmeans_finds_the_best_partition_of_few_points():
    points = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(1))
    labels, centres = kmeans(points, 3, restarts=30)
    for sample in range(3):
        best = min(
            sum(
                (members - members.mean(0)).square().sum().item()
                for cluster in range(3)
                if len(members := points[sample][[label == cluster for label in partition]])
            )
            for partition in itertools.product(range(3), repeat=7)
        )
        inertia = (points[sample] - centres[sample][labels[sample]]).square().sum().item()
        assert inertia == pytest.approx(best, rel=1e-5)


def test_kmeans_of_a_sample_depends_on_the_seed_but_not_on_the_batch():
    points = torch.rand(4, 60, 5, generator=torch.Generator().manual_seed(2))
    together, _ = kmeans(points, 6, restarts=1, seed=3)
    assert all(
        torch.equal(kmeans(points[i : i + 1], 6, restarts=1, seed=3)[0][0], together[i]) for i in range(4)
    )
    assert not torch.equal(kmeans(points, 6, restarts=1, seed=4)[0], together)


def test_kmeans_does_not_mind_where_the_points_lie():
    """In 32 bits distances far from the origin are lost to rounding."""
    points = torch.randn(1, 60, 5, generator=torch.Generator().manual_seed(0))
    near, far = kmeans(points, 4)[0], kmeans(points.double() + 1e5, 4)[0]
    assert torch.equal(near, far) and len(near.unique()) == 4


def test_kmeans_goes_on_from_given_centres_and_an_empty_cluster_keeps_its_own():
    points = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    labels, centres = kmeans(points, 3, centres=torch.tensor([[[9.0], [2.0], [99.0]]]))
    assert labels.tolist() == [[1, 1, 0, 0]]
    assert centres.flatten().tolist() == [10.5, 0.5, 99.0]


def test_kmeans_survives_points_that_are_all_alike():
    labels, centres = kmeans(torch.ones(1, 9, 4), 3)
    assert len(labels.unique()) == 1
    assert centres.isfinite().all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "samples"), [("renewal", [1]), ("renewal_empty_subject", [0, 1])])
def test_renewed_shapes_agree_with_the_reference(vectors, name, samples, seed):
    v = vectors(name)
    boxes = rasterise_boxes(v["boxes"].tolist(), 16)
    maps = v["mean_self_map"][samples], v["mean_cross_map"][samples]
    first, centres = renew_shapes(*maps, boxes[None], boxes, seed=seed)
    assert torch.equal(first, v["expected_masks"][samples].bool())
    second, _ = renew_shapes(*maps, first, boxes, centres=centres)
    assert torch.equal(second, v["expected_masks_second_renewal"][samples].bool())


def test_renewed_shapes_agree_with_the_reference_in_its_own_optimum_of_kmeans(vectors):
    """In the other sample of `renewal` the reference's random starts ended in a local optimum of k-means.

    It halves the largest of six clear clusters by noise, and joins two small ones. From its centres ours
    stays there, and all that follows agrees; from its own starts ours finds the six, 14 times tighter.
    """
    v = vectors("renewal")
    self_map, cross_map = v["mean_self_map"][:1], v["mean_cross_map"][:1]
    expected = v["expected_masks"][0].bool()
    boxes = rasterise_boxes(v["boxes"].tolist(), 16)
    points = self_map / (self_map.amax(dim=1, keepdim=True) + 1e-5)
    labels, found = kmeans(points, 6)
    sizes = labels.flatten().bincount()
    smallest, largest = sizes.argmin(), sizes.argmax()
    neighbour = torch.cdist(found[0, smallest][None], found[0])[0].argsort()[1]
    reference = torch.where(labels == smallest, neighbour, labels)
    reference = torch.where((labels == largest) & expected[1].flatten(), smallest, reference)
    centres = torch.stack([points[reference == cluster].mean(dim=0) for cluster in range(6)])[None]

    first, kept = renew_shapes(self_map, cross_map, boxes[None], boxes, centres=centres)
    assert torch.equal(first[0], expected)
    second, _ = renew_shapes(self_map, cross_map, first, boxes, centres=kept)
    assert torch.equal(second[0], v["expected_masks_second_renewal"][0].bool())
    ours, theirs = ((points - c[0, at]).square().sum() for c, at in ((found, labels), (kept, reference)))
    assert ours * 14 < theirs


def test_scores_are_overlaps_and_nothing_shared_with_nothing_scores_zero():
    labels = torch.tensor([[0, 0, 1, 1]])
    soft = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.25, 0.0], [0.0, 0.0]]])
    scores = cluster_scores(labels, soft, clusters=3)  # cluster 2 has no pixel, subject 1 no map
    expected = [[1.5 / 1.75, 0.0], [0.25 / 1.75, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(scores, torch.tensor([expected]))


def test_a_subject_without_a_map_gets_its_box_back_and_takes_no_cluster():
    """A constant map rescales to zero everywhere; its 0/0 made NaN take every cluster in the reference."""
    boxes = rasterise_boxes([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)], 4)
    cross_map = torch.stack([boxes[0].flatten().float(), torch.full((16,), 0.3)], dim=-1)[None]
    assert soft_maps(cross_map, boxes[None])[..., 1].count_nonzero() == 0
    shapes, _ = renew_shapes(_two_halves(), cross_map, boxes[None], boxes, clusters_per_subject=1)
    assert torch.equal(shapes, boxes[None])


def test_boxes_are_given_back_in_order_of_subjects_and_a_later_one_keeps_the_overlap():
    boxes = rasterise_boxes([(0.0, 0.0, 0.75, 1.0), (0.25, 0.0, 1.0, 1.0)], 4)
    shapes, _ = renew_shapes(_two_halves(), torch.full((1, 16, 2), 0.3), boxes[None], boxes)
    assert torch.equal(shapes[0, 1], boxes[1])
    assert torch.equal(shapes[0, 0], boxes[0] & ~boxes[1])


def _two_halves() -> torch.Tensor:
    """Self-attention (1, 16, 16) of a 4×4 grid whose left and right halves each see only themselves."""
    left = (torch.arange(16) % 4 < 2).float()
    return (torch.outer(left, left) + torch.outer(1 - left, 1 - left))[None] / 8
