"""One UnifyEdit edit of a random latent with a random model, for the sampler's tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import small_models
import torch
from comfy.sd1_clip import SD1Tokenizer
from host import Host, device

STEPS = 3
SIZE = small_models.LATENT_SIZE * 8


class Edit:
    """One edit of a random latent; every part can be replaced before `run`."""

    def __init__(
        self,
        host: Host,
        model: Any,
        steps: int = STEPS,
        batch: int = 1,
        seed: int = 3,
        size: tuple[int, int] = (small_models.LATENT_SIZE, small_models.LATENT_SIZE),
        **inversion: Any,
    ) -> None:
        self.host, self.model = host, model
        self.sigmas = host.pack_module("patches.host.sigmas").schedule(model, "normal", steps, 1.0)
        self.latent = {"samples": small_models.latent(seed, batch, size, model)}
        self.inversion, self.noise, self.path_noise = host.execute(
            "DescEditInvert",
            model=model,
            latent=self.latent,
            source=small_models.conditioning(1),
            sigmas=self.sigmas,
            **{"refine": 1, **inversion},
        )
        self.tokens, _ = host.execute(
            "DescEditFindTokens",
            clip=tokenizer_only_clip(),
            source_description="a red circle",
            edit_description="a green circle",
        )
        self.positive = small_models.conditioning(2)
        self.cfg = 3.0
        self.guider: Any = None
        self.sampler_inputs: dict[str, Any] = {}
        self.traces: list[Any] = []

    def balance(self, **inputs: Any) -> Any:
        """BALANCE from its node."""
        return self.host.execute("DescEditAdaptiveScheduler", **inputs)[0]

    def sampler(self) -> Any:
        """SAMPLER from its node; `sampler_inputs` are that node's and those of its options."""
        inputs = dict(self.sampler_inputs)
        direct = {name: inputs.pop(name) for name in ("balance", "mask", "options") if name in inputs}
        if inputs:
            (direct["options"],) = self.host.execute("DescEditUnifyOptions", **inputs)
        (sampler,) = self.host.execute(
            "DescEditUnifySampler", inversion=self.inversion, edit_tokens=self.tokens, **direct
        )
        sampler.extra_options["report"] = self.traces.append
        return sampler

    def _no_noise(self) -> Any:
        """NOISE with which a stock sampler begins at the path's end: a flow model's has to lead there."""
        flow = isinstance(self.model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        return self.path_noise if flow else self.host.execute("DisableNoise")[0]

    def trace(self) -> Any:
        """What the last run recorded."""
        return self.traces[-1]

    def run(self, sampler: Any = None, noise: Any = None) -> torch.Tensor:
        """Sample, in the host's own nodes; returns the edited latent."""
        sampler = sampler or self.sampler()
        guider = (
            self.guider
            or self.host.execute(
                "CFGGuider",
                model=self.model,
                positive=self.positive,
                negative=small_models.conditioning(4),
                cfg=self.cfg,
            )[0]
        )
        output, _ = self.host.execute(
            "SamplerCustomAdvanced",
            noise=noise or self._no_noise(),
            guider=guider,
            sampler=sampler,
            sigmas=self.sigmas,
            latent_image=self.noise,
        )
        self.output = output
        return output["samples"]


def tokenizer_only_clip() -> Any:
    """What DescEditFindTokens needs of a CLIP."""
    tokenizer = SD1Tokenizer()
    return SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)


def projections(host: Host, probabilities: torch.Tensor) -> Any:
    """Queries and keys of an attention with these probabilities, [rows, heads, queries, keys]."""
    rows, heads, _, keys = probabilities.shape
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    q = probabilities.clamp(min=1e-30).log() * keys**0.5
    k = torch.eye(keys).expand(rows, keys, keys).repeat(1, 1, heads)
    made = host.pack_module("patches.attention.projections").Projections
    return made(q.transpose(1, 2).flatten(2), k, heads)


def box_mask(rows: int = 1, size: int = SIZE) -> torch.Tensor:
    """A MASK of the image's size with its left third to be edited."""
    mask = torch.zeros(rows, size, size)
    mask[:, :, : size // 3] = 1
    return mask


def euler(host: Host) -> Any:
    """The stock Euler sampler."""
    return host.execute("KSamplerSelect", sampler_name="euler")[0]


def denoise(model: Any, x: torch.Tensor, sigma: torch.Tensor, condition: Any) -> torch.Tensor:
    """The model's prediction for one conditioning at guidance 1, in its own space, by a plain call; it is on
    the CPU, as what nodes give.
    """
    entries = {"positive": comfy.sampler_helpers.convert_cond(condition)}
    small_models.loaded(model).pre_run()
    x, sigma = x.to(device()), sigma.to(device())
    with torch.inference_mode():
        conds = comfy.samplers.process_conds(model.model, x, entries, x.device)["positive"]
        levels = sigma * x.new_ones(len(x))
        (found,) = comfy.samplers.calc_cond_batch(
            model.model, [conds], x, levels, {"transformer_options": {}}
        )
    return found.cpu()


class FakeControl:
    """A ControlNet's interface with a residual on a skip connection that depends on the latent."""

    extra_hooks = previous_controlnet = None
    multigpu_clones: ClassVar = {}

    def get_control(self, x: torch.Tensor, *_: Any) -> dict[str, list[Any]]:
        """Residuals as the host's UNet takes them: the list's end belongs to the last skip connection."""
        mean = x.mean(dim=1, keepdim=True)
        return {"output": [mean.repeat(1, 32, 1, 1), None, None, None, None, None]}

    def get_models(self) -> list:
        """No weights to load."""
        return []

    get_extra_hooks = get_models

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """None needed."""
        return 0

    def pre_run(self, *_: Any) -> None:
        """Nothing to prepare."""

    cleanup = pre_run
