"""Signed distance drawings of the miniature's things.

A drawing takes local coordinates ``x`` (right) and ``y`` (down), both (n, H, W) with the thing inside [-1,
1]², and three proportions ``p`` = (p0, p1, p2), each (n, 1, 1) in [0, 1]. It returns its parts in painter's
order as (signed distance, role): distance (n, H, W) in local units, negative inside; the role names the
part's colour. Everything is batched, since a GPU draws thousands of things in the time of one.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

Part = tuple[Tensor, str]
Proportions = tuple[Tensor, Tensor, Tensor]

ROLE_COLOURS = {
    "dark": (0.14, 0.14, 0.17),
    "light": (0.96, 0.95, 0.91),
    "glass": (0.74, 0.89, 0.96),
    "leaf": (0.27, 0.58, 0.27),
    "beak": (0.98, 0.66, 0.16),
}
"""Fixed colours; the roles ``body`` (patterned) and ``accent`` take the instance's own."""


def circle(x: Tensor, y: Tensor, cx, cy, radius) -> Tensor:
    return torch.hypot(x - cx, y - cy) - radius


def ellipse(x: Tensor, y: Tensor, cx, cy, rx, ry) -> Tensor:
    """First-order distance to an ellipse: exact on the outline, good near it."""
    dx, dy = (x - cx) / rx, (y - cy) / ry
    value = torch.hypot(dx, dy)
    slope = torch.hypot(dx / rx, dy / ry)
    return value * (value - 1) / slope.clamp(min=1e-4)


def box(x: Tensor, y: Tensor, cx, cy, hx, hy, corner=0.0) -> Tensor:
    """A box of half sizes (hx, hy) whose corners are rounded by ``corner``."""
    dx, dy = (x - cx).abs() - (hx - corner), (y - cy).abs() - (hy - corner)
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def polygon(x: Tensor, y: Tensor, *points) -> Tensor:
    """A convex polygon, its corners clockwise as seen in the picture (y down)."""
    distances = []
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        length = (ex**2 + ey**2) ** 0.5
        distances.append(((x - ax) * ey - (y - ay) * ex) / length)
    return reduce(torch.maximum, distances)


def trapezoid(x: Tensor, y: Tensor, top, left_top, right_top, bottom, left_bottom, right_bottom) -> Tensor:
    """A polygon between two level edges, each by its height and its left and right ends."""
    return polygon(x, y, (left_top, top), (right_top, top), (right_bottom, bottom), (left_bottom, bottom))


def segment(x: Tensor, y: Tensor, ax, ay, bx, by, width) -> Tensor:
    ex, ey = bx - ax, by - ay
    along = (((x - ax) * ex + (y - ay) * ey) / (ex**2 + ey**2)).clamp(0, 1)
    return torch.hypot(x - ax - along * ex, y - ay - along * ey) - width


def union(*distances: Tensor) -> Tensor:
    return reduce(torch.minimum, distances)


def car(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wheel = 0.19 + 0.09 * p[0]
    roof, shift = 0.32 + 0.24 * p[1], -0.18 + 0.3 * p[2]
    ground = 0.62
    body = box(x, y, 0.0, 0.2, 0.97, 0.29, 0.14)
    cabin = trapezoid(x, y, -roof - 0.05, shift - 0.36, shift + 0.34, 0.0, shift - 0.58, shift + 0.58)
    top = -roof + 0.07
    front = trapezoid(x, y, top, shift + 0.05, shift + 0.29, -0.06, shift + 0.05, shift + 0.44)
    back = trapezoid(x, y, top, shift - 0.31, shift - 0.05, -0.06, shift - 0.44, shift - 0.05)
    y_wheel = ground - wheel
    tyres = union(circle(x, y, -0.55, y_wheel, wheel), circle(x, y, 0.55, y_wheel, wheel))
    hubs = union(circle(x, y, -0.55, y_wheel, wheel * 0.5), circle(x, y, 0.55, y_wheel, wheel * 0.5))
    lamp = ellipse(x, y, 0.9, 0.12, 0.07, 0.09)
    return [
        (union(body, cabin), "body"),
        (union(front, back), "glass"),
        (lamp, "beak"),
        (tyres, "dark"),
        (hubs, "accent"),
    ]


def house(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    width, roof, door = 0.6 + 0.22 * p[0], 0.45 + 0.4 * p[1], -0.3 + 0.6 * p[2]
    eaves = -0.92 + roof
    walls = box(x, y, 0.0, (eaves + 0.9) / 2, width, (0.9 - eaves) / 2)
    top = polygon(x, y, (0.0, -0.95), (width + 0.16, eaves + 0.04), (-width - 0.16, eaves + 0.04))
    chimney = box(x, y, width * 0.55, -0.62, 0.09, 0.24)
    entrance = box(x, y, door * 0.8, 0.62, 0.15, 0.28, 0.03)
    window = box(x, y, torch.where(door > 0, door * 0.8 - 0.5, door * 0.8 + 0.5), 0.28, 0.15, 0.14, 0.02)
    return [(chimney, "dark"), (walls, "body"), (top, "accent"), (entrance, "dark"), (window, "glass")]


def boat(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    depth, mast, sail = 0.3 + 0.22 * p[0], -0.15 + 0.3 * p[1], 0.5 + 0.4 * p[2]
    deck = 0.72 - depth
    hull = polygon(x, y, (-0.97, deck), (0.97, deck), (0.66, 0.74), (-0.66, 0.74))
    pole = segment(x, y, mast, deck, mast, -0.92, 0.045)
    main = polygon(
        x, y, (mast + 0.08, -0.88), (mast + 0.08 + sail * 0.85, deck - 0.12), (mast + 0.08, deck - 0.12)
    )
    jib = polygon(
        x, y, (mast - 0.08, -0.7), (mast - 0.08, deck - 0.12), (mast - 0.08 - sail * 0.55, deck - 0.12)
    )
    return [(pole, "dark"), (main, "light"), (jib, "accent"), (hull, "body")]


def cup(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    height, taper, grip = 0.52 + 0.26 * p[0], 0.22 * p[1], 0.22 + 0.14 * p[2]
    left, right = -0.68, 0.34
    bowl = polygon(x, y, (left, -height), (right, -height), (right - taper, 0.74), (left + taper, 0.74))
    ring = (circle(x, y, right - taper * 0.4 + 0.04, 0.02, grip + 0.1)).abs() - 0.09
    rim = ellipse(x, y, (left + right) / 2, -height, (right - left) / 2, 0.14)
    drink = ellipse(x, y, (left + right) / 2, -height, (right - left) / 2 - 0.09, 0.085)
    saucer = ellipse(x, y, -0.17, 0.78, 0.75, 0.12)
    return [(saucer, "accent"), (ring, "accent"), (bowl, "body"), (rim, "light"), (drink, "dark")]


def fish(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    tall, tail, fin = 0.36 + 0.24 * p[0], 0.3 + 0.25 * p[1], 0.16 + 0.24 * p[2]
    body = ellipse(x, y, 0.18, 0.0, 0.76, tall)
    lobes = union(
        polygon(x, y, (-0.95, -tail - 0.05), (-0.38, 0.0), (-0.86, 0.08)),
        polygon(x, y, (-0.38, 0.0), (-0.95, tail + 0.05), (-0.86, -0.08)),
    )
    back = polygon(x, y, (0.0, -tall - fin), (0.42, -tall + 0.12), (-0.3, -tall + 0.12))
    eye = circle(x, y, 0.62, -0.1, 0.12)
    pupil = circle(x, y, 0.65, -0.1, 0.06)
    return [(lobes, "accent"), (back, "accent"), (body, "body"), (eye, "light"), (pupil, "dark")]


def bird(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    plump, head, tail = 0.36 + 0.16 * p[0], 0.23 + 0.1 * p[1], 0.25 * p[2]
    body = ellipse(x, y, -0.08, 0.16, 0.6, plump)
    skull = circle(x, y, 0.44, -0.4, head)
    beak = polygon(x, y, (0.38 + head, -0.48), (0.95, -0.36), (0.38 + head, -0.28))
    feathers = polygon(x, y, (-0.96, -0.2 - tail), (-0.4, 0.0), (-0.45, 0.32), (-0.97, 0.12 - tail))
    wing = ellipse(x, y, -0.16, 0.1, 0.36, plump * 0.5)
    legs = union(segment(x, y, -0.15, 0.5, -0.15, 0.92, 0.04), segment(x, y, 0.12, 0.5, 0.12, 0.92, 0.04))
    eye = circle(x, y, 0.5, -0.45, 0.07)
    return [
        (legs, "dark"),
        (feathers, "accent"),
        (union(body, skull), "body"),
        (beak, "beak"),
        (wing, "accent"),
        (eye, "dark"),
    ]


def cat(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wide, ear, muzzle = 0.68 + 0.2 * p[0], 0.22 + 0.26 * p[1], 0.24 + 0.14 * p[2]
    top = -0.42
    head = ellipse(x, y, 0.0, 0.16, wide, 0.7)
    left = polygon(x, y, (-wide * 0.82, top - ear), (-wide * 0.1, top), (-wide * 0.92, top + 0.42))
    right = polygon(x, y, (wide * 0.82, top - ear), (wide * 0.92, top + 0.42), (wide * 0.1, top))
    face = ellipse(x, y, 0.0, 0.46, muzzle + 0.1, muzzle)
    eyes = union(ellipse(x, y, -0.3, 0.02, 0.14, 0.16), ellipse(x, y, 0.3, 0.02, 0.14, 0.16))
    pupils = union(ellipse(x, y, -0.3, 0.03, 0.06, 0.13), ellipse(x, y, 0.3, 0.03, 0.06, 0.13))
    nose = polygon(x, y, (-0.1, 0.32), (0.1, 0.32), (0.0, 0.44))
    return [
        (union(left, right), "body"),
        (head, "body"),
        (face, "accent"),
        (eyes, "light"),
        (pupils, "dark"),
        (nose, "dark"),
    ]


def robot(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wide, head, arm = 0.36 + 0.2 * p[0], 0.26 + 0.16 * p[1], 0.3 * p[2]
    torso = box(x, y, 0.0, 0.22, wide, 0.38, 0.06)
    skull = box(x, y, 0.0, -0.46, head + 0.06, 0.25, 0.08)
    antenna = union(segment(x, y, 0.0, -0.7, 0.0, -0.88, 0.04), circle(x, y, 0.0, -0.89, 0.08))
    arms = union(
        segment(x, y, -wide, 0.0, -wide - 0.32, 0.4 - arm * 1.6, 0.08),
        segment(x, y, wide, 0.0, wide + 0.32, 0.4 - arm, 0.08),
    )
    legs = union(box(x, y, -wide * 0.5, 0.78, 0.12, 0.18), box(x, y, wide * 0.5, 0.78, 0.12, 0.18))
    eyes = union(circle(x, y, -0.15, -0.5, 0.09), circle(x, y, 0.15, -0.5, 0.09))
    mouth = box(x, y, 0.0, -0.31, 0.16, 0.035)
    return [
        (legs, "dark"),
        (arms, "accent"),
        (antenna, "accent"),
        (torso, "body"),
        (skull, "body"),
        (eyes, "light"),
        (mouth, "dark"),
    ]


def mushroom(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wide, high, stem = 0.72 + 0.24 * p[0], 0.6 + 0.4 * p[1], 0.18 + 0.16 * p[2]
    stalk = polygon(x, y, (-stem * 0.8, -0.1), (stem * 0.8, -0.1), (stem * 1.25, 0.92), (-stem * 1.25, 0.92))
    cap = torch.maximum(ellipse(x, y, 0.0, 0.04, wide, high), y - 0.06)
    gills = ellipse(x, y, 0.0, 0.06, wide * 0.85, 0.1)
    return [(stalk, "light"), (gills, "accent"), (cap, "body")]


def flower(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    petals, core, lean = 5 + 2 * torch.round(p[0] * 2), 0.15 + 0.11 * p[1], 0.3 * (p[2] - 0.5)
    cy = -0.36
    radius, angle = torch.hypot(x, y - cy), torch.atan2(y - cy, x)
    blossom = radius - (0.44 + 0.14 * torch.cos(petals * angle))
    stem = segment(x, y, 0.0, cy + 0.2, lean, 0.95, 0.055)
    leaves = union(
        ellipse(x, y, lean * 0.7 - 0.26, 0.62, 0.26, 0.11), ellipse(x, y, lean * 0.7 + 0.26, 0.5, 0.26, 0.11)
    )
    return [(union(stem, leaves), "leaf"), (blossom * 0.8, "body"), (circle(x, y, 0.0, cy, core), "accent")]


def balloon(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wide, basket, gap = 0.56 + 0.16 * p[0], 0.15 + 0.11 * p[1], 0.1 + 0.12 * p[2]
    bulb = ellipse(x, y, 0.0, -0.34, wide, 0.6)
    skirt = polygon(x, y, (-wide * 0.74, -0.02), (wide * 0.74, -0.02), (0.16, 0.36), (-0.16, 0.36))
    top = 0.36 + gap
    ropes = union(
        segment(x, y, -0.14, 0.34, -basket, top + 0.1, 0.03),
        segment(x, y, 0.14, 0.34, basket, top + 0.1, 0.03),
    )
    car_box = box(x, y, 0.0, top + 0.22, basket + 0.05, 0.17, 0.04)
    return [(ropes, "dark"), (union(bulb, skirt), "body"), (car_box, "accent")]


def rocket(x: Tensor, y: Tensor, p: Proportions) -> list[Part]:
    wide, fin, port = 0.27 + 0.11 * p[0], 0.2 + 0.2 * p[1], 0.1 + 0.07 * p[2]
    hull = torch.maximum(ellipse(x, y, 0.0, 0.12, wide * 1.08, 1.05), y - 0.55)
    nose = torch.maximum(hull, y + 0.48)
    fins = union(
        polygon(x, y, (-wide * 0.8, 0.05), (-wide * 0.8, 0.6), (-wide - fin, 0.74), (-wide - fin, 0.5)),
        polygon(x, y, (wide * 0.8, 0.05), (wide + fin, 0.5), (wide + fin, 0.74), (wide * 0.8, 0.6)),
    )
    flame = polygon(x, y, (-wide * 0.6, 0.54), (wide * 0.6, 0.54), (0.0, 0.95))
    return [
        (flame, "beak"),
        (fins, "accent"),
        (hull, "body"),
        (nose, "accent"),
        (circle(x, y, 0.0, -0.14, port + 0.05), "dark"),
        (circle(x, y, 0.0, -0.14, port), "glass"),
    ]


DRAWINGS: dict[str, Callable[[Tensor, Tensor, Proportions], list[Part]]] = {
    drawing.__name__: drawing
    for drawing in (car, house, boat, cup, fish, bird, cat, robot, mushroom, flower, balloon, rocket)
}
