"""The Tiny Studio in this process: methods are functions that edit a batch of its cases at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher

from ...models.tiny_studio import scenes, studio
from ...patches.attention.networks import unet_of
from ...patches.attention.recorder import AttentionRecorder
from ..bench.measuring import torch_attention
from ..benchmark.cases import Case
from ..tiny_studio import attribute_classifier

STEPS, BATCH = 25, 50
Conditioning = list[list[Any]]


@dataclass(frozen=True, eq=False)
class Studio:
    """The Tiny Studio under the host's model management."""

    model: ModelPatcher
    clip: Any
    vae: Any

    @classmethod
    def load(cls) -> Studio:
        """Load with torch's attention: the host's choice for a CPU takes twice as long."""
        model = studio.load_model()
        model.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
        return cls(model, studio.load_clip(), studio.load_vae())

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, 77, 128]."""
        encoded = [self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts]
        return torch.cat(encoded)


@dataclass(frozen=True, eq=False)
class Batch:
    """Several cases of the Tiny Studio.

    source, target: [cases, 128, 128, 3], 0 to 1, as drawn, before rounding to 8 bits.
    mask: [cases, 128, 128], 1 in the edit region; everywhere for a style.
    latent: of the sources, [cases, 4, 16, 16].
    noise: like latent.
    source_text, edit_text, instruction, no_text: [cases, 77, 128].
    """

    pairs: tuple[scenes.EditPair, ...]
    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    latent: torch.Tensor
    noise: torch.Tensor
    source_text: torch.Tensor
    edit_text: torch.Tensor
    instruction: torch.Tensor
    no_text: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, tiny: Studio, cases: Sequence[Case]) -> Batch:
        """Raises ValueError for a case of another benchmark."""
        drawn = [case.drawn for case in cases if case.drawn is not None]
        if len(drawn) < len(cases):
            raise ValueError("these methods edit cases of the layout tiny-studio only")
        pairs = tuple(one.pair for one in drawn)
        source, target = (
            torch.from_numpy(np.stack([scene.draw() for scene in side]))
            for side in ([pair.source for pair in pairs], [pair.target for pair in pairs])
        )
        everywhere = np.ones(source.shape[1:3], np.float32)
        masks = [everywhere if (mask := pair.mask()) is None else mask for pair in pairs]
        return cls(
            pairs=pairs,
            source=source,
            target=target,
            mask=torch.from_numpy(np.stack(masks)),
            latent=tiny.vae.encode(source),
            noise=torch.stack([one.noise for one in drawn]),
            source_text=tiny.text([pair.source_text for pair in pairs]),
            edit_text=tiny.text([pair.edit_text for pair in pairs]),
            instruction=tiny.text([case.instruction for case in cases]),
            no_text=tiny.text([""]).expand(len(pairs), -1, -1),
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def chosen(self, numbers: Sequence[int]) -> Batch:
        """Some of the cases."""
        pairs = tuple(self.pairs[number] for number in numbers)
        return Batch(pairs, *(getattr(self, field.name)[list(numbers)] for field in fields(self)[1:]))


@dataclass(frozen=True, eq=False)
class StudioMethod:
    """A function of this process as a Method of the benchmark.

    edit: returns the edited latents of a batch.
    settings: everything that determines its images, as text.
    files: of weights.
    types: the edit types that it has settings for; empty for all.
    """

    name: str
    edit: Callable[[Studio, Batch], torch.Tensor]
    settings: str
    files: tuple[Path, ...] = ()
    types: tuple[str, ...] = ()
    swept: tuple[str, float] | None = None

    @cached_property
    def digest(self) -> str:
        """Digest of the settings, the files and the studio's weights."""
        parts = (self.settings, *map(file_digest, (studio.FILE, *self.files)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def weights(self) -> dict[str, str]:
        """A digest of each file of weights that results depend on: the attribute classifier's is one."""
        return {
            file.name: file_digest(file) for file in (studio.FILE, attribute_classifier.FILE, *self.files)
        }

    def handles(self, edit_type: str) -> bool:
        """Whether it has settings for an edit type."""
        return not self.types or edit_type in self.types

    @property
    def label(self) -> str:
        """Results of other settings or weights have another label, so they are never mixed."""
        return f"{self.name} {self.digest}"

    @torch.inference_mode()
    def pictures(self, tiny: Studio, batch: Batch) -> torch.Tensor:
        """[cases, 128, 128, 3], 0 to 1."""
        with quick_products(tiny):
            latents = self.edit(tiny, batch)
        return tiny.vae.decode(latents).clamp(0, 1)

    @torch.inference_mode()
    def probe(self, tiny: Studio, batch: Batch) -> list[float]:
        """Means over the quarters of the edited latents; they show if the code makes other images.

        In the model's own precision, so that processors agree.
        """
        latents = self.edit(tiny, batch).float()
        means = torch.nn.functional.adaptive_avg_pool2d(latents, 2)
        return [round(value, 4) for value in means.flatten().tolist()]


@cache
def file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def conditioning(text: torch.Tensor) -> Conditioning:
    return [[text, {}]]


def cfg_guider(
    model: ModelPatcher, positive: torch.Tensor, negative: torch.Tensor, cfg: float
) -> comfy.samplers.CFGGuider:
    """The stock guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(positive), conditioning(negative))
    guider.set_cfg(cfg)
    return guider


def schedule(tiny: Studio, denoise: float = 1.0, steps: int = STEPS) -> torch.Tensor:
    """The last `steps` steps of the host's normal schedule, from `denoise` (0 to 1) of the noise down."""
    sampling = tiny.model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "normal", round(steps / denoise))[-(steps + 1) :]


def sample(
    guider: Any, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor, sampler: Any = None
) -> torch.Tensor:
    """Sampled latents, on the device where nodes leave theirs. sampler: the host's Euler sampler by
    default.
    """
    sampler = sampler or comfy.samplers.sampler_object("euler")
    made = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)
    return made.to(comfy.model_management.intermediate_device())


def quick_products(tiny: Studio) -> torch.autocast:
    """Matrix products in bfloat16 on CPUs with AVX-512, which takes two thirds of the time.

    On other CPUs bfloat16 takes several times as long; on a GPU the model's own dtype is fast.
    """
    device = tiny.model.load_device.type
    quick = device == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.autocast(device, torch.bfloat16, enabled=quick)


@torch.inference_mode()
def structure_distance(tiny: Studio, batch: Batch, pictures: torch.Tensor) -> torch.Tensor:
    """How much layout and shapes have changed, [cases].

    The mean squared difference of all self-attention probabilities of source and image, times 1000, each read
    at timestep 0 without text.
    """
    model = tiny.model.model
    network = unet_of(model.diffusion_model, "the structure distance")
    # No sampler loads the model here.
    comfy.model_management.load_model_gpu(tiny.model)
    device, maps = tiny.model.load_device, []
    for latent in (batch.latent, tiny.vae.encode(pictures)):
        recorder = AttentionRecorder(network, network.layers.values(), ())
        model.apply_model(
            model.process_latent_in(latent).to(device),
            model.model_sampling.sigma_min.to(device).expand(len(latent)),
            c_crossattn=batch.no_text.to(device),
            transformer_options=recorder.attach(tiny.model.model_options)["transformer_options"],
        )
        maps.append(recorder.self_attention)
    before, after = maps
    changes = [before[key].probabilities() - after[key].probabilities() for key in before]
    distances = [change.square().flatten(1).mean(dim=1) for change in changes]
    return 1000 * torch.stack(distances).mean(dim=0).to(batch.latent.device)
