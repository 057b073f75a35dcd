"""The bridge's formulas on a DiT, in float64, from what its blocks were seen to compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Call:
    """What a joint attention had in one call, in float64.

    q, k, v: [rows, heads, tokens, channels], text first, normed, before the rotation.
    text: tokens of the text.
    result: its result for the image's tokens, [rows, tokens, width]; None if the call ended before.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text: int
    result: torch.Tensor | None = None


@dataclass
class Blocks:
    """Watches every block of a MODEL's network through torch's own hooks; `calls` are by layer, in order."""

    model: Any
    calls: dict[str, list[Call]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Blocks:
        network = self.model.model.diffusion_model
        for index, block in enumerate(getattr(network, "double_blocks", ())):
            self._double(f"double_block.{index}.0", block)
        for index, block in enumerate(getattr(network, "single_blocks", ())):
            self._single(f"single_block.{index}.0", block)
        for index, block in enumerate(getattr(network, "joint_blocks", ())):
            text = self._parts(block.context_block.attn, lambda _: None)
            self._of_sd3(f"double_block.{index}.0", block.x_block.attn, text)
            if block.x_block.x_block_self_attn:
                self._of_sd3(f"double_block.{index}.1", block.x_block.attn2, {})
        for index, block in enumerate(getattr(network, "transformer_blocks", ())):
            self._of_qwen_image(f"double_block.{index}.0", block.attn)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _double(self, key: str, block: Any) -> None:
        image: list[tuple] = []
        calls = self.calls.setdefault(key, [])

        def of_image(_: Any, args: tuple, found: tuple) -> None:
            image[:] = [(*_wide(found), *_wide(args[2:]))]

        def of_text(_: Any, args: tuple, found: tuple) -> None:
            parts = zip((*_wide(found), *_wide(args[2:])), image[0], strict=True)
            q, k, v = (torch.cat(pair, dim=2) for pair in parts)
            calls.append(Call(q, k, v, found[0].shape[2]))

        def result(_: Any, args: tuple) -> None:
            (calls[-1].result,) = _wide(args)

        self._handles += [
            block.img_attn.norm.register_forward_hook(of_image),
            block.txt_attn.norm.register_forward_hook(of_text),
            block.img_attn.proj.register_forward_pre_hook(result),
        ]

    def _single(self, key: str, block: Any) -> None:
        calls = self.calls.setdefault(key, [])

        def both(_: Any, args: tuple, found: tuple) -> None:
            first = next(iter(self.calls.values()))[-1]
            q, k, v = (*_wide(found), *_wide(args[2:]))
            calls.append(Call(q, k, v, first.text))

        def result(_: Any, args: tuple) -> None:
            call = calls[-1]
            (joined,) = _wide(args)
            call.result = joined[:, call.text :, : block.hidden_size]

        self._handles += [
            block.norm.register_forward_hook(both),
            block.linear2.register_forward_pre_hook(result),
        ]

    def _parts(self, attention: Any, done: Any) -> dict[str, torch.Tensor]:
        """What a text's or an image's tokens in a block of SD3 have, [rows, heads, tokens, channels]; `done`
        is called with it.
        """
        parts: dict[str, torch.Tensor] = {}

        def values(_: Any, args: tuple, found: torch.Tensor) -> None:
            (wide,) = _wide([found])
            parts["v"] = wide.unflatten(2, (3, attention.num_heads, -1))[:, :, 2].transpose(1, 2)

        def queries(_: Any, args: tuple, found: torch.Tensor) -> None:
            parts["q"] = _wide([found])[0].transpose(1, 2)

        def keys(_: Any, args: tuple, found: torch.Tensor) -> None:
            parts["k"] = _wide([found])[0].transpose(1, 2)
            done(parts)

        self._handles += [
            module.register_forward_hook(note)
            for module, note in ((attention.qkv, values), (attention.ln_q, queries), (attention.ln_k, keys))
        ]
        return parts

    def _of_sd3(self, key: str, attention: Any, text: dict[str, torch.Tensor]) -> None:
        calls = self.calls.setdefault(key, [])

        def begin(image: dict[str, torch.Tensor]) -> None:
            pairs = {name: [text[name], image[name]] if text else [image[name]] for name in "qkv"}
            q, k, v = (torch.cat(pair, dim=2) for pair in pairs.values())
            calls.append(Call(q, k, v, text["q"].shape[2] if text else 0))

        def result(_: Any, args: tuple) -> None:
            (calls[-1].result,) = _wide(args)

        self._parts(attention, begin)
        self._handles.append(attention.proj.register_forward_pre_hook(result))

    def _of_qwen_image(self, key: str, attention: Any) -> None:
        calls, parts = self.calls.setdefault(key, []), {}

        def note(name: str) -> Any:
            def noted(_: Any, args: tuple, found: torch.Tensor) -> None:
                (wide,) = _wide([found])
                parts[name] = (
                    wide if wide.ndim == 4 else wide.unflatten(2, (attention.heads, -1)).transpose(1, 2)
                )
                if name == "added_k":  # the last
                    q, k, v = (torch.cat([parts[f"added_{each}"], parts[each]], dim=2) for each in "qkv")
                    calls.append(Call(q, k, v, parts["added_q"].shape[2]))

            return noted

        def result(_: Any, args: tuple) -> None:
            (calls[-1].result,) = _wide(args)

        modules = {
            "q": attention.norm_q,
            "k": attention.norm_k,
            "v": attention.to_v,
            "added_q": attention.norm_added_q,
            "added_k": attention.norm_added_k,
            "added_v": attention.add_v_proj,
        }
        self._handles += [module.register_forward_hook(note(name)) for name, module in modules.items()]
        self._handles.append(attention.to_out[0].register_forward_pre_hook(result))


def _wide(tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().double().cpu() for tensor in tensors)


class Positions:
    """The positions of a network's tokens, and the rotations by them, in float64."""

    def __init__(self, model: Any) -> None:
        network = model.model.diffusion_model
        embedder = getattr(network, "pe_embedder", None)  # SD3's tokens are not rotated
        self.axes, self.theta = (embedder.axes_dim, embedder.theta) if embedder else ((), 0)
        self.middle = hasattr(network, "transformer_blocks")  # Qwen-Image counts from the middle

    def grid(
        self,
        height: int,
        width: int,
        scale: tuple[float, float] = (1.0, 1.0),
        corner: tuple[float, float] = (0.0, 0.0),
    ) -> torch.Tensor:
        """Positions of an image's tokens, [tokens, axes]: row and column are the second and the third."""
        found = torch.zeros(height, width, len(self.axes), dtype=torch.float64)
        if not self.axes:
            return found.flatten(0, 1)
        middle = (height // 2, width // 2) if self.middle else (0, 0)
        found[..., 1] = (torch.arange(height) * scale[0] + corner[0] - middle[0])[:, None]
        found[..., 2] = (torch.arange(width) * scale[1] + corner[1] - middle[1])[None]
        return found.flatten(0, 1)

    def words(self, count: int, grid: torch.Tensor) -> torch.Tensor:
        """Positions of the text's tokens beside a grid, [tokens, axes]: all 0, and counted in Flux.2's fourth
        axis; in Qwen-Image counted in all, from the longer side's half.
        """
        found = torch.zeros(count, len(self.axes), dtype=torch.float64)
        if self.middle:
            return found + torch.arange(count)[:, None] - grid[:, 1:].min()
        found[:, 3:] = torch.arange(count)[:, None]
        return found

    def rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE: pairs of channels of [rows, heads, tokens, channels] turned by angles of the positions."""
        if not self.axes:
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angles = []
        for axis, size in enumerate(self.axes):
            speeds = self.theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles.append(positions[:, axis, None] * speeds)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, dim=1))
        return torch.view_as_real(pairs * turn).flatten(-2)


class Formula(Positions):
    """One layer of a bridge on a network: its learned matrices in float64, and the formulas."""

    def __init__(self, model: Any, bridge: Any, key: str) -> None:
        super().__init__(model)
        settings = bridge.model.settings
        self.fusion, scale = settings.fusion, settings.alpha / settings.rank
        parts = {
            name.removeprefix(f"{key}.").removesuffix(".weight"): weight.double().cpu()
            for name, weight in bridge.model.state_dict().items()
            if name.startswith(f"{key}.")
        }
        unit = torch.eye(parts["q.down"].shape[1], dtype=torch.float64)
        self.changed = {
            name: unit + scale * parts[f"{name}.up"] @ parts[f"{name}.down"]
            if f"{name}.up" in parts
            else unit
            for name in ("q", "k", "v", "out")
        }
        self.fuse = parts["fuse.up"] @ parts["fuse.down"] if "fuse.up" in parts else parts.get("fuse")

    def own(self, call: Call, grid: torch.Tensor) -> torch.Tensor:
        """Z, [rows, tokens of the image, width]: the network's own joint attention of text and image."""
        places = torch.cat([self.words(call.text, grid), grid])
        q, k = (self.rotated(x, places) for x in (call.q, call.k))
        return _attention(q, k, call.v)[:, call.text :]

    def _update(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[rows, heads, tokens, channels] with the layer's update."""
        flat = x.transpose(1, 2).flatten(2) @ self.changed[name].T
        return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)

    def bridged(
        self, asking: Call, where: torch.Tensor, answering: Call, there: torch.Tensor
    ) -> torch.Tensor:
        """Z', [rows, tokens, width]: queries of one call's image at the positions `where`, keys and values of
        the other's at `there`.
        """
        q = asking.q[:, :, asking.text : asking.text + len(where)]
        k, v = (x[:, :, answering.text : answering.text + len(there)] for x in (answering.k, answering.v))
        q, k = self.rotated(self._update("q", q), where), self.rotated(self._update("k", k), there)
        return _attention(q, k, self._update("v", v))

    def change(self, own: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is added to Z at strength 1."""
        result = attended @ self.changed["out"].T
        if self.fuse is not None:
            return result @ self.fuse.T
        return result if self.fusion == "add" else result - own


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v of [rows, heads, tokens, channels], as [rows, tokens, width]."""
    probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)
