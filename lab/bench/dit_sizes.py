"""Sizes of bridges for full-width bases, by arithmetic on their configurations; prints a table.

python dev.py run lab.bench.dit_sizes
"""

from __future__ import annotations

from ...models.bridge import AUTOMATIC, BridgeSettings

_MB, _GIB = 1e6, 2**30
# Family, width, double and single blocks, and blocks with a second attention, as the released configurations
# have them.
BASES = {
    "Flux.1, Chroma": ("Flux", 3072, 19, 38, 0),
    "Flux.2 dev": ("Flux2", 6144, 8, 48, 0),
    "Flux.2 klein 4B": ("Flux2", 3072, 5, 20, 0),
    "SD3.5 medium": ("SD3", 1536, 24, 0, 13),
    "SD3.5 large": ("SD3", 2432, 38, 0, 0),
    "Qwen-Image": ("QwenImage", 3072, 60, 0, 0),
}
_TOKENS = (1024 // 16) ** 2


def settings(base: str, fuse_rank: int = AUTOMATIC) -> BridgeSettings:
    """A bridge for one of BASES."""
    family, width, double, single, second = BASES[base]
    layers = [f"double_block.{index}.0" for index in range(double)]
    layers += [f"single_block.{index}.0" for index in range(single)]
    layers += [f"double_block.{index}.1" for index in range(second)]
    return BridgeSettings(family, dict.fromkeys(layers, width), fuse_rank=fuse_rank)


def table() -> str:
    """Parameters and file of a bridge with a full F and with the automatic one, in half precision, and what a
    run keeps of a reference of 1024x1024 pixels, K and V or Q.
    """
    lines = [
        "| base | layers, width | with a full F | by default | kept, K and V / Q |",
        "|---|---|---|---|---|",
    ]
    for base in BASES:
        full, default = settings(base, fuse_rank=0), settings(base)
        width, layers = next(iter(full.widths.values())), len(full.widths)
        kept = 2 * _TOKENS * width * layers / _GIB
        fuse = f"F of rank {default.fuse_rank}" if default.fuse_rank else "a full F"
        lines.append(
            f"| {base} | {layers}, {width} | {_size(full)} "
            f"| {_size(default)}, {fuse} | {2 * kept:.2f} / {kept:.2f} GiB |"
        )
    return "\n".join(lines)


def _size(bridge: BridgeSettings) -> str:
    count = bridge.parameters()
    return f"{count / 1e6:.0f}M, {2 * count / _MB:,.0f} MB"


if __name__ == "__main__":
    print(table())
