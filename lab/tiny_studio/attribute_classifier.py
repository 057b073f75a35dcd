"""A small classifier that reads a scene's attributes from an image. Tests and benchmarks use it, nodes never
do.

It is trained on drawings only, with every combination of attributes, also those that the model never sees.
Otherwise it would read them as similar ones, and the model would be blamed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from einops import rearrange

from ...models.tiny_studio import drawing, scenes
from .stage import Stage

FILE = Path(__file__).with_name("attribute_classifier.safetensors")
KINDS = tuple(scenes.ATTRIBUTES)
ROWS = (24, 104)  # of a picture, which hold all of two small objects
HEADS = [("kind", "kind", KINDS)] + [
    (kind, name, options)
    for kind, attributes in scenes.ATTRIBUTES.items()
    for name, options in attributes.items()
]


class AttributeClassifier(torch.nn.Module):
    """Images [B, 3, 64, 64], 0 to 1 -> logits of all heads, concatenated along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 96)):
            layers += [
                torch.nn.Conv2d(before, after, 3, stride=2, padding=1),
                torch.nn.GroupNorm(8, after),
                torch.nn.SiLU(),
            ]
        layers += [
            torch.nn.Conv2d(96, 32, 1),
            torch.nn.Flatten(),
            torch.nn.Linear(2048, 256),
            torch.nn.SiLU(),
        ]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(256, sum(len(o) for *_, o in HEADS)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures * 2 - 1)

    @torch.no_grad()
    def read(self, pictures: np.ndarray | torch.Tensor) -> list[dict[str, str]]:
        """Images [B, 128, 128, 3], 0 to 1 -> for each its kind and the attributes of that kind, by name."""
        batch = _small(torch.as_tensor(np.asarray(pictures, np.float32)))
        found = []
        parts = self(batch).split([len(options) for *_, options in HEADS], dim=-1)
        best = [part.argmax(-1).tolist() for part in parts]
        for row in range(len(batch)):
            kind = KINDS[best[0][row]]
            read = {
                name: options[index[row]]
                for (of, name, options), index in zip(HEADS, best, strict=True)
                if of == kind
            }
            found.append({"kind": kind, **read})
        return found

    def read_as(self, kinds: list[str], pictures: np.ndarray | torch.Tensor) -> list[dict[str, str]]:
        """The same, with two objects read in the images whose kind should be "two"."""
        batch = torch.as_tensor(np.asarray(pictures, np.float32))
        found = self.read(batch)
        two = [row for row, kind in enumerate(kinds) if kind == "two"]
        for row, read in zip(two, self.read_two(batch[two]) if two else [], strict=True):
            found[row] = read
        return found

    def read_two(self, pictures: np.ndarray | torch.Tensor) -> list[dict[str, str]]:
        """The same for images of two objects, each read alone.

        An object that is not recognised as a small one on its side has no attributes. Background and style
        are what both halves agree on.
        """
        batch = torch.as_tensor(np.asarray(pictures, np.float32))
        found = []
        for halves in zip(*(self.read(alone(batch, side)) for side in scenes.SIDES), strict=True):
            read = {"kind": "two"}
            for side, half in zip(scenes.SIDES, halves, strict=True):
                if (half.get("size"), half.get("place")) == ("small", side):
                    read |= {f"{side}_{name}": half[name] for name in scenes.OWN}
            left, right = halves
            shared = ("background", "style")
            found.append(read | {name: left[name] for name in shared if left[name] == right[name]})
        return found


def load(path: Path = FILE) -> AttributeClassifier:
    classifier = AttributeClassifier()
    classifier.load_state_dict(safetensors.torch.load_file(path))
    return classifier.eval()


def shows(pictures: np.ndarray | torch.Tensor, wanted: Sequence[scenes.Scene]) -> list[bool]:
    """The success rule: whether each picture reads as its scene in kind and in every attribute.

    pictures: [B, 128, 128, 3], 0 to 1.
    """
    found = load().read_as([scene.kind for scene in wanted], pictures)
    return [read == {"kind": scene.kind, **scene.values} for read, scene in zip(found, wanted, strict=True)]


def bound(pictures: np.ndarray | torch.Tensor, pairs: Sequence[scenes.EditPair]) -> dict[str, list[bool]]:
    """For edits of one of two objects: `asked`, whether it has the new value, and `leaked`, whether the other
    one got it, too, against the true edit.

    pictures: [B, 128, 128, 3], 0 to 1.
    """
    found: dict[str, list[bool]] = {"asked": [], "leaked": []}
    for read, pair in zip(load().read_two(pictures), pairs, strict=True):
        ((name, value),) = pair.changed.items()
        side, _, own = name.partition("_")
        other = f"{'right' if side == 'left' else 'left'}_{own}"
        found["asked"].append(read.get(name) == value)
        found["leaked"].append(read.get(other) == value != pair.target.values[other])
    return found


def alone(pictures: torch.Tensor, side: str) -> torch.Tensor:
    """[B, 128, 128, 3] with two objects -> the object on `side` alone.

    The other is covered with background, continued from above to below, in the rows that no object reaches.
    """
    top, bottom = ROWS
    other = slice(drawing.SIZE // 2, None) if side == "left" else slice(None, drawing.SIZE // 2)
    down = torch.linspace(0, 1, bottom - top)[:, None, None]
    above, below = (pictures[:, row : row + 1, other] for row in (top - 1, bottom))
    pictures = pictures.clone()
    pictures[:, top:bottom, other] = torch.lerp(above, below, down)
    return pictures


def _targets(pool: list[scenes.Scene]) -> torch.Tensor:
    """[scenes, heads] option indices; -100 (ignored) if the attribute belongs to the other kind."""
    rows = []
    for scene in pool:
        row = [KINDS.index(scene.kind)]
        row += [o.index(scene.values[n]) if k == scene.kind else -100 for k, n, o in HEADS[1:]]
        rows.append(row)
    return torch.tensor(rows)


def _small(pictures: torch.Tensor) -> torch.Tensor:
    """[B, 128, 128, 3] -> [B, 3, 64, 64]: half the size is enough to read everything."""
    return F.avg_pool2d(rearrange(pictures, "b h w c -> b c h w"), 2)


def _worn(pictures: torch.Tensor) -> torch.Tensor:
    """Drawings as a decoder might return them: blurred, noisy, slightly off in brightness and colour."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, 0.4 * torch.rand(len(pictures), 1, 1, 1))
    shift = 0.04 * torch.randn(len(pictures), 3, 1, 1)
    coarse = F.interpolate(torch.randn(len(pictures), 3, 8, 8), size=pictures.shape[-2:], mode="bilinear")
    return (
        pictures
        + shift
        + 0.04 * torch.rand(len(pictures), 1, 1, 1) * coarse
        + 0.02 * torch.randn_like(pictures)
    ).clamp(0, 1)


def train(
    work: Path, pictures: np.ndarray, pool: list[scenes.Scene], steps: int = 5200, batch: int = 48
) -> None:
    torch.manual_seed(3)
    rng = np.random.default_rng(31)
    held = [scenes.sample_scene(rng, held=True) for _ in range(1 + len(pool) // 8)]
    drawn = np.stack([np.round(scene.draw() * 255).astype(np.uint8) for scene in held])
    classifier = AttributeClassifier()
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    stage = Stage(work / "attribute_classifier.pt", classifier, [optimiser])
    targets = _targets([*pool, *held])
    rng = np.random.default_rng(3000 + stage.step)

    def losses() -> tuple[torch.Tensor]:
        picked = np.sort(rng.integers(len(targets), size=batch))
        first = picked[picked < len(pool)]
        shown = np.concatenate([pictures[first], drawn[picked[len(first) :] - len(pool)]])
        image = _small(torch.from_numpy(shown).float() / 255)
        parts = classifier(_worn(image)).split([len(options) for *_, options in HEADS], dim=-1)
        summed = [
            F.cross_entropy(part, targets[picked, head], reduction="sum") for head, part in enumerate(parts)
        ]
        return (torch.stack(summed).sum() / batch,)

    stage.run(steps, losses)
