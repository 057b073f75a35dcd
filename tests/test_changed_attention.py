"""UnifyEdit and Attention Maps beside nodes that change what reaches the attention layers, that write in
place, or that compile the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import other_nodes
import pytest
import small_models
import torch
from host import Host
from test_parts import compiled, compiled_first  # noqa: F401
from unify_edit import Edit, box_mask, tokenizer_only_clip

SLOTS = (
    "input_block_patch",
    "middle_block_after_patch",
    "output_block_patch",
    "attn1_patch",
    "attn1_output_patch",
    "middle_patch",
    "attn2_output_patch",
)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def node(host: Host, name: str, **inputs: Any) -> Callable[[Any], Any]:
    """What one of the host's nodes does to a MODEL."""
    return lambda model: host.execute(name, model=model, **inputs)[0]


def edited(host: Host, model: Any, change: Callable[[Any], Any], batch: int = 1, **inputs: Any) -> Any:
    """UnifyEdit's latent of a model that another node changed, inverted without that node."""
    edit = Edit(host, model, steps=1, batch=batch, refine=0)
    edit.sampler_inputs.update(inputs)
    edit.model = change(model)
    return edit.run()


def looked(host: Host, model: Any, **inputs: Any) -> tuple[Any, ...]:
    """Attention Maps' pictures."""
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green circle",
    )
    inputs = {"latent": {"samples": small_models.latent(3)}, **inputs}
    inputs.setdefault("conditioning", small_models.conditioning(2))
    return host.execute("DescEditAttentionMaps", model=model, edit_tokens=tokens, **inputs)


# A call has one row, or three where the card runs source and target together.
HYPERTILE = {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}
CHANGES = {
    "HyperTile": (
        ("HyperTile", HYPERTILE),
        r"the self-attention of layer .* rows, .* with [13]: .*HyperTile",
    ),
    "ToMe": (
        ("TomePatchModel", {"ratio": 0.3}),
        r"the self-attention of layer input.1.0 has 180 tokens .* grid of 16x16: .*ToMe",
    ),
    "shuffle": (other_nodes.shuffled, r"the self-attention of layer .* in another order: a node shuffles"),
    "banked": (
        other_nodes.banked,
        r"the self-attention of layer .* has \d+ keys for \d+ tokens: .*Reference",
    ),
    "regions": (
        other_nodes.coupled,
        r"the cross-attention of layer .* has [26] rows, .* with [13]: .*Couple",
    ),
    "text": (other_nodes.more_text, r"the cross-attention of layer .* has 80 keys, .* has 77 tokens"),
    "left out": (
        lambda model: other_nodes.dropped(model, ("input", 1)),
        r"the self-attention of layer input.1.0(, the cross-attention of layer input.1.0)? did not run",
    ),
    "tiles": (
        lambda model: other_nodes.tiled(model, 8, 4),
        r"called with (4|12) latents of 8x8 instead of [13] of 16x16: .*TiledDiffusion",
    ),
}


def change_of(host: Host, name: str) -> tuple[Callable[[Any], Any], str]:
    """One of CHANGES, and what its refusal says."""
    change, message = CHANGES[name]
    return (change if callable(change) else node(host, change[0], **change[1])), message


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in CHANGES), ("HyperTile", True), ("shuffle", True), ("left out", True)],
)
def test_changed_layers(host: Host, model: Any, name: str, checkpointing: bool) -> None:
    """Protects: a layer whose rows, tokens or keys another node changed is named, with the kind of node, in
    place of losses without a meaning or a raw error.
    """
    change, message = change_of(host, name)
    with pytest.raises(ValueError, match=rf"UnifyEdit Sampler: .*{message}.*Take that node out"):
        edited(host, model, change, checkpointing=checkpointing)


@pytest.mark.parametrize("name", ["HyperTile", "ToMe", "shuffle", "regions", "left out", "tiles"])
def test_changed_layers_in_maps(host: Host, model: Any, name: str) -> None:
    """Protects: Attention Maps too names a layer that another node changed, and the kind of node."""
    change, message = change_of(host, name)
    with pytest.raises(ValueError, match=rf"Attention Maps: .*{message}.*Take that node out"):
        looked(host, change(model))


def test_windows_of_a_batch(host: Host, model: Any) -> None:
    """Protects: the host's context windows over a batch are named."""
    with pytest.raises(
        ValueError, match=r"UnifyEdit Sampler: .* [13] latents of 16x16 instead of [26].*windows"
    ):
        edited(host, model, lambda model: other_nodes.windows(host, model, 1), batch=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient(host: Host, model: Any, checkpointing: bool) -> None:
    """Protects: a node that computes without gradients is named; where none is needed it is no error."""
    message = r"UnifyEdit Sampler: the self-attention of layer .* has no gradient: .*TokenPerturbation"
    with pytest.raises(ValueError, match=message):
        edited(host, model, other_nodes.without_gradient, checkpointing=checkpointing)
    looked(host, other_nodes.without_gradient(model))


def test_a_smaller_grid(host: Host, model: Any) -> None:
    """Protects: Deep Shrink shrinks source and target alike, which the structure loss can compare; where a
    mask must lie on the layer, and in Attention Maps, it is refused by name.
    """
    shrink = node(host, "PatchModelAddDownscale", block_number=3, end_percent=1.0)
    assert edited(host, model, shrink).isfinite().all()
    message = r"the self-attention of layer .* needs its grid of .*changed its grid to .*Deep Shrink"
    with pytest.raises(ValueError, match=f"UnifyEdit Sampler: {message}"):
        edited(host, model, shrink, mask=box_mask())
    with pytest.raises(ValueError, match=f"Attention Maps: {message}"):
        looked(host, shrink(model), self_attn_res=4)


def test_words_alone_beside_hypertile(host: Host, model: Any) -> None:
    """Protects: layers that nothing looks at may be changed."""
    edit = Edit(host, model, steps=2)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0)
    edit.model = node(host, "HyperTile", **HYPERTILE)(model)
    assert edit.run().isfinite().all()


def adapted(model: Any) -> Any:
    """MODEL with an image adapter's replacement in every cross-attention, which writes into its input."""
    patched = model.clone()

    def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        q.mul_(0.9)
        out = optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)
        return out + 0.5 * optimized_attention(q, k[:, :4], v[:, :4], extra["n_heads"])

    for block, number in (("input", 1), ("input", 3), ("middle", 0), ("output", 2), ("output", 3)):
        patched.set_model_attn2_replace(replace, block, number)
    return patched


@pytest.mark.parametrize(
    "name", ["PerturbedAttentionGuidance", "SelfAttentionGuidance", "FreeU", "NAGuidance", "adapter", "shift"]
)
def test_changes_that_keep_their_meaning(host: Host, model: Any, name: str) -> None:
    """Protects: nodes that leave places and tokens what they are run, and act."""

    def shift(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> tuple:
        return n + 0.1, context + 0.1, value + 0.1

    def shifted(model: Any) -> Any:
        return other_nodes.in_slot(model, shift, "attn1_patch")

    change = {"adapter": adapted, "shift": shifted}.get(name) or node(host, name)
    found = edited(host, model, change)
    assert found.isfinite().all()
    looked(host, change(model))


def test_an_adapter_that_writes_into_what_it_has_used(host: Host, model: Any) -> None:
    """Protects: a replacement that spoils what autograd saved is named, and is no raw error."""

    def replace(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        out = q * q.mean()
        q.mul_(0.9)
        return out

    def change(model: Any) -> Any:
        patched = model.clone()
        patched.set_model_attn2_replace(replace, "input", 1)
        return patched

    with pytest.raises(ValueError, match=r"UnifyEdit Sampler: a node writes in place into .*Take that node"):
        edited(host, model, change)


def test_negated_words(host: Host, model: Any) -> None:
    """Protects: a conditioning that holds keys and values in turn is looked at by its keys alone: the same
    maps as of the plain conditioning that these are.
    """
    text, values = small_models.conditioning(2)[0]
    both = [[text.repeat_interleave(2, dim=1), values]]
    found = looked(host, other_nodes.negated(model), conditioning=both)
    for picture, expected in zip(found, looked(host, model), strict=True):
        torch.testing.assert_close(picture, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_writing_in_place(host: Host, model: Any, slot: str, checkpointing: bool) -> None:
    """Protects: a patch that writes into what autograd saved gives what it gives in a copy, in every list of
    the host's, whether layers are kept or computed again.
    """
    found, expected = (
        edited(
            host,
            model,
            lambda model, how=in_place: other_nodes.writes(model, slot, how),
            checkpointing=checkpointing,
        )
        for in_place in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, edited(host, model, lambda model: model), atol=1e-3)


def test_writing_after_the_skip(host: Host, model: Any) -> None:
    """Protects: the same where a patch writes after the skip connection was taken, and so changes it."""
    late = edited(host, model, lambda model: other_nodes.writes(model, "input_block_patch_after_skip", True))
    early = edited(host, model, lambda model: other_nodes.writes(model, "input_block_patch", False))
    torch.testing.assert_close(late, early, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_free_u(host: Host, model: Any, checkpointing: bool) -> None:
    """Protects: the host's own FreeU_V2, which writes in place, gives what it gives on a copy."""
    change = node(host, "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)

    def on_a_copy(model: Any) -> Any:
        (patch,) = change(model).model_options["transformer_options"]["patches"]["output_block_patch"]

        def out_of_place(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple:
            kept = h
            h, skip = patch(_Copied(h), skip, options)
            return (h.now if isinstance(h, _Copied) else kept), skip

        return other_nodes.in_slot(model, out_of_place, "output_block_patch")

    found = edited(host, model, change, checkpointing=checkpointing)
    torch.testing.assert_close(
        found, edited(host, model, on_a_copy, checkpointing=checkpointing), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(found, edited(host, model, lambda model: model), atol=1e-3)


class _Copied:
    """A tensor whose items are set in a copy of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.now = tensor

    def __setitem__(self, index: Any, value: torch.Tensor) -> None:
        self.now = self.now.clone()
        self.now[index] = value

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.now[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)


def test_compiled(host: Host, compiled_first: Any) -> None:  # noqa: F811
    """Protects: on a model that was compiled and run before, UnifyEdit and Attention Maps see every layer."""
    model = compiled_first
    plain, maps = edited(host, model, lambda model: model), looked(host, model)
    torch.testing.assert_close(edited(host, model, compiled), plain, rtol=1e-5, atol=1e-5)
    for picture, expected in zip(looked(host, compiled(model)), maps, strict=True):
        torch.testing.assert_close(picture, expected)
