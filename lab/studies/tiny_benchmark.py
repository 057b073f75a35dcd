"""The Tiny Studio's edit benchmark: edits with known answers, and what a method's pictures score on them.

Held-out cases ask for combinations of attributes that no training of the model or of a bridge saw; settings
are chosen on tuning cases alone, whose combinations were trained on, though not these scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ...metrics import image as metrics
from ...metrics.image import Network
from ...models.tiny_studio import scenes, studio
from ...patches.attention.networks import network_of
from ...patches.attention.recorder import AttentionRecorder
from ..tiny_studio import attribute_classifier as judge

STEPS, BATCH = 25, 50
HELD_OUT_A_TYPE, TUNING_A_TYPE = 50, 10
TUNING_SEED = 1_000_000  # far from the training pairs' seeds
Conditioning = list[list[Any]]


@dataclass(frozen=True, eq=False)
class Studio:
    """The Tiny Studio under the host's management: a ModelPatcher, a CLIP and a VAE."""

    model: Any
    clip: Any
    vae: Any

    @classmethod
    def load(cls) -> Studio:
        """With torch's own attention: the host's choice for a CPU takes twice as long."""
        model = studio.load_model()
        model.model_options["transformer_options"]["optimized_attention_override"] = _torch_attention
        return cls(model, studio.load_clip(), studio.load_vae())

    def text(self, texts: list[str]) -> torch.Tensor:
        """[texts, 77, 128]."""
        encoded = [self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts]
        return torch.cat(encoded)


def _torch_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_pytorch(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Cases:
    """Edits side by side. source, target: pictures, [cases, 128, 128, 3], 0 to 1. mask: [cases, 128, 128],
    1 where the edit happens. latent: of the sources, [cases, 4, 16, 16]. source_text, edit_text,
    instruction, no_text: [cases, 77, 128]. noise: as the latents, each case its own.
    """

    pairs: tuple[scenes.EditPair, ...]
    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    latent: torch.Tensor
    source_text: torch.Tensor
    edit_text: torch.Tensor
    instruction: torch.Tensor
    no_text: torch.Tensor
    noise: torch.Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def chosen(self, numbers: list[int]) -> Cases:
        """Some of the cases."""
        pairs = tuple(self.pairs[number] for number in numbers)
        return Cases(pairs, *(getattr(self, field.name)[numbers] for field in fields(self)[1:]))

    def batches(self, size: int = BATCH) -> Iterator[Cases]:
        for start in range(0, len(self), size):
            yield Cases(*(getattr(self, field.name)[start : start + size] for field in fields(self)))


@torch.inference_mode()
def draw_cases(
    tiny: Studio, held_out: bool, a_type: int | None = None, types: Sequence[str] = scenes.EDIT_TYPES
) -> Cases:
    """The held-out cases or the tuning cases, `a_type` of each edit type, half of them with short texts."""
    a_type = a_type or (HELD_OUT_A_TYPE if held_out else TUNING_A_TYPE)
    first = 0 if held_out else TUNING_SEED
    pairs = tuple(
        scenes.sample_edit(edit_type, first + number, scenes.WORDINGS[number % 2], held_out)
        for edit_type in types
        for number in range(a_type)
    )
    source, target = (
        torch.from_numpy(np.stack([getattr(pair, name).draw() for pair in pairs]))
        for name in ("source", "target")
    )
    everywhere = np.ones(source.shape[1:3], np.float32)
    masks = [everywhere if (mask := pair.mask()) is None else mask for pair in pairs]
    generator = torch.Generator().manual_seed(20 + held_out)
    latent = torch.cat([tiny.vae.encode(part) for part in source.split(BATCH)])
    return Cases(
        pairs=pairs,
        source=source,
        target=target,
        mask=torch.from_numpy(np.stack(masks)),
        latent=latent,
        source_text=tiny.text([pair.source_text for pair in pairs]),
        edit_text=tiny.text([pair.edit_text for pair in pairs]),
        instruction=tiny.text([scenes.instruction(pair) for pair in pairs]),
        no_text=tiny.text([""]).expand(len(pairs), -1, -1),
        noise=torch.randn(latent.shape, generator=generator),
    )


def conditioning(text: torch.Tensor) -> Conditioning:
    return [[text, {}]]


def cfg_guider(model: Any, positive: torch.Tensor, negative: torch.Tensor, cfg: float) -> Any:
    """The stock guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(positive), conditioning(negative))
    guider.set_cfg(cfg)
    return guider


def sigmas(tiny: Studio, denoise: float = 1.0, steps: int = STEPS) -> torch.Tensor:
    """`steps` steps of the host's normal schedule from `denoise` (0 to 1) of the noise down."""
    sampling = tiny.model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "normal", round(steps / denoise))[-(steps + 1) :]


def euler(guider: Any, noise: torch.Tensor, latent: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Latents sampled with the host's Euler sampler."""
    return sample(guider, noise, latent, comfy.samplers.sampler_object("euler"), levels)


def sample(
    guider: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, levels: torch.Tensor
) -> torch.Tensor:
    """The guider's latents, brought from its device to where nodes leave theirs, beside the cases."""
    made = guider.sample(noise, latent, sampler, levels, disable_pbar=True, seed=0)
    return made.to(comfy.model_management.intermediate_device())


Method = Callable[[Studio, Cases], torch.Tensor]


def quick_products(tiny: Studio) -> torch.autocast:
    """Matrix products of the model in bfloat16, which takes two thirds of the time, but only on a CPU with
    AVX-512: without, it takes several times as long, and elsewhere the model's own dtype is quick.
    """
    device = tiny.model.load_device.type
    quick = device == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device, torch.bfloat16, enabled=quick)


def run(tiny: Studio, cases: Cases, method: Method, report: Callable[[int], None] | None = None) -> Any:
    """The method's pictures for all cases, [cases, 128, 128, 3]; `report` is told how many are done."""
    made: list[torch.Tensor] = []
    with torch.inference_mode():
        for part in cases.batches():
            with quick_products(tiny):
                latents = method(tiny, part)
            made.append(tiny.vae.decode(latents).clamp(0, 1))
            if report is not None:
                report(sum(map(len, made)))
    return torch.cat(made)


@dataclass(frozen=True, eq=False)
class Scores:
    """What pictures score, each [cases]: success, whether the judge reads every attribute as the edit wants
    it; psnr_db, ssim, lpips (AlexNet) against the true edited picture; kept_db and kept_ssim, PSNR and SSIM
    outside the mask against the source (the cases without an outside left out as nan); structure, the mean
    squared difference of the source's and the edited picture's self-attention in the small UNet, times 1000,
    for which `structure_distance` is asked apart, since it takes as long as all others.
    """

    types: tuple[str, ...]
    success: torch.Tensor
    psnr_db: torch.Tensor
    ssim: torch.Tensor
    lpips: torch.Tensor
    kept_db: torch.Tensor
    kept_ssim: torch.Tensor
    structure: torch.Tensor

    def mean(self, name: str, edit_type: str | None = None) -> float:
        values = getattr(self, name).double()
        if edit_type is not None:
            values = values[torch.tensor([kind == edit_type for kind in self.types])]
        return float(values.nanmean())

    def worst_type(self) -> float:
        return min(self.mean("success", edit_type) for edit_type in set(self.types))


def successes(cases: Cases, pictures: torch.Tensor) -> torch.Tensor:
    """[cases] of bool: the judge reads the asked attribute as changed and all others as they were."""
    wanted = [{"kind": pair.target.kind, **pair.target.values} for pair in cases.pairs]
    read = judge.load().read_as([values["kind"] for values in wanted], pictures)
    return torch.tensor([seen == values for seen, values in zip(read, wanted, strict=True)])


@torch.inference_mode()
def structure_distance(tiny: Studio, cases: Cases, pictures: torch.Tensor) -> torch.Tensor:
    """[cases], times 1000: the mean squared difference of all self-attention probabilities between sources
    and pictures, each read clean (timestep 0) with no text: how far layout and shapes have moved.
    """
    model = tiny.model.model
    network = network_of(model.diffusion_model)
    # Called without a sampler, so nothing else brings the model and what it is given to its device.
    comfy.model_management.load_model_gpu(tiny.model)
    device, found = tiny.model.load_device, []
    for start in range(0, len(cases), BATCH):
        part = slice(start, start + BATCH)
        maps = []
        for latent in (cases.latent[part], tiny.vae.encode(pictures[part])):
            recorder = AttentionRecorder(network, network.layers.values(), ())
            sigma = model.model_sampling.sigma_min.to(device).expand(len(latent))
            options = recorder.attach(tiny.model.model_options)["transformer_options"]
            text = cases.no_text[part].to(device)
            model.apply_model(
                model.process_latent_in(latent).to(device),
                sigma,
                c_crossattn=text,
                transformer_options=options,
            )
            maps.append(recorder.self_attention)
        before, after = maps
        changes = [before[key].probabilities() - after[key].probabilities() for key in before]
        distances = [change.square().flatten(1).mean(dim=1) for change in changes]
        found.append(torch.stack(distances).mean(dim=0))
    return 1000 * torch.cat(found).to(cases.latent.device)


def score(cases: Cases, pictures: torch.Tensor, lpips: Network | None) -> Scores:
    """Scores of [cases, 128, 128, 3] pictures; without an `lpips` network that figure is nan."""
    networks = {"lpips": lpips} if lpips else {}
    true = metrics.measure(pictures, cases.target, networks=networks)
    kept = metrics.measure(pictures, cases.source, cases.mask)
    return Scores(
        types=tuple(pair.edit_type for pair in cases.pairs),
        success=successes(cases, pictures),
        psnr_db=true["psnr"],
        ssim=true["ssim"],
        lpips=true.get("lpips", torch.full_like(true["psnr"], torch.nan)),
        kept_db=kept["psnr_outside"],
        kept_ssim=kept["ssim_outside"],
        structure=torch.full_like(true["psnr"], torch.nan),
    )
