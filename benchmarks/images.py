"""Images that a benchmark makes itself: eight shapes, and eight textures, under noise and in random colours."""

from collections.abc import Callable

import torch

SIZE = 24
Pattern = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _shapes() -> dict[str, Pattern]:
    """Inside or outside, for coordinates turned and scaled so that a shape reaches from −1 to 1."""
    return {
        "disk": lambda u, v: u**2 + v**2 < 0.8,
        "ring": lambda u, v: ((u**2 + v**2) - 0.65).abs() < 0.3,
        "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.75,
        "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.65).abs() < 0.2,
        "triangle": lambda u, v: (v > -0.6) & (v < 0.9 - 1.7 * u.abs()),
        "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (torch.maximum(u.abs(), v.abs()) < 0.95),
        "bar": lambda u, v: (u.abs() < 1.0) & (v.abs() < 0.3),
        "pair": lambda u, v: (u.abs() - 0.6) ** 2 + v**2 < 0.14,
    }


def _textures() -> dict[str, Pattern]:
    """Waves with coordinates in radians, slightly turned."""
    return {
        "horizontal": lambda u, v: torch.sin(v),
        "vertical": lambda u, v: torch.sin(u),
        "rising": lambda u, v: torch.sin(0.7 * (u + v)),
        "falling": lambda u, v: torch.sin(0.7 * (u - v)),
        "checks": lambda u, v: torch.sin(u) * torch.sin(v) * 1.6,
        "plaid": lambda u, v: 0.7 * (torch.sin(u) + torch.sin(v)),
        "dots": lambda u, v: 2.5 * torch.relu(torch.sin(u) * torch.sin(v) - 0.3) - 0.5,
        "diamonds": lambda u, v: torch.sin(0.7 * (u + v)) * torch.sin(0.7 * (u - v)) * 1.6,
    }


CLASSES = len(_shapes())


def shapes(count: int, seed: int, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images (count, 3, SIZE, SIZE) of shapes anywhere, in any size and turn; and their classes (count,)."""
    draw = torch.Generator().manual_seed(seed)
    x, y = _grid()
    centre = 0.4 * torch.rand(2, count, 1, 1, generator=draw) - 0.2
    radius = 0.6 + 0.25 * torch.rand(count, 1, 1, generator=draw)
    u, v = _turned((x - centre[0]) / radius, (y - centre[1]) / radius, _uniform(count, 3.1416, draw))
    labels = torch.randint(CLASSES, (count,), generator=draw)
    every = torch.stack([inside(u, v).float() for inside in _shapes().values()])
    return _coloured(every[labels, torch.arange(count)], noise, draw), labels


def textures(count: int, seed: int, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images of textures, of any wavelength from 4 to 8 pixels and any phase, turned by up to 12°."""
    draw = torch.Generator().manual_seed(seed)
    x, y = _grid()
    waves = 3.1416 * SIZE / (4 + 4 * torch.rand(count, 1, 1, generator=draw))
    u, v = _turned(x * waves, y * waves, _uniform(count, 0.2, draw))
    phase = 6.2832 * torch.rand(2, count, 1, 1, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    every = torch.stack([wave(u + phase[0], v + phase[1]) for wave in _textures().values()])
    return _coloured(0.5 + 0.5 * every[labels, torch.arange(count)], noise, draw), labels


def _grid() -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x[None], y[None]


def _uniform(count: int, largest: float, draw: torch.Generator) -> torch.Tensor:
    return largest * (2 * torch.rand(count, 1, 1, generator=draw) - 1)


def _turned(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _coloured(picture: torch.Tensor, noise: float, draw: torch.Generator) -> torch.Tensor:
    """A picture from 0 to 1 between a background colour and a brighter one, noise on top."""
    count = len(picture)
    back, front = torch.randn(2, count, 3, 1, 1, generator=draw)
    front = 2 * torch.nn.functional.normalize(front.abs(), dim=1)
    image = 0.5 * back + front * picture[:, None]
    return image + noise * torch.randn(image.shape, generator=draw)
