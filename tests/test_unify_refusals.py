"""What UnifyEdit's sampler refuses, and how a refusal looks in a queued prompt."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import torch
from host import Host, NodeError
from unify_edit import SIZE, STEPS, Edit, box_mask, tokenizer_only_clip


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def test_other_model(host: Host, model: Any) -> None:
    """Protects: an inversion made with another checkpoint, or with other LoRAs, is refused."""
    edit = Edit(host, model)
    edit.model = small_models.small_unet(seed=9)
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: .*another model.*other weights.*same MODEL"):
        edit.run()
    edit.model = model.clone()
    weight = "diffusion_model.middle_block.1.proj_in.weight"
    shape = model.model.state_dict()[weight].shape
    edit.model.add_patches({weight: (torch.zeros(shape),)})
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: .*another model.*other LoRAs"):
        edit.run()
    edit.model = model.clone()
    edit.run()


def test_other_size_batch_and_steps(host: Host, model: Any) -> None:
    """Protects: latent size, number of images, number of steps and sigmas are checked against the
    inversion.
    """
    edit = Edit(host, model)
    noise = edit.noise
    edit.noise = {"samples": torch.ones(1, 4, 24, 16)}
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: the inversion is of a latent of 16x16"):
        edit.run()
    pair = Edit(host, model, batch=2)
    pair.noise = {"samples": torch.ones(3, 4, 16, 16)}
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: the inversion holds 2 images but .* has 3"):
        pair.run()
    edit.noise, sigmas = noise, edit.sigmas
    edit.sigmas = torch.cat([sigmas[:1] + 0.1, sigmas])
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: .* has 3 steps but the sampler was given 4"):
        edit.run()
    edit.sigmas = sigmas * 0.9
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: .* other sigmas"):
        edit.run()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask": torch.zeros(1, SIZE, SIZE)}, "mask is empty"),
        ({"mask": torch.ones(1, SIZE, 2 * SIZE)}, "mask is 256x128 but the image is 128x128"),
        ({"mask": torch.ones(3, SIZE, SIZE)}, "mask has 3 images but 1 are edited"),
        ({"structure_layers": " , "}, "structure_layers ' , ' names no attention layer"),
        ({"mask": 2 * box_mask()}, "mask has values from 0.0 to 2.0"),
        ({"alignment": "area_ratio"}, "alignment area_ratio needs a mask: wire one, or turn auto_mask on"),
        (
            {"alignment": "spatial_ratio", "mask": torch.ones(1, SIZE, SIZE)},
            "mask covers the whole image, but alignment spatial_ratio needs an outside",
        ),
    ],
)
def test_bad_input(host: Host, model: Any, inputs: dict[str, Any], message: str) -> None:
    """Protects: each bad input is refused with the node's name, what was found and what to do."""
    edit = Edit(host, model, steps=1)
    edit.sampler_inputs.update(inputs)
    with pytest.raises(Exception, match=f"UnifyEdit Sampler: {message}"):
        edit.run()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"update_target": "noise", "inner_steps": 2}, "inner_steps is 2 but update_target noise"),
        ({"inner_steps": 0}, "inner_steps is 0"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "start_percent is 0.5 and end_percent 0.5"),
        ({"end_percent": float("nan")}, "start_percent is 0.0 and end_percent nan"),
        ({"alignment": "ratio"}, "alignment is 'ratio' but must be one of token_ratio"),
    ],
)
def test_bad_options(host: Host, inputs: dict[str, Any], message: str) -> None:
    """Protects: options that cannot be are refused by the node that has them."""
    with pytest.raises(Exception, match=f"UnifyEdit Options: {message}"):
        host.execute("DescEditUnifyOptions", **inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, SIZE, SIZE), "mask is empty"),
        (torch.ones(1, SIZE, 2 * SIZE), "mask is 256x128 but the image is 128x128"),
        (torch.ones(3, SIZE, SIZE), "mask has 3 images but 2 are edited"),
        (2 * box_mask(), "mask has values from 0.0 to 2.0"),
    ],
)
def test_a_wrong_mask_marks_its_node(host: Host, model: Any, mask: torch.Tensor, message: str) -> None:
    """Protects: a mask that does not fit the inverted images is refused before anything is sampled."""
    edit = Edit(host, model, steps=1, batch=2, mode="virtual")
    edit.sampler_inputs["mask"] = mask
    with pytest.raises(Exception, match=f"UnifyEdit Sampler: {message}"):
        edit.sampler()


def test_masks_of_a_batch(host: Host, model: Any) -> None:
    """Protects: of several masks the one that is wrong is named."""
    edit = Edit(host, model, steps=1, batch=2)
    for wrong, message in ((torch.zeros, "mask of image 2 is empty"), (torch.ones, "mask of image 2 covers")):
        edit.sampler_inputs.update(
            mask=torch.cat([box_mask(), wrong(1, SIZE, SIZE)]), alignment="spatial_ratio"
        )
        with pytest.raises(Exception, match=f"UnifyEdit Sampler: {message}"):
            edit.run()


@pytest.mark.parametrize("region", ["outside", "inside"])
def test_a_mask_of_the_whole_image(host: Host, model: Any, region: str) -> None:
    """Protects: with a mask of the whole image structure is kept everywhere, as without a mask, image by
    image.
    """
    edit = Edit(host, model, batch=2)
    plain = edit.run()
    edit.sampler_inputs.update(mask=torch.ones(1, SIZE, SIZE), structure_region=region)
    assert torch.equal(edit.run(), plain)
    edit.sampler_inputs["mask"] = torch.cat([torch.ones(1, SIZE, SIZE), box_mask()])
    mixed = edit.run()
    torch.testing.assert_close(mixed[0], plain[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[1], plain[1], atol=1e-2)


def test_two_balances(host: Host, model: Any) -> None:
    """Protects: a balance at the sampler and another in its options cannot both count."""
    edit = Edit(host, model, steps=1, mode="virtual")
    (options,) = host.execute("DescEditUnifyOptions", balance=edit.balance(beta1=0.5))
    edit.sampler_inputs.update(balance=edit.balance(), options=options)
    with pytest.raises(Exception, match="UnifyEdit Sampler: balance is connected here and in options"):
        edit.sampler()
    del edit.sampler_inputs["balance"]
    assert edit.sampler().extra_options["settings"].balance.beta1 == 0.5


@pytest.mark.parametrize("inputs", [{"beta1": -1.0}, {"k2": float("nan")}, {"beta2": float("inf")}])
def test_bad_balance(host: Host, inputs: dict[str, float]) -> None:
    """Protects: factors that are negative or not finite are refused by name."""
    (name,) = inputs
    with pytest.raises(Exception, match=f"Adaptive Scheduler .UnifyEdit.: {name} is .* must be 0 or a"):
        host.execute("DescEditAdaptiveScheduler", **inputs)


def test_virtual_inversion_of_a_part(host: Host, model: Any) -> None:
    """Protects: a source description for an area, or for a part of the sampling, cannot be inverted
    virtually.
    """
    text, values = small_models.conditioning(1)[0]
    inputs = {"model": model, "latent": {"samples": small_models.latent(3)}, "mode": "virtual"}
    sigmas = Edit(host, model, steps=2, mode="virtual").sigmas
    with pytest.raises(Exception, match=r"Invert Image .DDIM.: source has entries with an area"):
        host.execute(
            "DescEditInvert", source=[[text, {**values, "area": (8, 8, 0, 0)}]], sigmas=sigmas, **inputs
        )
    edit = Edit(host, model, steps=2, mode="virtual")
    part = [[text, {**values, "start_percent": 0.0, "end_percent": 0.2}]]
    edit.inversion, edit.noise, _ = host.execute("DescEditInvert", source=part, sigmas=sigmas, **inputs)
    with pytest.raises(Exception, match="UnifyEdit Sampler: the inversion's source description leaves out"):
        edit.run()


def test_description_that_is_never_there(host: Host, model: Any) -> None:
    """Protects: an edit description whose time range holds no step is an error."""
    edit = Edit(host, model)
    text, values = edit.positive[0]
    edit.positive = [[text, {**values, "start_percent": 0.98, "end_percent": 0.99}]]
    with pytest.raises(Exception, match="UnifyEdit Sampler: no step was optimised: the guider's positive"):
        edit.run()


def test_tokens_of_another_text(host: Host, model: Any) -> None:
    """Protects: token positions that the conditioning does not have are an error that names the node."""
    edit = Edit(host, model, steps=1)
    edit.positive = small_models.conditioning(2, tokens=2)
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: edit_tokens has token 2 but .* has 2 tokens"):
        edit.run()


def test_unet_that_does_not_run(host: Host, model: Any) -> None:
    """Protects: a node that skips the UNet is reported, instead of losses on nothing."""

    def skip(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(args[0])

    edit = Edit(host, model, steps=1)
    edit.model = model.clone()
    edit.model.add_wrapper_with_key("diffusion_model", "test", skip)
    with pytest.raises(Exception, match=r"UnifyEdit Sampler: another node keeps the network from running"):
        edit.run()


def _graph_node(host: Host, name: str, outputs: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """Register a node that hands `values` to a prompt."""

    def give(self: Any) -> tuple[Any, ...]:
        return values

    attributes = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
        "RETURN_TYPES": outputs,
        "FUNCTION": "give",
        "CATEGORY": "test",
        "give": give,
    }
    mappings: dict[str, Any] = host._nodes.NODE_CLASS_MAPPINGS
    mappings[name] = type(name, (), attributes)


def test_through_the_executor(host: Host, model: Any) -> None:
    """Protects: the whole edit as a queued prompt; a refused input is that node's error, and the next
    prompt runs; a run that is made again has the same bits.
    """
    values = (
        model,
        tokenizer_only_clip(),
        {"samples": small_models.latent(3)},
        small_models.conditioning(1),
        small_models.conditioning(2),
        box_mask(),
    )
    kinds = ("MODEL", "CLIP", "LATENT", "CONDITIONING", "CONDITIONING", "MASK")
    _graph_node(host, "TestUnifyInputs", kinds, values)
    texts = {"source_description": "a red circle", "edit_description": "a green circle"}

    def prompt(steps: int, beta1: float = 1.0) -> dict[str, Any]:
        def scheduler(count: int) -> dict[str, Any]:
            return {
                "class_type": "BasicScheduler",
                "inputs": {"model": ["in", 0], "scheduler": "normal", "steps": count, "denoise": 1.0},
            }

        nodes = {
            "in": ("TestUnifyInputs", {}),
            "find": ("DescEditFindTokens", {"clip": ["in", 1], "words": "", **texts}),
            "invert": (
                "DescEditInvert",
                {
                    "model": ["in", 0],
                    "latent": ["in", 2],
                    "source": ["in", 3],
                    "sigmas": ["sigmas", 0],
                    "refine": 1,
                },
            ),
            "balance": (
                "DescEditAdaptiveScheduler",
                {"combination": "balanced", "beta1": beta1, "k1": 2.0, "beta2": 1.0, "k2": 2.0},
            ),
            "unify": (
                "DescEditUnifySampler",
                {
                    "inversion": ["invert", 0],
                    "edit_tokens": ["find", 0],
                    "balance": ["balance", 0],
                    "mask": ["in", 5],
                },
            ),
            "none": ("DisableNoise", {}),
            "guider": (
                "CFGGuider",
                {"model": ["in", 0], "positive": ["in", 4], "negative": ["in", 3], "cfg": 3.0},
            ),
            "sample": (
                "SamplerCustomAdvanced",
                {
                    "noise": ["none", 0],
                    "guider": ["guider", 0],
                    "sampler": ["unify", 0],
                    "sigmas": ["other", 0],
                    "latent_image": ["invert", 1],
                },
            ),
            "save": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "test"}),
        }
        made = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
        return {**made, "sigmas": scheduler(STEPS), "other": scheduler(steps)}

    executor = host.executor()
    with pytest.raises(NodeError, match=r"UnifyEdit Sampler: .* has 3 steps but") as caught:
        host.run_graph(prompt(STEPS + 1), executor)
    assert caught.value.node_type == "SamplerCustomAdvanced"
    outputs = host.run_graph(prompt(STEPS), executor)
    assert bool(torch.isfinite(outputs["sample"][0]["samples"]).all())
    other = host.run_graph(prompt(STEPS, beta1=0.1), executor)["sample"][0]["samples"]
    assert not torch.equal(other, outputs["sample"][0]["samples"])
    back = host.run_graph(prompt(STEPS), executor)["sample"][0]["samples"]
    assert torch.equal(back, outputs["sample"][0]["samples"])
