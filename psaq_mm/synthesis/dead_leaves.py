"""Images without data and without a model: shapes that lie on each other like dead leaves on the ground.

Gaussian noise has nothing that a backbone has learned to see, and all noise looks alike to it. Dead leaves share the
statistics that all natural images have, whatever they show: objects of every size that hide each other, edges between
areas of one colour, a power spectrum that falls with the frequency, few colours in one image, others in the next.

Source: Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001) for the model; Baradad et al.,
"Learning to see by looking at noise" (NeurIPS 2021) for the idea that a network can learn from such images. Shapes,
textures and all numbers are our choice.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COLORS = 4  # main colours of an image
LEAVES = (5, 200)  # fewest and most shapes of an image
RADII = (0.03, 0.7)  # smallest and largest, in shorter sides of the image
TEXTURES = 4  # fields of noise that the shapes of an image show parts of
ROUGHNESS = (0.5, 1.5)  # powers of the frequency that the amplitudes of such fields fall with; in the world, about 1
FLATNESS = (0.03, 0.4, 1.0)  # width of shapes over their length: least, what half of them stay below, and most
DEFOCUS = (0.5, 3.0)  # standard deviation, in pixels, of the blur of what lies behind the focus
SHARPNESS = (0.2, 0.7)  # the same, of the whole image
POWERS = (2.0, 1.0, 8.0)  # of the distance from the middle of a shape: ellipse, rhombus, rectangle with round corners


def dead_leaves(size: tuple[int, int], channels: int, generator: torch.Generator) -> Tensor:
    """Draw one image.

    Args:
        size (tuple[int, int]): Height and width in pixels.
        channels (int): Of the image.
        generator (torch.Generator): Decides everything; on the CPU.

    Returns:
        Tensor: (channels, height, width), from 0, black, to 1, white.
    """
    return _Painter(size, channels, generator).paint()


class _Painter:
    """One image in the making; lengths in shorter sides of the image."""

    def __init__(self, size, channels, generator):
        self.size, self.channels, self.generator = size, channels, generator
        self.side = min(size)
        self.shades = self.uniform(COLORS)
        self.tints = 0.12 * self.normal(COLORS, channels)
        self.textures = self.falling_noise(TEXTURES)
        self.y, self.x = (torch.arange(length) / self.side for length in size)

    def uniform(self, *shape) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def normal(self, *shape) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def draw(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a random number between two."""
        return low + (high - low) * self.uniform(1).item()

    def pick(self, count: int) -> int:
        """Return a random integer below another."""
        return min(int(self.draw(0, count)), count - 1)

    def falling_noise(self, count: int) -> Tensor:
        """Return noise whose amplitudes fall with the frequency, some faster: (count, height, width), of variance 1."""
        height, width = self.size
        frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
        low, high = ROUGHNESS
        powers = low + (high - low) * self.uniform(count, 1, 1)
        amplitude = frequency.clamp(min=1 / max(self.size))**-powers
        spectrum = torch.fft.rfft2(self.normal(count, height, width)) * amplitude
        field = torch.fft.irfft2(spectrum, s=self.size)
        return field / field.std((1, 2), keepdim=True)

    def color(self) -> Tensor:
        """Return a colour near one of the image's main ones, (channels, 1, 1)."""
        number = self.pick(COLORS)
        color = self.shades[number] + 0.15 * self.normal(1) + self.tints[number] + 0.04 * self.normal(self.channels)
        return color[:, None, None]

    def paint(self) -> Tensor:
        slope = 0.2 * self.normal(self.channels, 1, 1) * (self.y[:, None] - 0.5 * self.y[-1])
        image = self.color() + 0.15 * self.textures[:1] + slope
        least, most = LEAVES
        radii = [self.radius() for _ in range(int(least + (most - least) * self.draw()**2))]
        radii = sorted(radii, reverse=True) if self.draw() < 0.5 else radii
        behind = self.pick(len(radii)) if self.draw() < 0.6 else 0
        for number, radius in enumerate(radii):
            if number == behind > 0:
                image = self.blur(image, self.draw(*DEFOCUS))
            self.add_leaf(image, radius)
        image += 0.03 * self.draw() * self.normal(1, *self.size)
        return self.blur(image.clamp(0, 1), self.draw(*SHARPNESS))

    def radius(self) -> float:
        """Return a random radius: the smaller, the more likely, as its inverse square."""
        low, high = (1 / radius for radius in RADII)
        return 1 / self.draw(high, low)

    def add_leaf(self, image: Tensor, radius: float) -> None:
        """Lay one shape over an image (channels, height, width), in place."""
        center = [self.draw(0, length / self.side) for length in self.size]
        angle, power = self.draw(0, math.pi), POWERS[self.pick(len(POWERS))]
        least, middle, most = FLATNESS
        flatness = self.draw(middle, most) if self.draw() < 0.5 else self.draw(least, middle)
        waves, phase, wavy = 2 + self.pick(6), self.draw(0, 2 * math.pi), self.draw() < 0.5
        reach = radius * 2  # corners of rectangles and waves reach beyond the radius
        rows, columns = (slice(max(0, math.floor((middle - reach) * self.side)),
                               max(0, math.ceil((middle + reach) * self.side) + 1)) for middle in center)
        down, right = self.y[rows, None] - center[0], self.x[columns] - center[1]
        along = right * math.cos(angle) + down * math.sin(angle)
        across = (down * math.cos(angle) - right * math.sin(angle)) / flatness
        distance = (along.abs()**power + across.abs()**power)**(1 / power) / radius
        if wavy:
            distance = distance * (1 + 0.25 * torch.sin(waves * torch.atan2(across, along) + phase))
        cover = ((1 - distance) * radius * self.side / 1.5 + 0.5).clamp(0, 1)
        if self.draw() < 0.5:  # a shadow around it
            image[:, rows, columns] *= 1 - 0.5 * self.draw() * (4 * (1.25 - distance)).clamp(0, 1)
        color = self.color() + self.pattern(rows, columns)
        color = color + 0.15 * self.normal(1) * along / radius + 0.2 * self.draw() * (1 - distance**2).clamp(min=-1)
        image[:, rows, columns] += cover * (color - image[:, rows, columns])

    def pattern(self, rows: slice, columns: slice) -> Tensor | float:
        """Return what varies within a shape: every other one shows noise, every fifth one stripes."""
        kind, strength = self.draw(), 0.02 + 0.2 * self.draw()**2
        if kind < 0.5:
            offsets = [self.pick(length) for length in self.size]
            texture = torch.roll(self.textures[self.pick(TEXTURES)], offsets, (0, 1))[rows, columns]
            return strength * texture * (1 + 0.4 * self.normal(self.channels, 1, 1))
        if kind < 0.7:
            frequency, angle = self.draw(20, 170), self.draw(0, math.pi)
            wave = torch.sin(frequency * (self.x[columns] * math.cos(angle) + self.y[rows, None] * math.sin(angle)))
            return strength * wave * (1 + 0.3 * self.normal(self.channels, 1, 1))
        return 0.0

    @staticmethod
    def blur(image: Tensor, deviation: float) -> Tensor:
        """Return an image (channels, height, width) blurred by a Gaussian of a standard deviation in pixels."""
        kernel = torch.exp(-torch.arange(-3, 4).square() / (2 * deviation**2))
        kernel = kernel / kernel.sum()
        padded = F.pad(image[:, None], (3, 3, 3, 3), mode='reflect')
        return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]
