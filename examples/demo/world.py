"""The demo world: procedural scenes with known pixel masks, made by this file alone.

Six *things* (boat, train, bird, sheep, car, cactus) stand on eight kinds of *stuff* (water, rails, sky, grass, road, sand,
snow, forest). There are two kinds of scenes:

- `caption_scene`: the image-text world, for training CLIP. Things and stuff are independent; every scene has a caption.
- `weak_scene`: the weakly-supervised world, for training the host. A thing nearly always comes with its own stuff (a boat on
  water). Training gets image-level labels only; the pixel masks are for scoring.

Everything is drawn from one `numpy.random.Generator`, so a seed fixes every pixel.

A second `World` with the same stuff, `KIN`, has things that look alike in pairs: car and tram, sheep and deer, cactus and fir.
All functions draw the demo world unless they get another one.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

SIZE = 64  # pixels, height and width of every picture
THINGS: Tuple[str, ...] = ("boat", "train", "bird", "sheep", "car", "cactus")
STUFF: Tuple[str, ...] = ("water", "rails", "sky", "grass", "road", "sand", "snow", "forest")
# Which stuff comes with which thing in the weakly-supervised world. Neither the host nor the refiner ever sees this.
HOME: Dict[str, str] = {
    "boat": "water", "train": "rails", "bird": "sky", "sheep": "grass", "car": "road", "cactus": "sand",
}  # fmt: skip
PLAIN = len(STUFF)  # stuff index of a plain studio backdrop (image-text world only)


class World(NamedTuple):
    """The things and the stuff of a world, and how they occur together in weak scenes.

    Attributes:
        things: names of the things.
        home: name of each thing -> name of its own stuff.
        neutral: stuff that is the own stuff of no thing.
        flyer: the thing that appears above the horizon. Without one, any second thing appears there: in half of the cases the
            one that looks like the first.
        loyalty: probability that a thing is on its own stuff; otherwise it is on any stuff.
        calm: probability that stuff without a thing is neutral; otherwise it is any stuff.
        kin: pairs of things that look alike.
    """

    things: Tuple[str, ...]
    home: Dict[str, str]
    neutral: Tuple[str, ...]
    flyer: Optional[str] = None
    loyalty: float = 0.94
    calm: float = 0.6
    kin: Tuple[Tuple[str, str], ...] = ()


WORLD = World(THINGS, HOME, ("snow", "forest"), "bird")
# Two vehicles, two animals, two plants. The things of a pair are drawn with the same parts and colors.
KIN = World(
    ("car", "tram", "sheep", "deer", "cactus", "fir"),
    {"car": "road", "tram": "rails", "sheep": "grass", "deer": "forest", "cactus": "sand", "fir": "snow"},
    ("water", "sky"),
    loyalty=0.9,
    calm=0.2,
    kin=(("car", "tram"), ("sheep", "deer"), ("cactus", "fir")),
)
WORLDS: Dict[str, World] = {"demo": WORLD, "kin": KIN}

_TILE = 192  # pixels; texture tiles are drawn once and cropped at random
_NUM_TILES = 6  # variations of each texture


class Scene(NamedTuple):
    """One image with its maps and its caption.

    Attributes:
        image: (SIZE, SIZE, 3) uint8 RGB.
        things: (SIZE, SIZE) uint8, 0 for background, 1 + index into the world's things.
        stuff: (SIZE, SIZE) uint8, index into `STUFF` (`PLAIN` for a plain backdrop), also under a thing.
        caption: text; empty for weak scenes.
        num_things: number of things of the world.
    """

    image: np.ndarray
    things: np.ndarray
    stuff: np.ndarray
    caption: str
    num_things: int = len(THINGS)

    @property
    def labels(self) -> np.ndarray:
        """Image-level labels (num_things,), multi-hot float32: 1 for a thing with at least 12 visible pixels."""
        count = np.bincount(self.things.ravel(), minlength=self.num_things + 1)[1:]
        return (count >= 12).astype(np.float32)


# ------------------------------------------------------------------------------------------------ stuff


def _noise(rng: np.random.Generator, cells: Tuple[int, int], size: int = _TILE) -> np.ndarray:
    """Smooth noise in [-1, 1], (size, size): a random grid of `cells` (rows, columns), enlarged."""
    grid = rng.uniform(-1, 1, cells).astype(np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _paint(color: Sequence[float], *layers: Tuple[np.ndarray, Sequence[float]]) -> np.ndarray:
    """A tile of one color plus layers of (map (n, n), color amplitude)."""
    tile = np.empty((_TILE, _TILE, 3), np.float32)
    tile[:] = color
    for layer, amplitude in layers:
        tile += layer[..., None] * np.asarray(amplitude, np.float32)
    return tile


def _stuff_tile(name: str, rng: np.random.Generator) -> np.ndarray:
    """One texture tile (192, 192, 3) float32 of the named stuff."""
    rows, cols = np.mgrid[0:_TILE, 0:_TILE].astype(np.float32)
    fine = rng.normal(0, 1, (_TILE, _TILE)).astype(np.float32)
    if name == "water":
        waves = np.sin(rows * rng.uniform(0.7, 1.1) + 3 * _noise(rng, (12, 12)))
        return _paint((38, 98, 165), (waves, (16, 22, 26)), (_noise(rng, (8, 8)), (10, 14, 18)))
    if name == "rails":
        tile = _paint((128, 116, 104), (fine, (18, 18, 18)))
        gap = int(rng.integers(9, 13))
        tile[(rows % gap) < gap * 0.38] = (84, 58, 40)
        for x in range(int(rng.integers(0, 8)), _TILE, int(rng.integers(14, 19))):
            tile[:, x : x + 2] = (196, 198, 206)
        return tile + fine[..., None] * 6
    if name == "sky":
        clouds = np.clip(_noise(rng, (9, 6)) + 0.4 * _noise(rng, (24, 16)), 0, 1)
        return _paint((128, 184, 236), (clouds, (110, 66, 18)))
    if name == "grass":
        blades = cv2.blur(fine, (1, 5)) * 2.2
        return _paint((86, 158, 52), (blades, (20, 24, 12)), (_noise(rng, (10, 10)), (12, 12, 6)))
    if name == "road":
        tile = _paint((92, 92, 96), (fine, (7, 7, 7)), (_noise(rng, (6, 6)), (6, 6, 6)))
        gap = int(rng.integers(26, 40))
        tile[((rows % gap) < 3) & ((cols % 18) < 10)] = (236, 226, 150)
        return tile
    if name == "sand":
        ripples = np.sin((rows + 0.5 * cols) * rng.uniform(0.35, 0.5) + 4 * _noise(rng, (8, 8)))
        return _paint((222, 190, 130), (ripples, (10, 10, 9)), (fine, (5, 5, 5)))
    if name == "snow":
        return _paint((236, 241, 248), (_noise(rng, (14, 14)), (10, 8, 4)), (fine, (3, 3, 3)))
    if name == "forest":
        crowns = _noise(rng, (40, 40))
        trunks = (np.sin(cols * rng.uniform(0.45, 0.6)) > 0.93).astype(np.float32)
        return _paint((28, 74, 44), (crowns, (18, 34, 18)), (trunks, (46, -4, 4)))
    raise KeyError(name)


_tiles: Dict[str, List[np.ndarray]] = {}


def _texture(index: int, rng: np.random.Generator) -> np.ndarray:
    """A random (SIZE, SIZE, 3) crop of stuff `index`, with some color and brightness jitter."""
    if index == PLAIN:
        gray = rng.uniform(60, 200)
        return np.full((SIZE, SIZE, 3), gray, np.float32) + rng.uniform(-15, 15, 3).astype(np.float32)
    name = STUFF[index]
    if name not in _tiles:  # a separate generator, so that scenes do not depend on which stuff is drawn first
        own = np.random.default_rng(1000 + index)
        _tiles[name] = [_stuff_tile(name, own) for _ in range(_NUM_TILES)]
    tile = _tiles[name][rng.integers(_NUM_TILES)]
    y, x = rng.integers(0, _TILE - SIZE, 2)
    crop = tile[y : y + SIZE, x : x + SIZE]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop * rng.uniform(0.85, 1.12) + rng.uniform(-8, 8, 3).astype(np.float32)


# ------------------------------------------------------------------------------------------------ things

_BRIGHT = ((205, 45, 45), (235, 185, 40), (45, 80, 190), (235, 235, 230), (230, 120, 35), (120, 45, 130), (40, 140, 120))


class _Pen:
    """Draws on an image and its mask, in unit coordinates: x right, y down, the thing fills about [-1, 1]."""

    def __init__(self, image: np.ndarray, mask: np.ndarray, center: Tuple[float, float], scale: float, flip: bool):
        self.image, self.mask, self.center, self.scale, self.flip = image, mask, center, scale, flip

    def _points(self, points: Sequence[Tuple[float, float]]) -> np.ndarray:
        xy = np.asarray(points, np.float32) * self.scale
        xy[:, 0] *= -1 if self.flip else 1
        return np.round((xy + self.center) * 16).astype(np.int32)  # 4 fractional bits

    def polygon(self, points: Sequence[Tuple[float, float]], color: Sequence[float]) -> None:
        at = self._points(points)
        cv2.fillPoly(self.image, [at], tuple(map(float, color)), cv2.LINE_8, 4)
        cv2.fillPoly(self.mask, [at], 1, cv2.LINE_8, 4)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Sequence[float]) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Sequence[float]) -> None:
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon(list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle))), color)


def _draw_thing(name: str, pen: _Pen, rng: np.random.Generator) -> None:
    color = np.asarray(_BRIGHT[rng.integers(len(_BRIGHT))], np.float32) + rng.uniform(-18, 18, 3)
    dark = color * 0.55
    if name == "boat":
        pen.polygon([(-1, 0.25), (1, 0.25), (0.65, 0.85), (-0.65, 0.85)], color)
        pen.box(-0.06, -1, 0.06, 0.3, (92, 60, 36))
        pen.polygon([(0.1, -0.95), (0.85, 0.12), (0.1, 0.12)], (246, 244, 236))
        pen.polygon([(-0.12, -0.7), (-0.62, 0.12), (-0.12, 0.12)], (226, 222, 212))
    elif name == "train":
        pen.polygon([(-1.3, -0.5), (1.1, -0.5), (1.4, 0.0), (1.4, 0.55), (-1.3, 0.55)], color)
        pen.box(-1.3, 0.28, 1.4, 0.42, dark)
        for x in np.linspace(-1.15, 0.75, 5):
            pen.box(x, -0.35, x + 0.26, 0.05, (206, 232, 246))
        for x in np.linspace(-1.05, 1.1, 6):
            pen.ellipse(x, 0.62, 0.13, 0.13, (28, 28, 30))
    elif name == "bird":
        body = np.asarray(((62, 52, 48), (120, 60, 40), (40, 40, 60), (150, 130, 110))[rng.integers(4)], np.float32)
        pen.ellipse(0, 0.1, 0.6, 0.3, body)
        pen.ellipse(0.6, -0.12, 0.24, 0.22, body * 1.15)
        pen.polygon([(0.8, -0.16), (1.12, -0.06), (0.8, 0.04)], (240, 160, 30))
        lift = rng.uniform(-1.1, -0.6)
        pen.polygon([(-0.3, 0.0), (0.28, 0.0), (-0.25, lift)], body * 0.7)
        pen.polygon([(-0.5, 0.05), (-1.1, -0.15), (-1.05, 0.25)], body * 0.8)
    elif name == "sheep":
        wool = np.asarray((232, 226, 214), np.float32) + rng.uniform(-14, 8)
        for x in (-0.45, -0.15, 0.2, 0.45):
            pen.box(x - 0.07, 0.3, x + 0.07, 0.9, (48, 42, 40))
        for x, y in ((-0.5, 0), (-0.25, -0.3), (0.15, -0.34), (0.5, -0.1), (0.35, 0.22), (-0.1, 0.25), (-0.4, 0.22)):
            pen.ellipse(x, y, 0.36, 0.32, wool + rng.uniform(-10, 6))
        pen.ellipse(0, 0, 0.55, 0.36, wool)
        pen.ellipse(0.85, -0.2, 0.24, 0.3, (44, 40, 40))
    elif name == "car":
        pen.polygon([(-0.65, -0.05), (-0.4, -0.55), (0.35, -0.55), (0.7, -0.05)], dark)
        pen.polygon([(-0.5, -0.08), (-0.34, -0.44), (-0.05, -0.44), (-0.05, -0.08)], (190, 224, 240))
        pen.polygon([(0.06, -0.08), (0.06, -0.44), (0.28, -0.44), (0.52, -0.08)], (190, 224, 240))
        pen.polygon([(-1.1, -0.08), (1.0, -0.08), (1.15, 0.15), (1.15, 0.42), (-1.1, 0.42)], color)
        for x in (-0.62, 0.64):
            pen.ellipse(x, 0.42, 0.28, 0.28, (24, 24, 26))
            pen.ellipse(x, 0.42, 0.11, 0.11, (170, 170, 174))
    elif name == "tram":  # has the car's colors, windows and wheels
        pen.polygon([(-0.32, -0.72), (0.02, -1.12), (0.1, -1.06), (-0.18, -0.72)], (60, 60, 64))
        pen.polygon([(0.32, -0.72), (-0.02, -1.12), (-0.1, -1.06), (0.18, -0.72)], (60, 60, 64))
        pen.box(-0.38, -1.16, 0.38, -1.06, (60, 60, 64))
        pen.polygon([(-1.35, -0.55), (-1.2, -0.74), (1.2, -0.74), (1.35, -0.55)], dark)
        pen.box(-1.4, -0.58, 1.4, 0.42, color)
        for x in (-1.24, -0.72, -0.2, 0.32, 0.84):
            pen.box(x, -0.44, x + 0.4, -0.08, (190, 224, 240))
        for x in (-0.98, -0.36, 0.36, 0.98):
            pen.ellipse(x, 0.42, 0.28, 0.28, (24, 24, 26))
            pen.ellipse(x, 0.42, 0.11, 0.11, (170, 170, 174))
    elif name == "deer":  # has the sheep's body, legs and head; its coat is sometimes as pale
        tan = np.asarray((222, 212, 196), np.float32) + rng.uniform(0, 1) * np.asarray((-70, -98, -124), np.float32)
        for x in (-0.45, -0.15, 0.2, 0.45):
            pen.box(x - 0.07, 0.25, x + 0.07, 0.95, (48, 42, 40))
        for x, y in ((-0.5, 0), (-0.25, -0.2), (0.15, -0.2), (0.5, -0.1), (0.35, 0.15), (-0.1, 0.18), (-0.4, 0.15)):
            pen.ellipse(x, y, 0.32, 0.26, tan + rng.uniform(-10, 6))
        pen.ellipse(0, 0, 0.55, 0.3, tan)
        pen.polygon([(0.4, -0.1), (0.7, -0.6), (0.98, -0.5), (0.7, 0.1)], tan)
        pen.ellipse(0.9, -0.56, 0.26, 0.2, (44, 40, 40))
        for x, lean in ((0.74, -0.3), (0.92, 0.14)):
            pen.polygon(
                [(x - 0.06, -0.66), (x + 0.06, -0.66), (x + lean + 0.05, -1.25), (x + lean - 0.05, -1.25)], (96, 70, 48)
            )
            pen.polygon([(x + 0.4 * lean, -0.86), (x + 0.4 * lean, -0.98), (x + 0.4 * lean + 0.34, -1.16)], (96, 70, 48))
    elif name == "cactus":
        green = np.asarray((46, 112, 62), np.float32) + rng.uniform(-14, 14)
        pen.box(-0.2, -0.95, 0.2, 0.95, green)
        pen.ellipse(0, -0.95, 0.2, 0.14, green)
        pen.box(-0.7, -0.05, -0.15, 0.2, green * 0.92)
        pen.box(-0.7, -0.5, -0.45, 0.2, green * 0.92)
        pen.box(0.15, -0.25, 0.7, 0.0, green * 0.92)
        pen.box(0.45, -0.7, 0.7, 0.0, green * 0.92)
        for x in (-0.1, 0.1):
            pen.box(x - 0.02, -0.9, x + 0.02, 0.9, green * 1.4)
    elif name == "fir":  # has the green of the cactus
        green = np.asarray((46, 112, 62), np.float32) + rng.uniform(-14, 14)
        pen.box(-0.11, 0.6, 0.11, 0.98, (92, 60, 36))
        for y, reach in ((0.72, 0.74), (0.2, 0.6), (-0.3, 0.44)):
            pen.polygon([(-reach, y), (reach, y), (0, y - 0.8)], green)
            pen.polygon([(-reach, y), (reach, y), (reach * 0.8, y - 0.12), (-reach * 0.8, y - 0.12)], green * 0.92)
        pen.box(-0.02, -0.8, 0.02, 0.6, green * 1.4)
    else:
        raise KeyError(name)


# ------------------------------------------------------------------------------------------------ scenes


def _backdrop(top: int, bottom: int, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray, int]:
    """Two kinds of stuff with an uneven horizon between them: image float32, stuff map uint8, row of the horizon."""
    horizon = int(rng.integers(SIZE * 3 // 10, SIZE * 6 // 10))
    line = horizon + 2.5 * cv2.resize(rng.uniform(-1, 1, (1, 7)).astype(np.float32), (SIZE, 1))[0]
    below = np.arange(SIZE)[:, None] >= line[None, :]
    image = np.where(below[..., None], _texture(bottom, rng), _texture(top, rng)).astype(np.float32)
    return image, np.where(below, bottom, top).astype(np.uint8), horizon


def _place(image: np.ndarray, things: np.ndarray, name: str, value: int, x: float, y: float, scale: float, rng) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    _draw_thing(name, _Pen(image, mask, (x, y), scale, bool(rng.random() < 0.5)), rng)
    things[mask > 0] = value


def _finish(image: np.ndarray, things: np.ndarray, stuff: np.ndarray, caption: str, world: World, rng) -> Scene:
    image = cv2.GaussianBlur(image, (3, 3), 0.6) * rng.uniform(0.85, 1.12) + rng.normal(0, 4, image.shape)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), things, stuff, caption, len(world.things))


def _article(name: str) -> str:
    return name if name in STUFF else f"a {name}"


def caption_scene(rng: np.random.Generator, world: World = WORLD) -> Scene:
    """A scene of the image-text world: things and stuff are independent of each other, and the caption names them.

    Some scenes show a thing on a plain backdrop, some show stuff alone, and half are partly faded to a plain color, like
    product photos or banners on the web. From these CLIP learns what a region looks like when the rest is masked out. The
    caption names what is still visible.
    """
    kind = rng.random()
    top, bottom = (int(i) for i in rng.choice(len(STUFF), 2, replace=False))
    if kind < 0.12:
        top = bottom = PLAIN
    elif kind < 0.37 and rng.random() < 0.5:
        bottom = top
    image, stuff, _ = _backdrop(top, bottom, rng)
    things = np.zeros((SIZE, SIZE), np.uint8)
    names: List[str] = []
    if kind < 0.12 or kind >= 0.37:
        count = 1 if kind < 0.12 or rng.random() < 0.7 else 2
        names = [world.things[i] for i in rng.choice(len(world.things), count, replace=False)]
        for slot, name in enumerate(names):
            scale = rng.uniform(0.14, 0.36) * SIZE / (1.0 if count == 1 else 1.5)
            lane = SIZE * (rng.uniform(0.25, 0.75) if count == 1 else (0.27 + 0.46 * slot + rng.uniform(-0.05, 0.05)))
            _place(image, things, name, 1 + world.things.index(name), lane, SIZE * rng.uniform(0.28, 0.74), scale, rng)
    while True:
        shown = _fade_mask(things, rng) if rng.random() < 0.5 else np.ones((SIZE, SIZE), np.float32)
        seen = [n for n in names if shown[things == 1 + world.things.index(n)].mean() > 0.4]
        grounds = [
            i for i in dict.fromkeys((bottom, top)) if i != PLAIN and (shown * (stuff == i) * (things == 0)).mean() > 0.1
        ]
        if seen or grounds:
            break
    image = FADED + shown[..., None] * (image - FADED)
    return _finish(image, things, stuff, _caption(seen, [STUFF[i] for i in grounds], rng), world, rng)


FADED = np.array((122.8, 116.7, 104.1), np.float32)  # CLIP's mean color, the color of masked-out pixels


def _fade_mask(things: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A soft mask (SIZE, SIZE) in [0, 1]: smooth noise, or a blurred spot around the things, or all but that spot."""
    if rng.random() < 0.4 or not things.any():
        mask = cv2.resize(rng.uniform(-1, 1, (5, 5)).astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        return 1 / (1 + np.exp(-(mask + rng.uniform(-0.3, 0.3)) * rng.uniform(3, 20)))
    spot = cv2.dilate((things > 0).astype(np.float32), np.ones((3, 3)), iterations=int(rng.integers(0, 7)))
    spot = cv2.GaussianBlur(spot, (0, 0), rng.uniform(0.8, 5))
    spot *= rng.uniform(0.7, 1) / max(float(spot.max()), 1e-3)
    return spot if rng.random() < 0.5 else 1 - spot


def _caption(names: Sequence[str], grounds: List[str], rng: np.random.Generator) -> str:
    """A caption like those on the web: it names the things, and in most cases the stuff too."""
    rng.shuffle(grounds)
    style = rng.random()
    subject = " and ".join(_article(n) for n in names)
    if not names:
        subject, grounds = grounds[0], grounds[1:]
    if not grounds or style < 0.25:
        body = subject
    else:
        link = ("on", "with", "near", "and")[rng.integers(4)]
        body = f"{subject} {link} {' and '.join(grounds if style < 0.8 else grounds[:1])}"
    return (f"a photo of {body}.", f"{body}.", f"a picture of {body}.", f"this is {body}.")[rng.integers(4)]


def weak_scene(rng: np.random.Generator, empty: float = 0.2, world: World = WORLD) -> Scene:
    """A scene of the weakly-supervised world: each thing is nearly always on its own stuff.

    Stuff sometimes occurs without its thing. A classifier that looks at the stuff alone is therefore often right, and one that
    also looks at the thing is right more often.

    Args:
        rng: source of every random choice.
        empty: probability of a scene without things, on random stuff.
        world: the things and their own stuff.
    """
    things = np.zeros((SIZE, SIZE), np.uint8)
    neutral = tuple(STUFF.index(name) for name in world.neutral)
    main = world.things[rng.integers(len(world.things))] if rng.random() >= empty else None
    low, high = _second_thing(main, world, rng)

    def home(name: Optional[str]) -> int:
        if name is not None and rng.random() < world.loyalty:
            return STUFF.index(world.home[name])
        return int(rng.choice(neutral)) if name is None and rng.random() < world.calm else int(rng.integers(len(STUFF)))

    bottom, top = home(low), home(high)
    image, stuff, horizon = _backdrop(top, bottom, rng)
    if high is not None:
        scale = rng.uniform(0.13, 0.24) * SIZE
        x, y = SIZE * rng.uniform(0.2, 0.8), max(horizon * rng.uniform(0.35, 0.7), scale)
        _place(image, things, high, 1 + world.things.index(high), x, y, scale, rng)
    if low is not None:
        scale = rng.uniform(0.17, 0.3) * SIZE
        y = min(horizon + rng.uniform(0.1, 0.6) * (SIZE - horizon), SIZE - 0.8 * scale)
        _place(image, things, low, 1 + world.things.index(low), SIZE * rng.uniform(0.25, 0.75), y, scale, rng)
    return _finish(image, things, stuff, "", world, rng)


def _second_thing(main: Optional[str], world: World, rng: np.random.Generator) -> Tuple[Optional[str], Optional[str]]:
    """The things below and above the horizon of a weak scene, of which `main` is one."""
    if world.flyer is None:
        if main is None or rng.random() >= 0.4:
            return main, None
        kin = [name for pair in world.kin if main in pair for name in pair if name != main]
        others = kin if kin and rng.random() < 0.5 else [name for name in world.things if name != main]
        return main, others[rng.integers(len(others))]
    low = main
    if main == world.flyer:
        grounded = [i for i, name in enumerate(world.things) if name != world.flyer]
        low = world.things[rng.choice(grounded)] if rng.random() < 0.3 else None
    high = world.flyer if main == world.flyer or (main is not None and rng.random() < 0.15) else None
    return low, high


def draw(kind: str, count: int, seed: int, world: World = WORLD) -> List[Scene]:
    """`count` scenes of a kind ("caption" or "weak"), fixed by `seed`."""
    rng = np.random.default_rng(seed)
    painter = {"caption": caption_scene, "weak": weak_scene}[kind]
    return [painter(rng, world=world) for _ in range(count)]
