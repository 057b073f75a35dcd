"""Editing methods of other papers that need no training, each as small as its idea.

They use the host's slots and sampler, the same descriptions and, but for InfEdit, the same DDIM inversion as
UnifyEdit. Masks, which some of these papers find by themselves, are left out. Latents of the papers have unit
variance at every noise level, the host's do not: z = x / sqrt(1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ...patches.attention.layers import named_layers
from ...patches.attention.networks import unet_of
from ...patches.attention.projections import Projections
from ...patches.attention.recorder import AttentionRecorder, active_entry, record
from ...patches.host.autograd import differentiable_options, gradients
from ...patches.inversion import Inversion, invert
from ...patches.unify.balance import normalize, row_norm
from ...patches.unify.source import Source, open_source
from ...patches.unify.tokens import EditTokens
from .methods import edit_tokens
from .studio import Batch, Studio, StudioMethod, cfg_guider, conditioning, sample, schedule

Rows = tuple[slice, slice]  # of the source and of the target
# Of a model, the latents of source and target, the number of the step and the sampler's arguments: the next.
Move = Callable[[Any, torch.Tensor, int, dict[str, Any]], torch.Tensor]


class Beside:
    """A model call on the source and the target together: each part has the source's rows, then the target's.

    progress: of the sampling, from 0 at the first step to 1 after the last.
    """

    def __init__(self, tiny: Studio, batch: Batch) -> None:
        self.model = tiny.model.clone()
        self.progress = 0.0
        self._batch, self._size = batch, len(batch)

    def rows(self, options: Mapping[str, Any], unconditional: bool) -> list[Rows]:
        """The rows of each part of a call: those with the descriptions, and if asked those without text."""
        starts = [
            2 * self._size * part
            for part, kind in enumerate(options["cond_or_uncond"])
            if unconditional or kind == 0
        ]
        size = self._size
        return [(slice(start, start + size), slice(start + size, start + 2 * size)) for start in starts]

    def sample(self, start: torch.Tensor, sigmas: torch.Tensor, cfg: float, step: Move) -> torch.Tensor:
        """The target's latents after all steps.

        start: [rows, ...] as a VAE gives it, of source and target.
        """

        def run(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
            for number in range(len(sigmas) - 1):
                self.progress = number / (len(sigmas) - 1)
                x = step(model, x, number, extra_args)
            return x

        texts = torch.cat([self._batch.source_text, self._batch.edit_text])
        guider = cfg_guider(self.model, texts, torch.cat([self._batch.no_text] * 2), cfg)
        both = torch.cat([start, start])
        made = sample(guider, torch.zeros_like(both), both, sigmas, comfy.samplers.KSAMPLER(run))
        return made[self._size :]

    def follow(self, path: Inversion, cfg: float) -> torch.Tensor:
        """The target sampled from the end of `path`, which the source follows."""

        def step(model: Any, x: torch.Tensor, number: int, extra_args: dict[str, Any]) -> torch.Tensor:
            sigma, below = path.sigmas[number].to(x), path.sigmas[number + 1].to(x)
            x = torch.cat([path.latent(number, x[: self._size]), x[self._size :]])
            denoised = model(x, sigma.expand(len(x)), **extra_args)
            return x + (x - denoised) / sigma * (below - sigma)

        return self.sample(noisy_end(self.model, path), path.sigmas, cfg, step)


def inverted_path(tiny: Studio, batch: Batch) -> Inversion:
    return invert(tiny.model, batch.latent, conditioning(batch.source_text), schedule(tiny), refine=1)


def noisy_end(model: Any, path: Inversion) -> torch.Tensor:
    """As a VAE gives latents."""
    return model.model.process_latent_out(path.trajectory[0].clone())


def inject(beside: Beside, tiny: Studio, batch: Batch, self_fraction: float, cross_fraction: float) -> None:
    """Attention control in the manner of prompt-to-prompt (arXiv 2208.01626).

    For a fraction of the steps, 0 to 1, the target's self-attention gets the queries and keys of the source.
    Its cross-attention gets the queries of the source, and its keys for the words that both descriptions have
    or that replace one another.
    """
    partners = _partners(edit_tokens(tiny, batch), batch.edit_text.shape[1])[..., None]

    def self_attention(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
        if beside.progress < self_fraction:
            query, key = query.clone(), key.clone()
            for source, target in beside.rows(options, unconditional=False):
                query[target], key[target] = query[source], key[source]
        return query, key, value

    def cross_attention(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
        if beside.progress < cross_fraction:
            query, key = query.clone(), key.clone()
            for source, target in beside.rows(options, unconditional=False):
                query[target] = query[source]
                both = torch.cat([key[target], key[source]], dim=1)
                key[target] = both.gather(1, partners.to(key.device).expand_as(batch.edit_text))
        return query, key, value

    beside.model.set_model_attn1_patch(self_attention)
    beside.model.set_model_attn2_patch(cross_attention)


def injected(cfg: float, self_fraction: float, cross_fraction: float) -> StudioMethod:
    """Attention injection along the source's DDIM inversion: `inject`."""

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        beside = Beside(tiny, batch)
        inject(beside, tiny, batch, self_fraction, cross_fraction)
        return beside.follow(inverted_path(tiny, batch), cfg)

    return StudioMethod("attention injection", edit, f"injected {cfg:g} {self_fraction} {cross_fraction}")


def _partners(found: tuple[EditTokens, ...], context: int) -> torch.Tensor:
    """[rows, context]: for each token of the edit description its index in edit and source tokens joined."""
    indices = torch.arange(context).repeat(len(found), 1)
    for row, tokens in enumerate(found):
        replaced = [
            pair
            for word in tokens.words
            if len(word.tokens) == len(word.source_tokens)
            for pair in zip(word.tokens, word.source_tokens, strict=True)
        ]
        for new, old in [*tokens.alignment, *replaced]:
            indices[row, new] = context + old
    return indices


def masactrl(cfg: float, layers: str, start: float) -> StudioMethod:
    """Mutual self-attention (MasaCtrl, arXiv 2304.08465).

    From `start` (0 to 1) of the steps on, the target's queries read the source's keys and values in the
    self-attention of `layers`, in the rows without text too. The paper starts at 4 of 50 steps and takes the
    last 6 of 16 layers.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        beside = Beside(tiny, batch)
        known = unet_of(beside.model.model.diffusion_model, "MasaCtrl").layers.values()
        chosen = {layer.key for layer in named_layers("layers", known, layers)}

        def mutual(query: Any, key: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
            if beside.progress >= start and _key(options) in chosen:
                key, value = key.clone(), value.clone()
                for source, target in beside.rows(options, unconditional=True):
                    key[target], value[target] = key[source], value[source]
            return query, key, value

        beside.model.set_model_attn1_patch(mutual)
        return beside.follow(inverted_path(tiny, batch), cfg)

    return StudioMethod("MasaCtrl", edit, f"masactrl {cfg:g} {start:g} {layers}")


def _key(options: Mapping[str, Any]) -> str:
    """The layer that a patch is called in."""
    block, number = options["block"]
    return f"{block}.{0 if block == 'middle' else number}.{options['block_index']}"


def infedit(cfg: float, self_fraction: float, cross_fraction: float) -> StudioMethod:
    """Virtual inversion with attention control (InfEdit, arXiv 2312.04965).

    At each step the source x_0 and the target's last estimate get the same new noise, sigma n. The next
    estimate is x_0 + D_target - D_source, with the guidance `cfg` for the target alone. So equal descriptions
    give the image back. The noise is the same for all images. The paper's attention control also has a local
    blend, which is left out.
    """

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        beside, size = Beside(tiny, batch), len(batch)
        inject(beside, tiny, batch, self_fraction, cross_fraction)
        sigmas, generator = schedule(tiny), torch.Generator().manual_seed(0)
        clean = tiny.model.model.process_latent_in(batch.latent)

        def step(model: Any, x: torch.Tensor, number: int, extra_args: dict[str, Any]) -> torch.Tensor:
            guider, sigma = model.inner_model, sigmas[number].to(x)
            noise = torch.randn(1, *x.shape[1:], generator=generator).to(x)
            source = clean.to(x)
            target = source if number == 0 else x[size:]
            x = torch.cat([source, target]) + sigma * noise
            conds = [guider.conds["positive"], guider.conds["negative"]]
            text, none = comfy.samplers.calc_cond_batch(
                guider.inner_model, conds, x, sigma.expand(len(x)), extra_args["model_options"]
            )
            guided = none[size:] + cfg * (text[size:] - none[size:])
            return torch.cat([source, source + guided - text[:size]])

        return beside.sample(batch.latent, sigmas, cfg, step)

    return StudioMethod("InfEdit", edit, f"infedit {cfg:g} {self_fraction:g} {cross_fraction:g}")


@dataclass(frozen=True, eq=False)
class Along:
    """A sampling along a DDIM inversion, with gradients of attention.

    guider: the host's, in a run; its texts are the edit description and the negative.
    source: the source branch.
    options: the model options of every call.
    """

    guider: comfy.samplers.CFGGuider
    source: Source
    options: dict[str, Any]

    def texts(self, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
        """The denoised latents with the edit description, and with the negative."""
        conds = [self.guider.conds["positive"], self.guider.conds["negative"]]
        return comfy.samplers.calc_cond_batch(
            self.guider.inner_model, conds, x, x.new_full((len(x),), sigma), self.options
        )

    def read(self, entries: Any, x: torch.Tensor, sigma: float, kind: str) -> Mapping[str, Projections]:
        """The attention in all layers with a description. kind: `self` or `cross`."""
        network = self.source.network
        layers = network.layers.values()
        recorder = AttentionRecorder(
            network, layers if kind == "self" else (), layers if kind == "cross" else (), stop=True
        )
        entry = active_entry(entries, sigma)
        assert entry is not None
        options = differentiable_options(self.options) if x.requires_grad else self.options
        record(self.guider.inner_model, recorder, entry, x, x.new_full((len(x),), sigma), options)
        return recorder.self_attention if kind == "self" else recorder.cross_attention

    def gradient(
        self, number: int, x: torch.Tensor, entries: Any, kind: str, energy: Callable
    ) -> torch.Tensor:
        """d/dx of the sum of `energy` over all layers.

        number: of the step. entries: of the description with which `x` is read.
        energy: of the difference to the source's probabilities, [rows, heads, queries, keys], a number for
        each row.
        """
        sigma = self.source.sigmas[number]
        wanted = self.read(self.source.entries, self.source.latent(number, x), sigma, kind)
        with gradients():
            leaf = x.clone().requires_grad_()
            found = self.read(entries, leaf, sigma, kind)
            parts = [energy(found[key].probabilities() - wanted[key].probabilities()) for key in wanted]
            (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), leaf)
        return gradient


# Of a run, a latent and the number of the step: the latent at which the noise is predicted, and the denoised
# one.
Step = Callable[[Along, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def along(tiny: Studio, batch: Batch, negative: torch.Tensor, step: Step) -> torch.Tensor:
    """Latents sampled from the inverted noise by `step`."""
    path = inverted_path(tiny, batch)

    def run(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any, **_: Any) -> torch.Tensor:
        guider, options = model.inner_model, extra_args["model_options"]
        network = unet_of(guider.inner_model.diffusion_model, "this method")
        with open_source(guider, network, path, x, options, extra_args, memory=0.0) as (source, _patchers):
            for number in range(len(sigmas) - 1):
                x, denoised = step(Along(guider, source, options), x, number)
                x = x + (x - denoised) / sigmas[number] * (sigmas[number + 1] - sigmas[number])
        return x

    guider = cfg_guider(tiny.model, batch.edit_text, negative, 1.0)
    start = noisy_end(tiny.model, path)
    return sample(guider, torch.zeros_like(start), start, path.sigmas, comfy.samplers.KSAMPLER(run))


def pix2pix_zero(cfg: float, rate: float) -> StudioMethod:
    """Cross-attention guidance (pix2pix-zero, arXiv 2302.03027).

    Before each prediction one gradient step brings the cross-attention, token by token, to that of the
    source: of the squared differences the sum over positions and tokens, the mean over heads and the sum over
    layers. The negative is the source description. The paper edits by a direction of text embeddings, from
    many sentences with either word; for one pair of descriptions that is the edit description. rate: for
    latents of unit variance; the paper's code takes 0.1.
    """

    def step(run: Along, x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = run.source.sigmas[number]
        gradient = run.gradient(
            number, x, run.guider.conds["positive"], "cross", lambda d: d.square().sum((2, 3)).mean(1)
        )
        x = x - rate * (1 + sigma**2) * gradient
        text, negative = run.texts(x, sigma)
        return x, negative + cfg * (text - negative)

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        return along(tiny, batch, batch.source_text, step)

    return StudioMethod("pix2pix-zero", edit, f"pix2pix-zero {cfg:g} {rate:g}")


def guide_and_rescale(cfg: float, scale: float, end: float = 0.6) -> StudioMethod:
    """Self-attention energy added to the noise (Guide-and-Rescale, arXiv 2409.01322).

    Energy: the mean squared difference of the self-attention, both read with the source description, summed
    over layers. Its gradient times `scale` is added to the noise in the first part `end` of the steps; its
    length is kept within a third and three times that of the guidance, as in their code. The paper's term for
    appearance, of features, is left out. Their code takes 300,000 at 64x64 latents.
    """

    def step(run: Along, x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = run.source.sigmas
        sigma = sigmas[number]
        text, negative = run.texts(x, sigma)
        guidance = cfg * (text - negative)
        denoised = negative + guidance
        if 0 < number < end * (len(sigmas) - 1):  # the first has no energy: both are the same latent
            gradient = run.gradient(
                number, x, run.source.entries, "self", lambda d: d.square().mean((1, 2, 3))
            )
            noise = scale * (1 + sigma**2) ** 0.5 * gradient
            unit = row_norm(guidance) / sigma
            length = row_norm(noise).clamp(unit / 3, 3 * unit)
            denoised = denoised - sigma * normalize(noise) * length
        return x, denoised

    def edit(tiny: Studio, batch: Batch) -> torch.Tensor:
        return along(tiny, batch, batch.no_text, step)

    return StudioMethod("Guide-and-Rescale", edit, f"guide-and-rescale {cfg:g} {scale:g} {end:g}")
