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
    with pytest.raises(Exception, match=r"DescEditUnifySampler: .*another model.*other weights.*same MODEL"):
        edit.run()
    edit.model = model.clone()
    weight = "diffusion_model.middle_block.1.proj_in.weight"
    shape = model.model.state_dict()[weight].shape
    edit.model.add_patches({weight: (torch.zeros(shape),)})
    with pytest.raises(Exception, match=r"DescEditUnifySampler: .*another model.*other LoRAs"):
        edit.run()
    edit.model = model.clone()
    edit.run()


def test_other_size_batch_and_steps(host: Host, model: Any) -> None:
    """Protects: latent size, number of images, number of steps and noise levels are checked against the
    inversion.
    """
    edit = Edit(host, model)
    noise = edit.noise
    edit.noise = {"samples": torch.ones(1, 4, 24, 16)}
    with pytest.raises(Exception, match=r"DescEditUnifySampler: the inversion is of a latent of 16x16"):
        edit.run()
    pair = Edit(host, model, batch=2)
    pair.noise = {"samples": torch.ones(3, 4, 16, 16)}
    with pytest.raises(Exception, match=r"DescEditUnifySampler: the inversion holds 2 images but .* has 3"):
        pair.run()
    edit.noise, sigmas = noise, edit.sigmas
    edit.sigmas = torch.cat([sigmas[:1] + 0.1, sigmas])
    with pytest.raises(Exception, match=r"DescEditUnifySampler: .* has 3 steps but the sampler was given 4"):
        edit.run()
    edit.sigmas = sigmas * 0.9
    with pytest.raises(Exception, match=r"DescEditUnifySampler: .* other noise levels"):
        edit.run()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"mask": torch.zeros(1, SIZE, SIZE)}, "mask is empty"),
        ({"mask": torch.ones(1, SIZE, 2 * SIZE)}, "mask is 256x128 but the image is 128x128"),
        ({"mask": torch.ones(3, SIZE, SIZE)}, "mask has 3 images but 1 are edited"),
        ({"structure_side": 3}, "structure_side is 3 but .* at 16x16, 8x8, 4x4 only"),
    ],
)
def test_bad_input(host: Host, model: Any, inputs: dict[str, Any], message: str) -> None:
    """Protects: each bad input is refused with the node's name, what was found and what to do."""
    edit = Edit(host, model, steps=1)
    edit.sampler_inputs.update(inputs)
    with pytest.raises(Exception, match=f"DescEditUnifySampler: {message}"):
        edit.run()


def test_tokens_of_another_text(host: Host, model: Any) -> None:
    """Protects: token positions that the conditioning does not have are an error that names the node."""
    edit = Edit(host, model, steps=1)
    edit.positive = small_models.conditioning(2, tokens=2)
    with pytest.raises(Exception, match=r"DescEditUnifySampler: edit_tokens has token 2 but .* has 2 tokens"):
        edit.run()


def test_unet_that_does_not_run(host: Host, model: Any) -> None:
    """Protects: a node that skips the UNet is told of, instead of losses on nothing."""

    def skip(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(args[0])

    edit = Edit(host, model, steps=1)
    edit.model = model.clone()
    edit.model.add_wrapper_with_key("diffusion_model", "test", skip)
    with pytest.raises(Exception, match=r"DescEditUnifySampler: another node keeps the UNet from running"):
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
    host._nodes.NODE_CLASS_MAPPINGS[name] = type(name, (), attributes)


def test_through_the_executor(host: Host, model: Any) -> None:
    """Protects: the whole edit as a queued prompt; a refused input is that node's error, and the next
    prompt runs.
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

    def prompt(steps: int) -> dict[str, Any]:
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
                {"combination": "balanced", "beta1": 1.0, "k1": 2.0, "beta2": 1.0, "k2": 2.0},
            ),
            "unify": (
                "DescEditUnifySampler",
                {
                    "inversion": ["invert", 0],
                    "edit_tokens": ["find", 0],
                    "balance": ["balance", 0],
                    "mask": ["in", 5],
                    "structure_side": 32,
                    "word_side": 16,
                },
            ),
            "guider": (
                "CFGGuider",
                {"model": ["in", 0], "positive": ["in", 4], "negative": ["in", 3], "cfg": 3.0},
            ),
            "noise": ("DisableNoise", {}),
            "sample": (
                "SamplerCustomAdvanced",
                {
                    "noise": ["noise", 0],
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
    with pytest.raises(NodeError, match=r"DescEditUnifySampler: .* has 3 steps but") as caught:
        host.run_graph(prompt(STEPS + 1), executor)
    assert caught.value.node_type == "SamplerCustomAdvanced"
    outputs = host.run_graph(prompt(STEPS), executor)
    assert bool(torch.isfinite(outputs["sample"][0]["samples"]).all())
