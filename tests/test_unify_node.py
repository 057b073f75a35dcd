"""The simple nodes of UnifyEdit: Describe Edit, UnifyEdit with its options, Find Edit Mask."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.samplers
import latent_preview
import pytest
import small_models
import torch
from host import Host
from unify_edit import SIZE, box_mask, tokenizer_only_clip

STEPS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


@pytest.fixture(scope="module")
def tokens(host: Host) -> Any:
    """EDIT_TOKENS of a changed word."""
    texts = {"source_description": "a red circle", "edit_description": "a green circle"}
    return host.execute("DescEditFindTokens", clip=tokenizer_only_clip(), **texts)[0]


def unify(host: Host, model: Any, tokens: Any, **inputs: Any) -> tuple[Any, ...]:
    """The node UnifyEdit on a random latent."""
    given = {
        "model": model,
        "source": small_models.conditioning(1),
        "edit": small_models.conditioning(2),
        "negative": small_models.conditioning(4),
        "edit_tokens": tokens,
        "latent": {"samples": small_models.latent(3)},
        "steps": STEPS,
        "cfg": 3.0,
    }
    return host.execute("DescEditUnify", **{**given, **inputs})


def parts(
    host: Host,
    model: Any,
    tokens: Any,
    balance: dict[str, float],
    invert: dict[str, Any],
    sampler: dict[str, Any],
    denoise: float,
    noise_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The same edit as a graph of the parts."""
    (sigmas,) = host.execute("BasicScheduler", model=model, scheduler="karras", steps=STEPS, denoise=denoise)
    inversion, noise, _ = host.execute(
        "DescEditInvert",
        model=model,
        latent={"samples": small_models.latent(3)},
        source=small_models.conditioning(1),
        sigmas=sigmas,
        **invert,
    )
    (sampler,) = host.execute(
        "DescEditUnifySampler",
        inversion=inversion,
        edit_tokens=tokens,
        balance=host.execute("DescEditAdaptiveScheduler", **balance)[0],
        **sampler,
    )
    guider = {"positive": small_models.conditioning(2), "negative": small_models.conditioning(4), "cfg": 3.0}
    output, _ = host.execute(
        "SamplerCustomAdvanced",
        noise=host.execute("DisableNoise")[0],
        guider=host.execute("CFGGuider", model=model, **guider)[0],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=noise if noise_mask is None else {**noise, "noise_mask": noise_mask},
    )
    return output["samples"]


@pytest.mark.parametrize("case", ["defaults", "masked", "virtual"])
def test_equals_the_parts(host: Host, model: Any, tokens: Any, case: str) -> None:
    """Protects: the one node is the graph of its parts with the same settings, bit for bit, with masks, noise
    masks and options too.
    """
    strengths, invert, options, mask, noise_mask = {}, {}, {}, None, None
    if case == "masked":
        strengths, mask, noise_mask = {"structure": 0.6, "words": 0.2}, box_mask(), box_mask()
        options = {"refine": 1, "inner_steps": 2, "alignment": "spatial_ratio"}
        invert = {"refine": 1}
    elif case == "virtual":
        invert = {"mode": "virtual", "virtual_seed": 5}
        options = {"inversion": "virtual", "virtual_seed": 5, "auto_mask": True}
    (made,) = host.execute("DescEditUnifyOptions", **options)
    latent = {"samples": small_models.latent(3)}
    if noise_mask is not None:
        latent["noise_mask"] = noise_mask
    whole, *_ = unify(
        host,
        model,
        tokens,
        latent=latent,
        mask=mask,
        scheduler="karras",
        denoise=0.7,
        options=made if options else None,
        **strengths,
    )
    balance = dict(zip(("beta1", "beta2"), strengths.values(), strict=False))
    sampler = {"mask": mask, "options": made}
    expected = parts(host, model, tokens, balance, invert, sampler, 0.7, noise_mask)
    assert torch.equal(whole["samples"], expected)
    assert set(whole) == set(latent)


def test_outputs(host: Host, model: Any, tokens: Any) -> None:
    """Protects: the mask output is the mask that was given or found, in pixels, or 1 everywhere; the plot has
    a picture for each image; what the LATENT carried stays in it.
    """
    latent = {"samples": small_models.latent(3, batch=2), "batch_index": [0, 1]}
    edited, mask, plot = unify(host, model, tokens, latent=latent, denoise=0.5)
    assert edited["samples"].shape == latent["samples"].shape
    assert edited["batch_index"] == [0, 1]
    assert torch.equal(mask, torch.ones(1, SIZE, SIZE))
    assert plot.shape == (2, 480, 512, 3)
    (options,) = host.execute("DescEditUnifyOptions", auto_mask=True)
    _, given, _ = unify(host, model, tokens, latent=latent, mask=box_mask(), options=options)
    assert torch.equal(given, box_mask())
    _, found, _ = unify(host, model, tokens, latent=latent, options=options)
    assert found.shape == (2, SIZE, SIZE)
    assert set(found.unique().tolist()) == {0.0, 1.0}


def test_without_a_negative(host: Host, model: Any, tokens: Any) -> None:
    """Protects: without a negative description zeros take its place, as ConditioningZeroOut makes them."""
    (zeros,) = host.execute("ConditioningZeroOut", conditioning=small_models.conditioning(2))
    without, *_ = unify(host, model, tokens, negative=None)
    assert torch.equal(without["samples"], unify(host, model, tokens, negative=zeros)[0]["samples"])


class OnACard(comfy.model_sampling.ModelSamplingDiscrete):
    """Tables that give another last bit where they lie, as a card's exp does, until they are moved."""

    away = True

    def cpu(self) -> OnACard:
        self.away = False
        return super().cpu()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        found = super().sigma(timestep)
        return torch.nextafter(found, torch.zeros_like(found)) if self.away else found


def test_sigmas_of_a_loaded_model(host: Host, model: Any) -> None:
    """Protects: the sigmas, and with them the timesteps that lie half way between two, do not depend on
    whether the model's tables have gone to a card yet.
    """
    schedule = host.pack_module("patches.host.sigmas").schedule
    loaded, tables = model.clone(), OnACard(model.model.model_config)
    loaded.add_object_patch("model_sampling", tables)
    expected = schedule(model, "normal", STEPS, 1.0)
    assert torch.equal(schedule(loaded, "normal", STEPS, 1.0), expected)
    plain = model.get_model_object("model_sampling")
    there = comfy.samplers.calculate_sigmas(tables, "normal", STEPS)
    assert [int(plain.timestep(sigma)) for sigma in expected[:-1]] == [999, 500, 0]
    assert [int(plain.timestep(sigma)) for sigma in there[:-1]] == [999, 499, 0]
    assert tables.away


def test_progress(host: Host, model: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: inversion and sampling both report each of their steps to the host's preview."""
    reported = []

    def prepare(model: Any, steps: int, x0: dict | None = None) -> Any:
        return lambda step, denoised, x, total: reported.append((step, total))

    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    unify(host, model, tokens)
    assert reported == 2 * [(step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"denoise": 0.0}, "denoise is 0: nothing to sample"),
        ({"mask": torch.zeros(1, SIZE, SIZE)}, "mask is empty"),
        ({"mask": torch.ones(1, SIZE, 2 * SIZE)}, "mask is 256x128 but the image is 128x128"),
        ({"latent": {"samples": torch.zeros(1, 4, 16, 16)}}, "latent is empty"),
        ({"latent": {"samples": torch.ones(1, 16, 16, 16)}}, "latent has shape"),
        ({"structure": -1.0}, "structure is -1.0"),
        ({"words": float("nan")}, "words is nan"),
    ],
)
def test_bad_input(host: Host, model: Any, tokens: Any, inputs: dict[str, Any], message: str) -> None:
    """Protects: each bad input is refused by its own name."""
    with pytest.raises(Exception, match=f"^UnifyEdit: {message}"):
        unify(host, model, tokens, **inputs)


def test_balance_in_options(host: Host, model: Any, tokens: Any) -> None:
    """Protects: a balance in the options counts, and a strength that contradicts it is an error instead of
    being ignored.
    """
    (balance, _) = host.execute("DescEditAdaptiveScheduler", beta1=0.5, k1=3.0)
    (options,) = host.execute("DescEditUnifyOptions", balance=balance)
    curved, *_ = unify(host, model, tokens, options=options)
    same, *_ = unify(host, model, tokens, options=options, structure=0.5)
    assert torch.equal(curved["samples"], same["samples"])
    assert not torch.equal(curved["samples"], unify(host, model, tokens)[0]["samples"])
    with pytest.raises(
        Exception, match=r"UnifyEdit: structure is 0\.7 but the balance in options has a beta1"
    ):
        unify(host, model, tokens, options=options, structure=0.7)


def test_describe(host: Host) -> None:
    """Protects: Describe Edit encodes as CLIPTextEncode does and finds what Find Edit Tokens finds."""
    _, clip, *_ = host.execute("DescEditTinyStudio")
    texts = {"source_description": "a red circle", "edit_description": "a blue circle"}
    source, edit, tokens, text = host.execute("DescEditDescribe", clip=clip, words="blue", **texts)
    assert (tokens, text) == host.execute("DescEditFindTokens", clip=clip, words="blue", **texts)
    for found, written in zip((source, edit), texts.values(), strict=True):
        (expected,) = host.execute("CLIPTextEncode", clip=clip, text=written)
        assert torch.equal(found[0][0], expected[0][0])
        assert found[0][1].keys() == expected[0][1].keys()
    with pytest.raises(Exception, match="Describe Edit: words has 'green', which is not in edit_description"):
        host.execute("DescEditDescribe", clip=clip, words="green", **texts)


def test_find_mask(host: Host) -> None:
    """Protects: the mask lies where the words look: on the shape whose colour changes, in pixels, and is what
    UnifyEdit finds by itself on the same noise.
    """
    model, clip, vae, _ = host.execute("DescEditTinyStudio")
    scene, _, true, before, after = host.execute(
        "DescEditTinyScene", edit_type="colour", seed=8, wording="simple"
    )
    (latent,) = host.execute("VAEEncode", pixels=scene, vae=vae)
    source, edit, tokens, _ = host.execute(
        "DescEditDescribe", clip=clip, source_description=before, edit_description=after
    )
    inputs = {"model": model, "source": source, "edit": edit, "edit_tokens": tokens, "latent": latent}
    (mask,) = host.execute("DescEditFindMask", **inputs)
    assert mask.shape == true.shape
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    inside, outside = float(mask[true > 0].mean()), float(mask[true == 0].mean())
    assert inside > 2 * outside
    (again,) = host.execute("DescEditFindMask", **inputs)
    assert torch.equal(again, mask)
    (finer,) = host.execute("DescEditFindMask", cross_attn_res=8, **inputs)
    assert not torch.equal(finer, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": {"samples": torch.zeros(1, 4, 16, 16)}}, "latent is empty"),
        ({"area": (8, 8, 0, 0)}, "edit has no entry for the whole image"),
    ],
)
def test_find_mask_refuses(host: Host, model: Any, tokens: Any, change: dict[str, Any], message: str) -> None:
    """Protects: what no mask can be found in is refused by its own name."""
    edit = small_models.conditioning(2)
    if "area" in change:
        edit = [[edit[0][0], {**edit[0][1], "area": change.pop("area")}]]
    inputs = {
        "latent": {"samples": small_models.latent(3)},
        "source": small_models.conditioning(1),
        "edit": edit,
        **change,
    }
    with pytest.raises(Exception, match=f"Find Edit Mask: {message}"):
        host.execute("DescEditFindMask", model=model, edit_tokens=tokens, **inputs)
