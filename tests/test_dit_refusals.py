"""What does not run on DiTs, or not with these inputs, is refused by name."""

from __future__ import annotations

from typing import Any

import bridge_edit
import other_nodes
import pytest
import small_dits
import small_models
import torch
import unify_edit
from closeness import same
from host import Host


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks, by family."""
    return {name: small_dits.small_dit(name) for name in small_dits.FAMILIES}


@pytest.mark.parametrize(
    ("trained", "applied"),
    [
        ("Flux.1 dev", "Chroma"),
        ("Flux.1 dev", "Flux.2"),
        ("Flux.1 schnell", "Flux.1 dev"),
        ("Chroma", "Flux.1 dev"),
        ("Flux.1 dev", "SD1.5"),
        ("SD1.5", "Flux.1 dev"),
    ],
)
def test_another_family(host: Host, models: dict[str, Any], trained: str, applied: str) -> None:
    """Protects: a bridge of another family or kind is refused with both shapes, also if they agree."""
    known = {**models, "SD1.5": small_models.small_unet()}
    bridge = bridge_edit.random_bridge(host, known[trained])
    with pytest.raises(
        ValueError, match=r"Apply Attention Bridge: the bridge is for \w+ with .*, but the MODEL is"
    ):
        bridge_edit.apply_bridge(host, known[applied], bridge, small_models.latent(9, model=known[applied]))


def test_another_width(host: Host, models: dict[str, Any]) -> None:
    """Protects: a bridge of a wider or deeper network of the same family is refused."""
    other: tuple[dict[str, Any], ...] = ({"hidden_size": 128, "num_heads": 8}, {"depth": 3})
    for changes in other:
        bridge = bridge_edit.random_bridge(host, small_dits.small_dit("Flux.1 dev", **changes))
        with pytest.raises(
            ValueError, match=r"the bridge is for Flux with \d layers \(\d of width \d+\), but"
        ):
            bridge_edit.apply_bridge(
                host, models["Flux.1 dev"], bridge, small_models.latent(9, model=models["Flux.1 dev"])
            )


def test_dev_on_schnell(host: Host, models: dict[str, Any]) -> None:
    """Protects: a bridge of Flux.1 dev runs on what is derived from it and has its latents: schnell."""
    bridge, schnell = bridge_edit.random_bridge(host, models["Flux.1 dev"]), models["Flux.1 schnell"]
    patched = bridge_edit.apply_bridge(host, schnell, bridge, small_models.latent(9, model=schnell))
    assert not torch.equal(bridge_edit.sample(host, patched), bridge_edit.sample(host, schnell))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.ones(1, 16, 5, 16, 16), r"reference has shape \[1, 16, 5, 16, 16\], a video of 5 frames"),
        (torch.ones(1, 16, 1, 16, 16), r"reference has shape \[1, 16, 1, 16, 16\], a video of 1 frame\b"),
        (
            torch.ones(1, 4, 16, 16),
            r"reference has shape \[1, 4, 16, 16\] but this model needs \[images, 16,",
        ),
    ],
)
def test_other_latents(host: Host, models: dict[str, Any], reference: torch.Tensor, message: str) -> None:
    """Protects: video latents, and those of another family, are named."""
    bridge = bridge_edit.random_bridge(host, models["Flux.1 dev"])
    with pytest.raises(ValueError, match=f"Apply Attention Bridge: {message}"):
        bridge_edit.apply_bridge(host, models["Flux.1 dev"], bridge, reference)


def test_longcat(host: Host) -> None:
    """Protects: LongCat-Image, of Flux's class but with other positions, is refused by name."""
    model = small_dits.small_dit("Flux.1 schnell", txt_ids_dims=[1, 2])
    with pytest.raises(ValueError, match="New Attention Bridge: LongCat-Image is not supported yet"):
        host.execute("DescEditNewBridge", model=model)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.1 schnell"])
def test_reference_latents_at_timestep_zero(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: what ComfyUI itself cannot run on Flux.1 is said, in place of an error of torch."""
    model = models[family]
    positive = small_models.conditioning(2)
    (positive,) = host.execute(
        "ReferenceLatent", conditioning=positive, latent={"samples": small_models.latent(8, model=model)}
    )
    (positive,) = host.execute(
        "FluxKontextMultiReferenceLatentMethod",
        conditioning=positive,
        reference_latents_method="index_timestep_zero",
    )
    bridge = bridge_edit.random_bridge(host, model)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    for cfg in (1.0, 3.0):
        with pytest.raises(RuntimeError):
            bridge_edit.sample(host, model, positive, positive, cfg=cfg)
        with pytest.raises(ValueError, match=r"Apply Attention Bridge: .* ComfyUI itself fails on Flux\.1"):
            bridge_edit.sample(host, patched, positive, positive, cfg=cfg)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.1 schnell"])
@pytest.mark.parametrize("where", ["source", "edit", "negative", "inversion", "mask", "maps"])
def test_reference_latents_at_timestep_zero_without_a_bridge(
    host: Host, models: dict[str, Any], family: str, where: str
) -> None:
    """Protects: every node that runs the network says so too, whichever description has them, also where no
    attention is read.
    """
    model, plain = models[family], small_models.conditioning(1)
    ((text, values),) = small_models.conditioning(2)
    more = {
        "reference_latents": [small_models.latent(8, model=model)],
        "reference_latents_method": "index_timestep_zero",
    }
    failing, latent = [[text, {**values, **more}]], {"samples": small_models.latent(3, model=model)}
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=unify_edit.tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green circle",
    )
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    path = {"latent": latent, "source": plain, "sigmas": sigmas}
    given: dict[str, Any] = {"source": plain, "edit": plain, "edit_tokens": tokens}
    if where == "inversion":
        node, given = "DescEditInvert", {**path, "source": failing}
    elif where == "mask":
        node, given = "DescEditFindMask", {**given, "latent": latent, "edit": failing}
    elif where == "maps":
        inversion, *_ = host.execute("DescEditInvert", model=model, **path)
        node, given = "DescEditAttentionMaps", {"edit_tokens": tokens, "inversion": inversion}
        given["conditioning"] = failing
    else:
        node, given = "DescEditUnify", {**given, "latent": latent, "negative": plain, where: failing}
        given |= {"steps": 1, "cfg": 2.0, "structure": 0.0, "words": 0.0}
    with pytest.raises(ValueError, match=r": the conditioning has .* ComfyUI itself fails on Flux\.1"):
        host.execute(node, model=model, **given)


def test_tiles(host: Host, models: dict[str, Any]) -> None:
    """Protects: tiles of the latent, whose place the bridge cannot know, are refused: positions would be
    wrong.
    """
    model = models["Flux.1 dev"]
    bridge = bridge_edit.random_bridge(host, model)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    with pytest.raises(ValueError, match=r"Apply Attention Bridge: .* tiles or windows .* positions"):
        bridge_edit.sample(host, other_nodes.tiled(patched, 8, 2))


def test_windows(host: Host, models: dict[str, Any]) -> None:
    """Protects: windows over a batch run, but not with an area, whose place in the latent is then unknown."""
    model = models["Flux.1 dev"]
    bridge = bridge_edit.random_bridge(host, model)
    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    latent, cond = torch.zeros(2, 16, 16, 16), small_models.conditioning(2)
    windows = other_nodes.windows(host, patched, 1)
    expected = bridge_edit.sample(host, patched, cond, latent=latent, steps=2)
    assert same(bridge_edit.sample(host, windows, cond, latent=latent, steps=2), expected)
    (area,) = host.execute(
        "ConditioningSetArea", conditioning=cond, width=64, height=96, x=32, y=16, strength=1.0
    )
    with pytest.raises(
        ValueError, match=r"Apply Attention Bridge: .* windows .* a Flux has positions in an area"
    ):
        bridge_edit.sample(host, windows, [*cond, *area], latent=latent, steps=2)


def test_tokens_that_are_merged(host: Host, models: dict[str, Any]) -> None:
    """Protects: a node that merges the image's tokens is refused by name."""
    model = models["Flux.1 dev"]
    bridge = bridge_edit.random_bridge(host, model)

    def merge(q: Any, k: Any, v: Any, **_: Any) -> dict[str, torch.Tensor]:
        return {"q": q[:, :, :-8], "k": k, "v": v}

    patched = bridge_edit.apply_bridge(host, model, bridge, small_models.latent(9, model=model))
    patched.set_model_attn1_patch(merge)
    with pytest.raises(ValueError, match=r"joint attention of layer double_block.0.0 has 56 tokens .* 8x8"):
        bridge_edit.sample(host, patched)


def _unify(host: Host, model: Any, **conditioning: Any) -> Any:
    """One step of UnifyEdit, with more in the conditioning of the edit."""
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=unify_edit.tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green circle",
    )
    ((text, values),) = small_models.conditioning(2)
    edited, *_ = host.execute(
        "DescEditUnify",
        model=model,
        source=small_models.conditioning(1),
        edit=[[text, {**values, **conditioning}]],
        edit_tokens=tokens,
        latent={"samples": small_models.latent(3, model=model)},
        steps=1,
        cfg=1.0,
    )
    return edited["samples"]


def test_changed_joint_attention(host: Host, models: dict[str, Any]) -> None:
    """Protects: UnifyEdit refuses merged keys and a mask in the attention that it
    reads, by the layer's name, and
    a method of reference latents with which the host fails; reference latents take part.
    """
    model = models["Flux.1 dev"]

    def changed(change: Any) -> Any:
        def patch(q: Any, k: Any, v: Any, extra_options: Any, **_: Any) -> dict[str, torch.Tensor]:
            here = extra_options["block_type"], extra_options["block_index"]
            return change(q, k, v) if here == ("double", 1) else {}

        patched = model.clone()
        patched.set_model_attn1_patch(patch)
        return patched

    layer = "UnifyEdit: the joint attention of layer double_block.1.0 has "
    for change, found in (
        (lambda q, k, v: {"k": k[:, :, :-8], "v": v[:, :, :-8]}, "[0-9]+ keys for"),
        (
            lambda q, k, v: {"attn_mask": torch.zeros(1, 1, q.shape[2], q.shape[2], device=q.device)},
            "a mask",
        ),
    ):
        with pytest.raises(ValueError, match=layer + found):
            _unify(host, changed(change))
    reference = [small_models.latent(5, model=model)]
    with pytest.raises(ValueError, match=r"UnifyEdit: .* ComfyUI itself fails on Flux\.1"):
        _unify(host, model, reference_latents=reference, reference_latents_method="index_timestep_zero")
    plain = _unify(host, model)
    beside = _unify(host, model, reference_latents=reference)
    assert not torch.equal(plain, beside)
