"""Draw the small image samples that let the two VAE scripts run at once, offline, without the real data.

    TibetanMNIST.npz   1,000 grey 28x28 pictures of the Tibetan digits U+0F20..U+0F29 and their labels, 100 of each
    anime-faces.zip    400 drawn 64x64 colour faces, data/0.jpg ... data/399.jpg

Both have the names and the format of the real data sets and none of their pictures: all are drawn here, from the
control points below and a fixed seed. No font is used. How the digits are written, and how large, follows the real ones
by eye. What a model learns from these files says that the program works, not how good it is.

A shape is a short text of control points "x,y", in percent of a unit, with y pointing down. A smooth curve runs through
the points; "!" after a point makes a sharp corner there. The same versions of numpy and Pillow write the same bytes.
"""

import argparse
import io
import zipfile
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, ...]

SEED = 2022
PER_DIGIT, DIGIT_SIZE, DIGIT_ZOOM = 100, 28, 8
FACES, FACE_SIZE, FACE_ZOOM = 400, 64, 4

# The ways to write each digit, one a line; "|" lifts the pen. The unit square is the box around the digit.
DIGITS = """
0  50,0! 80,40 100,78 75,100 25,100 0,78 20,40 50,0
0  50,0 88,14 100,52 82,88 50,100 14,88 0,50 12,14 52,1
1  0,45 12,15 50,0 88,6 95,28 75,65 25,100
1  0,62 8,25 12,5! 50,1 95,0! 92,45 72,100
1  0,40 40,25 55,2! 98,4! 40,100
2  0,55 20,20 55,0 78,10 70,32 38,52! 62,60 100,100
2  0,60 10,22 50,0 90,12 85,38 35,85! 65,88 100,100
3  0,50 25,12 60,0 72,14 42,38! 74,42 72,54 45,68! 72,74 100,100
3  0,22 40,0 78,8 30,36! 80,38 36,66! 82,70 98,100
4  98,36 65,24 32,0! 0,40! 35,80 95,100
4  100,18 60,22 30,0! 2,45 30,85 100,100
4  92,10 28,6! 0,62 14,92! 100,100
5  5,0 0,45 14,72 45,68 85,30 | 82,0 86,50 95,100
5  30,0 0,55! 45,62 82,50 | 80,0 80,50 100,100
6  0,0 12,50 40,97 75,95 85,72 66,52! 82,42 100,10
6  75,0 28,12 0,55 18,92 55,100 80,85 74,62! 100,55
7  0,22 22,2 42,14 30,55 24,90 45,100 82,62 100,0
7  0,48 18,10 38,14 42,50 46,100! 75,58 82,12 100,0
8  60,0 0,40! 45,65 100,100
8  100,0 42,36 14,42 | 42,38 82,66 98,100
9  8,100 0,55 30,10 72,0 85,14 60,42! 100,50
9  50,100 8,65 2,25 35,0 72,12 62,42! 100,34
9  0,100 15,30! 30,0 80,0! 92,30 60,48!
"""

# Faces: 100 units are half a face's width and 0,0 is its middle. Outlines that are mirrored give the right half only.
FACE = "0,-110 60,-95 96,-30 93,32 62,82 10,115"
BACK_HAIR = """
0,-160 80,-140 125,-60 128,30 116,100! 60,110
0,-160 80,-140 125,-60 135,60 150,260! 0,260
0,-160 80,-140 128,-50 122,20 146,80 126,140 150,260! 0,260
0,-160 80,-140 120,-60 112,20 92,70! 0,60
0,-160 80,-142 122,-70 132,-20 156,10! 126,20 128,50 146,84! 112,72 100,100 84,124! 0,60
"""
TAILS = """
85,-100! 150,-130 195,-40 180,60 160,170! 130,60 115,-20
50,-140! 70,-190 115,-180 120,-130 90,-100!
"""
LOCKS = """
86,-80! 116,0 110,70 98,130! 88,70 86,0
80,-90! 118,-10 122,90 112,170! 92,90 90,0
"""
# The fringe: one outline over the crown, and the lower edge from right to left.
CROWN = "-112,50! -122,-60 -80,-140 0,-162 80,-140 122,-60 112,50!"
FRINGES = """
94,-10 88,-38! 40,-26 0,-24 -40,-26 -88,-38! -94,-10
95,-20 80,-60! 62,-12! 45,-55! 22,0! 5,-55! -22,-4! -38,-55! -60,-10! -80,-60! -95,-20
96,0 84,-22 40,-58 14,-96! 4,-60 -20,-30! -30,-62! -56,-34 -84,-14 -97,10
98,-30 75,-70 50,-110! 20,-50 -40,-14 -72,-4! -80,-38! -96,0
95,-20 78,-60! 52,-8! 22,-72! 8,-10 0,22! -10,-10 -22,-72! -52,-8! -78,-60! -95,-20
"""
MOUTHS = """
-16,0 0,9 16,0
-9,0 0,2 9,0
-14,1 -7,7 0,1! 7,7 14,1
-18,-2! 0,1 18,-2! 10,16 0,20 -10,16 -18,-2!
-7,0! 0,-5 7,0! 0,10 -7,0!
"""
WHITE = (255, 255, 255)
SKINS = [
    (255, 230, 214),
    (253, 219, 196),
    (248, 208, 178),
    (232, 184, 148),
    (190, 138, 104),
    (150, 102, 76),
]


def path(text: str) -> np.ndarray:
    """Control points (n, 3) of a shape: x, y and 1 for a sharp corner, 0 for a smooth point."""
    return np.array(
        [[*map(float, point.rstrip("!").split(",")), point.endswith("!")] for point in text.split()]
    )


def any_path(table: str, rng: np.random.Generator) -> np.ndarray:
    """The control points (n, 3) of one shape of a table that has one a line."""
    rows = table.split("\n")[1:-1]
    return path(rows[rng.integers(len(rows))])


def mirrored(half: np.ndarray) -> np.ndarray:
    """The closed outline (2n, 3) of a shape whose right half (n, 3) is given from top to bottom."""
    return np.concatenate([half, half[::-1] * [-1, 1, 1]])


def jitter(control: np.ndarray, rng: np.random.Generator, spread: float = 2) -> np.ndarray:
    """The control points (n, 3), each moved by about `spread`, its corner flag kept."""
    return control + rng.normal(0, spread, control.shape) * [1, 1, 0]


def smooth(points: np.ndarray, steps: int = 8) -> np.ndarray:
    """Catmull-Rom curve ((n - 1) * steps + 1, 2) through the points (n, 2)."""
    p = np.concatenate([points[:1], points, points[-1:]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    curve = (
        b
        + (c - a) / 2 * t
        + (a - 2.5 * b + 2 * c - d / 2) * t**2
        + (1.5 * (b - c) + (d - a) / 2) * t**3
    )
    return np.concatenate([curve.swapaxes(0, 1).reshape(-1, 2), points[-1:]])


def trace(control: np.ndarray) -> np.ndarray:
    """The line (m, 2) through control points (n, 3): smooth pieces that meet in the corners."""
    cuts = [0, *np.flatnonzero(control[1:-1, 2]) + 1, len(control) - 1]
    return np.concatenate(
        [smooth(control[i : j + 1, :2]) for i, j in zip(cuts, cuts[1:], strict=False)]
    )


def stroke(draw: ImageDraw.ImageDraw, line: np.ndarray, width: float, colour: int | Colour) -> None:
    """Draw the line (m, 2), in pixels, with a round pen."""
    draw.line([tuple(point) for point in line], fill=colour, width=round(width))
    for x, y in line:  # discs fill the gaps which Pillow leaves where a wide line bends
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


def write_digit(digit: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The lines (m, 2) of one digit as one hand might write it, leaning and in no particular unit."""
    angle, lean = np.radians(rng.uniform(-12, 12)), rng.normal(0, 0.12)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ [
        [1, 0],
        [lean, 1],
    ]
    ways = [row[1:] for row in DIGITS.splitlines() if row.startswith(str(digit))]
    return [
        trace(jitter(path(part), rng, 3.5)) @ turn
        for part in ways[rng.integers(len(ways))].split("|")
    ]


def draw_digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """A uint8 picture (28, 28): the digit in white on black, scaled to a box of varying size near the centre."""
    lines = write_digit(digit, rng)
    width = rng.uniform(1.6, 3.0)
    low, high = np.min([p.min(0) for p in lines], 0), np.max([p.max(0) for p in lines], 0)
    box = np.clip(rng.normal((22, 23), (2.2, 1.6)), 15, 26.5) - width
    shift = rng.normal(0, 0.5, 2).clip(-1, 1) * (DIGIT_SIZE - 1 - box - width) / 2
    image = Image.new("L", (DIGIT_SIZE * DIGIT_ZOOM,) * 2)
    draw = ImageDraw.Draw(image)
    for line in lines:
        pixels = ((line - low) / (high - low) - 0.5) * box + shift + DIGIT_SIZE / 2
        stroke(draw, pixels * DIGIT_ZOOM, width * DIGIT_ZOOM, 255)
    return np.asarray(image.reduce(DIGIT_ZOOM))


def write_digits(file: Path) -> int:
    """Write `image` uint8 (1000, 28, 28) and `label` int64 (1000,) in shuffled order; return their number."""
    rng = np.random.default_rng(SEED)
    labels = rng.permutation(np.repeat(np.arange(10), PER_DIGIT))
    np.savez_compressed(
        file, image=np.stack([draw_digit(digit, rng) for digit in labels]), label=labels
    )
    return len(labels)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour from three numbers of 0..1; the hue may lie outside and wraps around."""
    return tuple(round(255 * part) for part in hsv_to_rgb(hue % 1, saturation, value))


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour `a` with a share of 0..1 of `b` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def darker(colour: Colour, share: float = 0.4) -> Colour:
    """The colour with a share of a dark violet, which looks softer than black."""
    return mix(colour, (50, 20, 50), share)


class Brush:
    """Draws shapes given in face units on a picture, tilted, scaled and shifted together."""

    def __init__(self, image: Image.Image, rng: np.random.Generator) -> None:
        self.draw = ImageDraw.Draw(image)
        angle, self.scale = np.radians(np.clip(rng.normal(0, 6), -14, 14)), rng.uniform(0.66, 0.8)
        cos, sin = self.scale * np.cos(angle), self.scale * np.sin(angle)
        self.matrix, self.centre = np.array([[cos, sin], [-sin, cos]]), rng.normal((128, 134), 4)

    def fill(self, control: np.ndarray, colour: Colour, edge: Colour | None = None) -> None:
        """Fill the closed outline (n, 3), and draw its edge if that has a colour."""
        line = trace(control) @ self.matrix + self.centre
        self.draw.polygon([tuple(point) for point in line], fill=colour)
        if edge:
            stroke(self.draw, line, 3, edge)

    def line(self, control: np.ndarray, width: float, colour: Colour) -> None:
        """Draw the open curve (n, 3), `width` face units wide."""
        stroke(self.draw, trace(control) @ self.matrix + self.centre, width * self.scale, colour)

    def oval(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill an ellipse with the middle x, y."""
        angles = np.linspace(0, 2 * np.pi, 25)
        self.fill(
            np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles), 0 * angles], 1), colour
        )


def background(rng: np.random.Generator) -> Image.Image:
    """A square picture that fades from one pale colour to another."""
    hue = rng.uniform()
    ends = [
        hsv(hue + turn, rng.uniform(0.05, 0.35), rng.uniform(0.75, 1))
        for turn in (0, rng.normal(0, 0.12))
    ]
    size = FACE_SIZE * FACE_ZOOM
    rows = np.linspace(*ends, size)[:, None].repeat(size, 1)
    return Image.fromarray(rows.astype(np.uint8)).rotate(90 * rng.integers(4))


def draw_back(brush: Brush, skin: Colour, hair: Colour, rng: np.random.Generator) -> None:
    """What lies behind the face: perhaps tails or buns, back hair, collar and neck."""
    if rng.uniform() < 0.35:
        tail = any_path(TAILS, rng)
        for side in [(-1, 1), (1,), (-1,)][rng.choice(3, p=[0.6, 0.2, 0.2])]:
            brush.fill(tail * [side, 1, 1], hair, darker(hair))
    brush.fill(
        mirrored(jitter(any_path(BACK_HAIR, rng), rng)), darker(hair, 0.22), darker(hair, 0.5)
    )
    cloth = hsv(rng.uniform(), rng.uniform(0.1, 0.6), rng.uniform(0.35, 1))
    brush.fill(mirrored(path("0,138! 50,142 120,165 150,190 170,280! 0,280")), cloth, darker(cloth))
    brush.fill(
        mirrored(path("0,80! 30,80! 30,135 44,146! 0,185!")), darker(skin, 0.2), darker(skin, 0.4)
    )


def draw_eyes(brush: Brush, lash: Colour, blush: Colour, rng: np.random.Generator) -> None:
    """Both eyes, with their brows and the blush below them; one face in twenty has them closed."""
    (x, y), (w, h) = rng.uniform((40, 26), (47, 36)), rng.uniform((25, 23), (31, 34))
    iris, lift = (
        hsv(rng.uniform(), rng.uniform(0.4, 0.85), rng.uniform(0.55, 0.9)),
        rng.uniform(-4, 6),
    )
    closed = rng.uniform() < 0.05
    for side in (-1, 1):
        size, middle = np.array([side * w / 100, h / 100, 1]), np.array([side * x, y, 0])
        brush.oval(side * 43, y + h + 5, 13, 7, blush)
        brush.line(path("-60,-150 0,-168 70,-145") * size + middle + [0, lift, 0], 5, lash)
        if closed:
            brush.line(path("-95,20 0,-25 95,20") * size + middle, 9, lash)
            continue
        white = path("-92,10! -60,-75 20,-95 82,-50 92,10! 60,80 -20,96 -66,68 -92,10!")
        brush.fill(white * size + middle, (255, 253, 252))
        brush.oval(side * x, y, 0.7 * w, 0.94 * h, darker(iris, 0.5))
        brush.oval(side * x, y + 0.16 * h, 0.61 * w, 0.74 * h, iris)
        brush.oval(side * x, y + 0.5 * h, 0.42 * w, 0.34 * h, mix(iris, WHITE, 0.45))
        brush.oval(side * x, y, 0.27 * w, 0.42 * h, darker(iris, 0.8))
        brush.oval(side * x - 0.22 * w, y - 0.4 * h, 0.24 * w, 0.25 * h, WHITE)
        brush.line(path("-100,0 -62,-78 20,-100 85,-58 112,-5") * size + middle, 10, lash)
        brush.line(path("-35,97 20,98 65,80") * size + middle, 3, lash)


def draw_face(brush: Brush, skin: Colour, hair: Colour, rng: np.random.Generator) -> None:
    """The face itself: outline, eyes, nose and mouth."""
    brush.fill(mirrored(jitter(path(FACE), rng)), skin, darker(skin, 0.35))
    draw_eyes(brush, darker(hair, 0.75), mix(skin, (255, 110, 120), rng.uniform(0.05, 0.4)), rng)
    brush.line(path("0,62 3,67 -2,69"), 4, darker(skin, 0.4))
    mouth = any_path(MOUTHS, rng) * [rng.uniform(0.8, 1.2), 1, 1] + [0, 86, 0]
    if (mouth[0] == mouth[-1]).all():  # a closed outline is an open mouth
        brush.fill(mouth, (214, 92, 100), darker(skin, 0.6))
    else:
        brush.line(mouth, 4.5, darker(skin, 0.6))


def draw_front(brush: Brush, hair: Colour, rng: np.random.Generator) -> None:
    """The hair in front of the face: locks beside the cheeks, the fringe, a band of light, perhaps a bow."""
    flip, edge, light = [rng.choice([-1, 1]), 1, 1], darker(hair), mix(hair, WHITE, 0.35)
    if rng.uniform() < 0.65:
        lock = jitter(any_path(LOCKS, rng), rng)
        for side in (-1, 1):
            brush.fill(lock * [side, 1, 1], hair, edge)
    fringe = np.concatenate([path(CROWN), jitter(any_path(FRINGES, rng), rng), path(CROWN)[:1]])
    brush.fill(fringe * flip, hair, edge)
    brush.line(path("-82,-92 -50,-112 -15,-118") * flip, 9, light)
    brush.line(path("15,-118 30,-116 42,-112") * flip, 7, light)
    if rng.uniform() < 0.25:
        bow = hsv(rng.uniform(), 0.65, 0.9)
        for wing in ("85,-95! 55,-120 60,-75 85,-95!", "85,-95! 118,-110 112,-68 85,-95!"):
            brush.fill(path(wing) * flip, bow, darker(bow))


def hair_colour(rng: np.random.Generator) -> Colour:
    """Half of the time from dark brown to blond, else a fancy colour from teal over blue and violet to red."""
    if rng.uniform() < 0.5:
        return hsv(rng.uniform(0.02, 0.12), rng.uniform(0.25, 0.6), rng.uniform(0.2, 0.95))
    return hsv(rng.uniform(0.45, 1.05), rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.95))


def draw_portrait(rng: np.random.Generator) -> Image.Image:
    """One RGB picture of 64x64 pixels."""
    image = background(rng)
    brush = Brush(image, rng)
    skin = SKINS[rng.choice(len(SKINS), p=[0.3, 0.28, 0.2, 0.1, 0.07, 0.05])]
    hair = hair_colour(rng)
    draw_back(brush, skin, hair, rng)
    draw_face(brush, skin, hair, rng)
    draw_front(brush, hair, rng)
    return image.reduce(FACE_ZOOM)


def write_faces(file: Path) -> int:
    """Write the drawn faces as JPEG files in a zip; return their number."""
    rng = np.random.default_rng(SEED)
    with zipfile.ZipFile(file, "w") as archive:
        for index in range(FACES):
            jpeg = io.BytesIO()
            draw_portrait(rng).save(jpeg, "JPEG", quality=85, optimize=True)
            # A fixed date, or the bytes would differ from run to run.
            archive.writestr(
                zipfile.ZipInfo(f"data/{index}.jpg", date_time=(2022, 1, 1, 0, 0, 0)),
                jpeg.getvalue(),
            )
    return FACES


def main() -> None:
    """Read the command line, write both files, and say what was written."""
    parser = argparse.ArgumentParser(
        description="Draw the small image samples of the two VAE scripts."
    )
    default = Path(__file__).resolve().parent / "sample"
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        help="folder to write to (default: sample beside this file)",
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, what, write in (
        ("TibetanMNIST.npz", "digits", write_digits),
        ("anime-faces.zip", "faces", write_faces),
    ):
        count = write(out / name)
        print(f"{out / name}: {count:,} {what}, {(out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
