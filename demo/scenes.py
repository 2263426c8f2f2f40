"""Renders the demo data sets: scenes of textured shapes, and single shapes.

Everything is drawn with NumPy from signed distances, so a seed gives the same pixels on every machine::

    python demo/scenes.py --out demo/data                        # what the demos evaluate and calibrate on
    python demo/scenes.py --out demo/data --splits train         # what the shipped checkpoints were trained on

For detection and segmentation: ``SPLIT/*.png``, ``SPLIT.json`` (COCO, RLE masks) and ``SPLIT_maps/*.png`` (semantic
maps: 0 is the ground, then the classes in order).
For classification: ``objects/SPLIT/CLASS/*.png``, as ImageNet folders.
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
OBJECT_SIZE = 96
OBJECT_SPLITS = dict(train=(12000, 4), val=(600, 5), calib=(48, 6))
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


def smooth_noise(rng, cells, size):
    """Low-frequency noise in 0..1 of (size, size), bilinear between ``cells`` x ``cells`` random values."""
    grid = rng.random((cells + 1, cells + 1))
    at = np.linspace(0, cells, size, endpoint=False)
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


def render(rng, side=SIZE, objects=(2, 9), radius=(9, 46)):
    """Draws one scene.

    Args:
        rng (np.random.Generator): Source of all randomness.
        side (int): Of the image, in pixels.
        objects (tuple[int, int]): Fewest and most objects.
        radius (tuple[float, float]): Smallest and largest, in pixels.

    Returns:
        tuple: image (side, side, 3) uint8 RGB; class indices, a list; visible masks, a list of (side, side) bool.
    """
    y, x = np.mgrid[:side, :side] + 0.5
    pair = colours(rng)
    ground = smooth_noise(rng, int(rng.integers(2, 12)), side)
    ground = 0.7 * ground + 0.3 * texture(rng, x / 40, y / 40)
    image = pair[0] + (pair[1] - pair[0]) * ground[..., None] * rng.uniform(0.3, 0.8)
    for _ in range(rng.integers(0, 4)):  # clutter: thin lines that are no object
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-60, 60)
        line = np.abs((x - side / 2) * np.cos(angle) + (y - side / 2) * np.sin(angle) - offset)
        image = blend(image, np.clip(1.5 - line, 0, 1), rng.uniform(0, 255, 3))

    labels, visible, areas = [], [], []
    for _ in range(rng.integers(objects[0], objects[1] + 1)):
        for _ in range(10):  # attempts to find a place that leaves everybody visible
            label = int(rng.integers(len(CLASSES)))
            size = np.exp(rng.uniform(*np.log(radius)))
            cx, cy = rng.uniform(0.4 * size, side - 0.4 * size, 2)
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
    """Writes scenes ``out/name/*.png``, ``out/name_maps/*.png``, ``out/name.json`` unless they are there already."""
    marker, maps = out / f'{name}.json', out / f'{name}_maps'
    if marker.exists() and maps.exists():
        return
    for folder in (out / name, maps):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, labels, masks = render(np.random.default_rng([seed, index]))
        file_name = f'{index:05d}.png'
        Image.fromarray(pixels).save(out / name / file_name)
        images.append(dict(id=index + 1, file_name=file_name, height=SIZE, width=SIZE))
        semantic = np.zeros((SIZE, SIZE), np.uint8)
        for label, mask in zip(labels, masks):
            semantic[mask] = label + 1
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = coco_mask.toBbox(rle).tolist()
            annotations.append(
                dict(id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, iscrowd=0, bbox=box,
                     area=int(mask.sum()),
                     segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
        Image.fromarray(semantic).save(maps / file_name)
    categories = [dict(id=i + 1, name=c) for i, c in enumerate(CLASSES)]
    finish(marker, json.dumps(
        dict(images=images, annotations=annotations, categories=categories, info={}, licenses=[])))


def write_objects(out, name, count, seed):
    """Writes single objects ``out/objects/name/CLASS/*.png`` unless they are there already."""
    folder = out / 'objects' / name
    if (folder / 'complete').exists():
        return
    for label in CLASSES:
        (folder / label).mkdir(parents=True, exist_ok=True)
    written = index = 0
    while written < count:
        pixels, labels, _ = render(np.random.default_rng([seed, index]), OBJECT_SIZE, (1, 1), (12, 40))
        index += 1
        if labels:  # an object may have found no place
            Image.fromarray(pixels).save(folder / CLASSES[labels[0]] / f'{written:05d}.png')
            written += 1
    finish(folder / 'complete', f'{count}\n')


def finish(marker, text):
    """Writes the file that tells a complete split, at once: an interrupted run starts the split again."""
    temporary = marker.with_suffix('.tmp')
    temporary.write_text(text)
    temporary.replace(marker)


def write(out, names):
    """Renders splits of both data sets, those that are not there."""
    for name in names:
        write_split(out, name, *SPLITS[name])
        write_objects(out, name, *OBJECT_SPLITS[name])


def main():
    parser = argparse.ArgumentParser(description='Render the demo data sets.')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument('--splits', nargs='+', choices=SPLITS, default=['val', 'calib'])
    args = parser.parse_args()
    write(args.out, args.splits)
    print(f'{", ".join(args.splits)}: in {args.out}')


if __name__ == '__main__':
    main()
