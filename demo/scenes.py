"""Renders the demo data set: scenes of textured shapes with boxes and masks, in COCO format.

Everything is drawn with NumPy from signed distances, so a seed gives the same pixels on every machine::

    python demo/scenes.py --out demo/data                        # what the demo evaluates and calibrates on
    python demo/scenes.py --out demo/data --splits train val     # what the shipped checkpoint was trained on
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

SIZE = 192
CLASSES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = dict(train=(3000, 1), val=(100, 2), calib=(32, 3))  # name: (images, seed)
MIN_VISIBLE = 0.4  # an object keeps at least this share of its area after occlusion


def polygon_sdf(x, y, corners):
    """Signed distance to a polygon, negative inside.

    Args:
        x, y (np.ndarray): Coordinates of the pixels, (H, W).
        corners (np.ndarray): Vertices in order, (K, 2).

    Returns:
        np.ndarray: Distances in the unit of the coordinates, (H, W).
    """
    point = np.stack([x, y], -1)
    best = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        edge, rel = b - a, point - a
        t = np.clip((rel @ edge) / (edge @ edge), 0, 1)[..., None]
        best = np.minimum(best, np.linalg.norm(rel - t * edge, axis=-1))
        crosses = (a[1] > y) != (b[1] > y)
        with np.errstate(divide='ignore', invalid='ignore'):
            at = (y - a[1]) / (b[1] - a[1]) * (b[0] - a[0]) + a[0]
        inside ^= crosses & (x < at)
    return np.where(inside, -best, best)


def regular(points, inner=1.0):
    """Corners of a regular polygon of radius 1, or of a star when ``inner`` is below 1, (K, 2)."""
    angle = np.arange(points) * 2 * np.pi / points - np.pi / 2
    radius = np.where(np.arange(points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]


CROSS = np.array([(.35, 1), (.35, .35), (1, .35), (1, -.35), (.35, -.35), (.35, -1), (-.35, -1), (-.35, -.35),
                  (-1, -.35), (-1, .35), (-.35, .35), (-.35, 1)])


def shape_sdf(name, x, y):
    """Signed distance of a class of unit size around the origin, (H, W) from (H, W) coordinates."""
    radius = np.hypot(x, y)
    if name == 'disk':
        return radius - 1
    if name == 'ring':
        return np.abs(radius - 0.75) - 0.25
    corners = dict(square=regular(4), triangle=regular(3), star=regular(10, 0.45), cross=CROSS)[name]
    return polygon_sdf(x, y, corners)


def smooth_noise(rng, cells):
    """Low-frequency noise in 0..1 of SIZE x SIZE, bilinear between ``cells`` x ``cells`` random values."""
    grid = rng.random((cells + 1, cells + 1))
    at = np.linspace(0, cells, SIZE, endpoint=False)
    low, frac = at.astype(int), at % 1
    rows = grid[low] * (1 - frac)[:, None] + grid[low + 1] * frac[:, None]
    return rows[:, low] * (1 - frac) + rows[:, low + 1] * frac


def texture(rng, u, v):
    """A random pattern in 0..1 over object coordinates, (H, W) from (H, W)."""
    kind, frequency = rng.integers(5), rng.uniform(2, 7)
    if kind == 0:
        return np.zeros_like(u)
    if kind == 1:
        return 0.5 + 0.5 * np.sign(np.sin(u * frequency * np.pi))
    if kind == 2:
        return 0.5 + 0.5 * np.sign(np.sin(u * frequency * np.pi) * np.sin(v * frequency * np.pi))
    if kind == 3:
        return (np.hypot((u * frequency) % 1 - .5, (v * frequency) % 1 - .5) < 0.3).astype(float)
    return np.clip(0.5 + 0.5 * (u * np.cos(frequency) + v * np.sin(frequency)), 0, 1)


def colours(rng):
    """Two RGB colours in 0..255 far enough apart to be told from each other, (2, 3)."""
    while True:
        pair = rng.uniform(20, 240, (2, 3))
        if np.abs(pair[0] - pair[1]).sum() > 150:
            return pair


def blend(image, alpha, colour):
    return image * (1 - alpha[..., None]) + colour * alpha[..., None]


def render(rng, max_objects=9):
    """Draws one scene.

    Args:
        rng (np.random.Generator): Source of all randomness.
        max_objects (int): Most objects in the scene. Defaults to 9.

    Returns:
        tuple: image (SIZE, SIZE, 3) uint8 RGB; class indices, a list; visible masks, a list of (SIZE, SIZE) bool.
    """
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    pair = colours(rng)
    ground = smooth_noise(rng, int(rng.integers(2, 12)))
    ground = 0.7 * ground + 0.3 * texture(rng, x / 40, y / 40)
    image = pair[0] + (pair[1] - pair[0]) * ground[..., None] * rng.uniform(0.3, 0.8)
    for _ in range(rng.integers(0, 4)):  # clutter: thin lines that are no object
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-60, 60)
        line = np.abs((x - SIZE / 2) * np.cos(angle) + (y - SIZE / 2) * np.sin(angle) - offset)
        image = blend(image, np.clip(1.5 - line, 0, 1), rng.uniform(0, 255, 3))

    labels, visible, areas = [], [], []
    for _ in range(rng.integers(2, max_objects + 1)):
        for _ in range(10):  # attempts to find a place that leaves everybody visible
            label = int(rng.integers(len(CLASSES)))
            size = np.exp(rng.uniform(np.log(9), np.log(46)))
            cx, cy = rng.uniform(0.4 * size, SIZE - 0.4 * size, 2)
            angle = rng.uniform(0, 2 * np.pi)
            u = ((x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)) / size
            v = (-(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)) / size
            distance = shape_sdf(CLASSES[label], u, v) * size
            mask = distance < 0
            if mask.sum() > 60 and all((m & ~mask).sum() >= MIN_VISIBLE * a for m, a in zip(visible, areas)):
                break
        else:
            continue
        shade = np.clip(1 - np.hypot(x - cx - 3, y - cy - 4) / (1.3 * size), 0, 1) * 0.5
        image = blend(image, shade, np.zeros(3))
        pair = colours(rng)
        fill = pair[0] + (pair[1] - pair[0]) * texture(rng, u, v)[..., None]
        fill = fill * (1 - 0.25 * np.clip(v, -1, 1))[..., None]
        image = blend(image, np.clip(0.5 - distance, 0, 1), fill)
        visible = [m & ~mask for m in visible] + [mask]
        labels.append(label)
        areas.append(mask.sum())
    image = image * rng.uniform(0.75, 1.1) + rng.normal(0, rng.uniform(0, 9), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), labels, visible


def write_split(out, name, count, seed):
    """Writes ``out/name/*.png`` and ``out/name.json`` (COCO, RLE masks) unless they are there already."""
    marker = out / f'{name}.json'
    if marker.exists():
        return
    (out / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, labels, masks = render(np.random.default_rng([seed, index]))
        file_name = f'{index:05d}.png'
        Image.fromarray(pixels).save(out / name / file_name)
        images.append(dict(id=index + 1, file_name=file_name, height=SIZE, width=SIZE))
        for label, mask in zip(labels, masks):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = coco_mask.toBbox(rle).tolist()
            annotations.append(
                dict(id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, iscrowd=0, bbox=box,
                     area=int(mask.sum()),
                     segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
    categories = [dict(id=i + 1, name=c) for i, c in enumerate(CLASSES)]
    text = json.dumps(dict(images=images, annotations=annotations, categories=categories, info={}, licenses=[]))
    temporary = marker.with_suffix('.tmp')
    temporary.write_text(text)
    temporary.replace(marker)  # written last and at once: an interrupted run starts the split again


def main():
    parser = argparse.ArgumentParser(description='Render the demo data set (COCO format).')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument('--splits', nargs='+', choices=SPLITS, default=['val', 'calib'])
    args = parser.parse_args()
    for name in args.splits:
        write_split(args.out, name, *SPLITS[name])
        print(f'{name}: {SPLITS[name][0]} scenes in {args.out / name}')


if __name__ == '__main__':
    main()
