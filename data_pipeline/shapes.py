"""The embedded data set: pictures of coloured shapes with captions in GenEval's six templates.

    t2i data shapes --out data/shapes --samples 20000

It stands in for nothing: it is a small world in which the whole chain from image-text pairs to a GenEval score can be
run and measured in minutes, because what is in a picture can be told exactly. Every picture is a function of
(seed, index), 64x64 pixels, one to four non-overlapping shapes of eight kinds in GenEval's ten colours over a muted
background.

The split: each combination task (two_object, position, color_attr) has eight unordered pairs of shapes of its own in
`HELD_OUT_PAIRS` that no training caption of this task names. Its evaluation prompts use those pairs only, so its score
measures composition, not memory: the shapes were seen together, but never in such a caption. single_object, counting and
colors have too few prompts to split; their pictures are still drawn from other random numbers.

A position caption names the colours of its two objects half of the time ("a photo of a red circle left of a blue
star"); evaluation prompts never do, as in GenEval.

Pictures are made here, written by `data_pipeline.shapes_set`; shapes that move are in `data_pipeline.clips`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.geneval_text import TAGS, prompt_for

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "hexagon")
# GenEval's colours, and below its relations, in its order: its published prompts are drawn by their places here.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (245, 135, 20),
    "yellow": (250, 222, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "purple": (125, 45, 175),
    "pink": (250, 150, 195),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
}
TASKS = TAGS
RELATIONS = ("left of", "right of", "above", "below")
# By task, pairs a number of steps apart on the ring of the eight shapes: every shape is in two held-out pairs of a task and in
# five that train it, and no pair is held out of two tasks.
HELD_OUT_PAIRS = {
    task: frozenset(frozenset((SHAPES[i], SHAPES[(i + steps) % 8])) for i in range(8))
    for task, steps in (("two_object", 3), ("position", 1), ("color_attr", 2))
}

# How often each task's captions occur in training: more where there is more to learn.
TASK_WEIGHTS = {
    "single_object": 0.05,
    "two_object": 0.15,
    "counting": 0.15,
    "colors": 0.20,
    "position": 0.21,
    "color_attr": 0.24,
}
# Background colours, all at least 60 RGB units from each of the ten object colours.
BACKGROUNDS = (
    (150, 160, 172), (172, 164, 150), (146, 158, 142), (166, 150, 164), (140, 150, 160), (172, 170, 162),
    (158, 146, 138), (138, 154, 156),
)  # fmt: skip
DARKEST = 0.9  # of its colour, where a background is shaded
# A shape fills 2x2 tokens of 8x8 pixels and its centre is where they meet: each token, the first decoded one too, then
# shows kind and colour, and a small model learns from few pictures to say what is where.
RADIUS = 7.2
CENTERS = np.arange(16, 49, 8)
GAP = 5  # pixels between the bounding boxes of two objects
SUPERSAMPLING = 4
LAYOUTS_PER_DRAW = {1: 2, 2: 256, 3: 512, 4: 512}  # by the number of objects: about what it takes


@dataclass(frozen=True)
class PlacedShape:
    """One object of a picture: centre and radius in pixels (the radius of the enclosing circle)."""

    shape: str
    color: str
    cx: float
    cy: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The outline's bounding box (x0, y0, x1, y1) in pixels."""
        x0, y0, x1, y1 = (_unit_box(self.shape) * self.radius).tolist()
        return (self.cx + x0, self.cy + y0, self.cx + x1, self.cy + y1)


@dataclass(frozen=True)
class ShapesSample:
    """A picture (uint8 [64, 64, 3]), its caption, GenEval metadata, and what was drawn where."""

    image: np.ndarray
    caption: str
    metadata: dict[str, Any]
    objects: tuple[PlacedShape, ...]


@cache
def _outline(shape: str) -> np.ndarray:
    """The polygon of a shape around the origin, within the unit circle or a little inside it: [P, 2] (x right, y down)."""

    def on_circle(angles_degrees: np.ndarray, radius: np.ndarray | float = 1.0) -> np.ndarray:
        angles = np.deg2rad(angles_degrees)
        return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)

    if shape == "circle":
        return on_circle(np.arange(0, 360, 5), 0.92)
    if shape == "square":
        return on_circle(np.arange(45, 360, 90), 1.13)
    if shape == "triangle":
        return on_circle(np.array([-90, 30, 150]), 1.1) + np.array([0, 0.22])
    if shape == "star":
        angles = np.arange(-90, 270, 36)
        return on_circle(angles, np.where(np.arange(10) % 2 == 0, 1.1, 0.45)) + np.array([0, 0.06])
    if shape == "diamond":
        return np.array([[0, -1.1], [0.72, 0], [0, 1.1], [-0.72, 0]])
    if shape == "cross":
        a, b = 0.34, 1.0
        return np.array([
            [-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a],
        ])  # fmt: skip
    if shape == "heart":
        t = np.deg2rad(np.arange(0, 360, 5))
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x / 16, (y - 2.5) / 15.5], axis=1)
    if shape == "hexagon":
        # Flattened: at ten pixels of radius a regular one is a circle but for a pixel here and there.
        return on_circle(np.arange(0, 360, 60), 1.1) * np.array([1, 0.8])
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")


@cache
def _unit_box(shape: str) -> np.ndarray:
    """The bounding box (x0, y0, x1, y1) of a shape of radius 1 around the origin."""
    return np.concatenate([_outline(shape).min(0), _outline(shape).max(0)])


def shape_mask(shape: str, cx: float, cy: float, radius: float, size: int = IMAGE_SIZE) -> np.ndarray:
    """Anti-aliased coverage of a shape: float32 [size, size] in 0..1, centre and radius in pixels."""
    scale = SUPERSAMPLING
    canvas = Image.new("L", (size * scale, size * scale))
    points = (_outline(shape) * radius + np.array([cx, cy])) * scale - 0.5
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points.tolist()], fill=255)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def background(rng: np.random.Generator) -> np.ndarray:
    """A muted background: plain, darker downwards or to the right, or a vignette. float32 [64, 64, 3]."""
    light = np.array(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], np.float32)
    x, y = np.meshgrid(np.linspace(0, 1, IMAGE_SIZE), np.linspace(0, 1, IMAGE_SIZE))
    kinds = [np.zeros_like(x), y, x, ((2 * x - 1) ** 2 + (2 * y - 1) ** 2) / 2]
    shade = kinds[rng.integers(len(kinds))]
    return light * (1 - (1 - DARKEST) * shade[..., None].astype(np.float32))


def draw(objects: tuple[PlacedShape, ...], canvas: np.ndarray) -> np.ndarray:
    """Objects over a background, float32 [64, 64, 3]; returns uint8 [64, 64, 3]."""
    for placed in objects:
        coverage = shape_mask(placed.shape, placed.cx, placed.cy, placed.radius)[..., None]
        canvas = canvas * (1 - coverage) + np.array(COLORS[placed.color], np.float32) * coverage
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _layouts_hold(relation: str, centers_KN2: np.ndarray) -> np.ndarray:
    """Which layouts [K] have the second object beyond doubt in that relation to the first.

    Its axis dominates, and the objects do not overlap along it.
    """
    dx, dy = (centers_KN2[:, 1] - centers_KN2[:, 0]).T
    along, across = {
        "left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx),
    }[relation]  # fmt: skip
    return (along > 1.8 * RADIUS) & (np.abs(across) <= 0.6 * along)


def _place(kinds: list[tuple[str, str]], relation: str | None, rng: np.random.Generator) -> tuple[PlacedShape, ...]:
    """Random non-overlapping places for (shape, colour) pairs; with a relation, the second stands so to the first.

    Draws whole layouts and takes the first in which every pair of bounding boxes is `GAP` pixels apart.
    """
    unit_boxes_N4 = np.stack([_unit_box(shape) for shape, _ in kinds])
    first, second = np.triu_indices(len(kinds), 1)
    while True:  # four objects fit, so this ends, mostly in the first round
        centers_KN2 = rng.choice(CENTERS, size=(LAYOUTS_PER_DRAW[len(kinds)], len(kinds), 2))
        low_KN2 = centers_KN2 + RADIUS * unit_boxes_N4[:, :2]
        high_KN2 = centers_KN2 + RADIUS * unit_boxes_N4[:, 2:]
        gaps = np.maximum(low_KN2[:, first] - high_KN2[:, second], low_KN2[:, second] - high_KN2[:, first]).max(-1)
        good_K = (gaps >= GAP).all(-1)
        if relation is not None:
            good_K &= _layouts_hold(relation, centers_KN2)
        if good_K.any():
            k = int(good_K.argmax())
            return tuple(
                PlacedShape(shape, color, float(cx), float(cy), RADIUS)
                for (shape, color), (cx, cy) in zip(kinds, centers_KN2[k], strict=True)
            )


def _sample(metadata: dict[str, Any], rng: np.random.Generator) -> ShapesSample:
    kinds: list[tuple[str, str]] = []
    relation = None
    for entry in metadata["include"]:
        relation = entry.get("position", [relation])[0]
        color = entry.get("color") or str(rng.choice(list(COLORS)))
        kinds += [(entry["class"], color)] * entry["count"]  # what is counted is of one colour
    objects = _place(kinds, relation, rng)
    return ShapesSample(draw(objects, background(rng)), metadata["prompt"], metadata, objects)


def _metadata(tag: str, include: list[dict[str, Any]]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tag": tag, "include": include}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return metadata | {"prompt": prompt_for(tag, include)}


def _training_metadata(rng: np.random.Generator) -> dict[str, Any]:
    tag = str(rng.choice(TASKS, p=[TASK_WEIGHTS[task] for task in TASKS]))
    while True:
        first, second = (str(s) for s in rng.choice(SHAPES, size=2, replace=False))
        if frozenset((first, second)) not in HELD_OUT_PAIRS.get(tag, ()):
            break
    color_a, color_b = (str(c) for c in rng.choice(list(COLORS), size=2, replace=False))
    one: dict[str, Any] = {"class": first, "count": 1}
    other: dict[str, Any] = {"class": second, "count": 1}
    if tag == "single_object":
        return _metadata(tag, [one])
    if tag == "two_object":
        return _metadata(tag, [one, other])
    if tag == "counting":
        return _metadata(tag, [one | {"count": int(rng.integers(2, 4, endpoint=True))}])
    if tag == "colors":
        return _metadata(tag, [one | {"color": color_a}])
    if tag == "color_attr":
        return _metadata(tag, [one | {"color": color_a}, other | {"color": color_b}])
    if rng.random() < 0.5:
        one, other = one | {"color": color_a}, other | {"color": color_b}
    return _metadata("position", [one, other | {"position": [str(rng.choice(RELATIONS)), 0]}])


def training_sample(seed: int, index: int) -> ShapesSample:
    """Sample `index` of the training set `seed`: always the same picture, whatever else is made."""
    rng = np.random.default_rng([seed, index, 0])
    return _sample(_training_metadata(rng), rng)


def single_object_sample(seed: int, index: int) -> ShapesSample:
    """Sample `index` of the set `seed` of pictures of one shape, whose kind is the class; half of the captions name its
    colour."""
    rng = np.random.default_rng([seed, index, 3])
    entry: dict[str, Any] = {"class": str(rng.choice(SHAPES)), "count": 1}
    if rng.random() < 0.5:
        return _sample(_metadata("single_object", [entry]), rng)
    return _sample(_metadata("colors", [entry | {"color": str(rng.choice(list(COLORS)))}]), rng)


def label_of(sample: ShapesSample) -> int:
    """The class of a picture: the place in `SHAPES` of its first object's kind."""
    return SHAPES.index(sample.objects[0].shape)


def ground_truth(metadata: dict[str, Any], seed: int) -> ShapesSample:
    """A correct picture for a prompt (GenEval metadata over shapes), from other random numbers than training."""
    return _sample(metadata, np.random.default_rng([seed, 0, 1]))


def evaluation_metadata(per_task: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """The prompts of GenEval-shapes: GenEval metadata, at most `per_task` a task, tasks in GenEval's order.

    single_object has 8 prompts, two_object 16, counting 24, colors 80, position 64 and color_attr 1440 to draw from;
    a combination task holds only its own pairs from `HELD_OUT_PAIRS`. A task with more prompts than `per_task` is a random
    subset that depends on `seed`.
    """
    if per_task < 1:
        raise ValueError(f"per_task is {per_task}; at least one prompt a task is needed")
    ordered = {
        task: sorted((a, b) for pair in pairs for a in pair for b in pair if a != b)
        for task, pairs in HELD_OUT_PAIRS.items()
    }
    prompts: dict[str, list[list[dict[str, Any]]]] = {
        "single_object": [[{"class": s, "count": 1}] for s in SHAPES],
        "two_object": [[{"class": a, "count": 1}, {"class": b, "count": 1}] for a, b in ordered["two_object"]],
        "counting": [[{"class": s, "count": n}] for s in SHAPES for n in (2, 3, 4)],
        "colors": [[{"class": s, "count": 1, "color": c}] for s in SHAPES for c in COLORS],
        "position": [
            [{"class": a, "count": 1}, {"class": b, "count": 1, "position": [relation, 0]}]
            for a, b in ordered["position"]
            for relation in RELATIONS
        ],
        "color_attr": [
            [{"class": a, "count": 1, "color": color_a}, {"class": b, "count": 1, "color": color_b}]
            for a, b in ordered["color_attr"]
            for color_a in COLORS
            for color_b in COLORS
            if color_a != color_b
        ],
    }
    rng = np.random.default_rng([seed, 2])
    chosen = []
    for tag in TASKS:
        pool = prompts[tag]
        order = range(len(pool)) if len(pool) <= per_task else sorted(rng.choice(len(pool), per_task, replace=False))
        chosen += [_metadata(tag, pool[i]) for i in order]
    return chosen
