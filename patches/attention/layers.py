"""The attention layers of a network: names, grids and selection."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

# Where words look at their object, by kind of model (lab/studies/words_by_layer.py). At its other layers the
# Tiny Studio's words look elsewhere, or only some of them do.
MEASURED = {"TinySD15": "output.3, output.4"}
# Where keeping structure brings an edit closest to the true one (lab/studies/flow_study.py, --search layers).
# A UNet's is kept at every layer of a resolution.
MEASURED_STRUCTURE = {"TinyFlux": "single_block.2, single_block.3, single_block.4, single_block.5"}
USUAL = 16  # tokens a side, as in Attend-and-Excite and MAG-Edit


@dataclass(frozen=True)
class AttentionLayer:
    """One transformer block of a network, with its self- and cross-attention.

    key: the name in bridge files, such as `output.3.0`.
    level: how often the latent has been halved before it.
    width: channels of a token.
    heads: of each of its attentions.
    path: the block's name in the network's module tree.
    side: its maps have at most this many places per side, each with several tokens; 0 for one a token.
    """

    key: str
    level: int
    width: int
    heads: int
    path: str
    side: int = 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens here, for a latent of `height` x `width`."""
        for _ in range(self.level):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width

    def places(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of its maps, for a latent of `height` x `width`: at most `side` x `side` places in
        the grid's proportions.
        """
        return self.on(self.grid(height, width))

    def on(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The same for a grid of tokens."""
        rows, columns = grid
        most = max(1.0, math.sqrt(rows * columns) / self.side) if self.side else 1.0
        return max(1, math.floor(rows / most)), max(1, math.floor(columns / most))


class Block(NamedTuple):
    """A part of a network that checkpointing computes again as a whole.

    path: its name in the module tree.
    kind: `residual`, `transformer` or `resize`; `joint` in a DiT.
    tokens: positions of the image at its input; in a DiT with those of a text.
    inputs, outputs: channels; of a transformer those of its tokens, and 0 of a `resize`.
    depth: transformer blocks in it.
    convolved: whether its transformer blocks are entered and left by convolutions instead of Linears.
    weights: number of learned parameters.
    """

    path: str
    kind: str
    tokens: int
    inputs: int
    outputs: int
    depth: int
    convolved: bool
    weights: int


def structure_layers(
    layers: Collection[AttentionLayer], height: int, width: int, max_res: int, names: str = ""
) -> tuple[AttentionLayer, ...]:
    """The layers with at most `max_res` x `max_res` tokens, for a latent of `height` x `width`.

    If all have more, those of the coarsest grid. If `names` is given, the layers that it lists.
    Raises ValueError for a name that fits no layer.
    """
    if names.strip():
        return named_layers("structure_layers", layers, names)
    tokens = {layer: math.prod(layer.grid(height, width)) for layer in layers}
    most = max(max_res * max_res, min(tokens.values()))
    return tuple(layer for layer in layers if tokens[layer] <= most)


def word_layers(
    layers: Collection[AttentionLayer], height: int, width: int, res: int, names: str = "", kind: str = ""
) -> tuple[AttentionLayer, ...]:
    """The layers of the resolution whose number of tokens is closest to `res` x `res`, by ratio.

    With `res` 0 those where this kind of model keeps its words (MEASURED), else those closest to 16. If
    `names` is given, the layers that it lists. Raises ValueError for a name that fits no layer.

    kind: the name of the host's class of the model's configuration.
    """
    if res == 0:
        names, res = names if names.strip() else MEASURED.get(kind, ""), USUAL
    if names.strip():
        return named_layers("word_layers", layers, names)

    def distance(layer: AttentionLayer) -> float:
        return abs(math.log(math.prod(layer.grid(height, width)) / (res * res)))

    nearest = min(map(distance, layers))
    return tuple(layer for layer in layers if distance(layer) == nearest)


def named_layers(name: str, layers: Collection[AttentionLayer], names: str) -> tuple[AttentionLayer, ...]:
    """The layers that `names` lists, separated by commas.

    Each is a layer's key (`output.3.0`) or a prefix of several (`output.3`, `middle`).
    Raises ValueError, naming the input `name`, for one that fits no layer.
    """

    def fits(layer: AttentionLayer, part: str) -> bool:
        return f"{layer.key}.".startswith(f"{part}.")

    wanted = [part.strip().lower() for part in names.split(",") if part.strip()]
    for part in wanted:
        if not any(fits(layer, part) for layer in layers):
            raise ValueError(
                f"{name} has {part!r}, but this model's attention layers are "
                f"{', '.join(layer.key for layer in layers)}: use these, or the beginning of one"
            )
    chosen = tuple(layer for layer in layers if any(fits(layer, part) for part in wanted))
    if not chosen:
        raise ValueError(f"{name} {names!r} names no attention layer: name one, or leave it empty")
    return chosen
