"""The trace of a run: what is recorded, how it gets out, and that it belongs to its own run."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import torch
from host import Host
from unify_edit import STEPS, Edit

KEY = "descriptive_edit_trace"


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet with inference-tensor weights."""
    return small_models.small_unet()


def test_values(host: Host, model: Any) -> None:
    """Protects: both losses and gradient norms of every step and image are in the trace, on the CPU, an
    image's the same as alone.
    """
    edit = Edit(host, model, batch=2)
    edit.run()
    trace = edit.trace()
    assert trace.steps == STEPS
    assert trace.places == tuple(range(STEPS))
    assert trace.values.shape == (STEPS, 4, 2)
    assert trace.values.device.type == "cpu"
    assert bool((trace.values > 0).all())
    assert trace.moved.tolist() == [[True, True]] * STEPS
    alone = Edit(host, model, steps=STEPS)
    alone.run()
    torch.testing.assert_close(alone.trace().values[0, :, 0], trace.values[0, :, 0], rtol=1e-3, atol=1e-6)


def test_belongs_to_its_run(host: Host, model: Any) -> None:
    """Protects: one sampler in two runs leaves two traces, each in the LATENT of its run, and nothing on the
    sampler.
    """
    edit = Edit(host, model)
    sampler, noise = host.execute(
        "DescEditUnifySampler",
        inversion=edit.inversion,
        edit_tokens=edit.tokens,
        balance=edit.balance(),
    )
    edit.run(sampler, noise)
    first = edit.output
    values = first[KEY].trace.values.clone()
    edit.positive = small_models.conditioning(8)
    edit.run(sampler, noise)
    assert edit.output[KEY] is not first[KEY]
    assert torch.equal(first[KEY].trace.values, values)
    assert not torch.equal(edit.trace().values, values)
    assert KEY not in edit.noise
    assert not any(isinstance(value, torch.Tensor) for value in vars(sampler).values())
    assert sampler._box is None


def test_without_the_noise_output(host: Host, model: Any) -> None:
    """Protects: a latent without a trace is an error that says what to wire; a run without it is the same."""
    edit = Edit(host, model)
    (no_noise,) = host.execute("DisableNoise")
    traced = edit.run()
    assert torch.equal(edit.run(noise=no_noise), traced)
    with pytest.raises(Exception, match=r"Trace .UnifyEdit.: latent has no trace: wire the noise output"):
        host.execute("DescEditTrace", latent=edit.output)


def test_an_inverted_result_has_no_old_trace(host: Host, model: Any) -> None:
    """Protects: inverting an edited latent does not hand on the trace of the edit."""
    edit = Edit(host, model)
    edit.run()
    _, noise = host.execute(
        "DescEditInvert",
        model=model,
        latent=edit.output,
        source=small_models.conditioning(1),
        sigmas=edit.sigmas,
        mode="virtual",
    )
    assert KEY not in noise


def test_plot(host: Host) -> None:
    """Protects: a picture an image, with a rising and a falling curve where the values rise and fall, gaps
    where there is no value, and a cross at a skipped step.
    """
    module = host.pack_module("patches.unify.trace")
    up, down = torch.linspace(0.1, 1, 10), torch.linspace(1, 0.1, 10)
    values = torch.stack([up, down, 2 * up, 3 * down], dim=1)[:, :, None].repeat(1, 1, 2)
    moved = torch.ones(10, 2, dtype=torch.bool)
    values[4, :, 1] = torch.nan
    moved[4, 1] = False
    box = module.TraceBox()
    box.trace = module.Trace(10, tuple(range(10)), values, moved)
    plot, text = host.execute("DescEditTrace", latent={KEY: box})
    assert text == (
        "image 1: 10 steps, 10 gradient steps, 0 skipped for want of a usable gradient\n"
        "image 2: 10 steps, 9 gradient steps, 1 skipped for want of a usable gradient"
    )
    assert plot.shape == (2, 480, 512, 3)
    whole, gap = plot
    for top in (0, 240):
        area = slice(top + 30, top + 200)
        blue = (whole[area, :, 2] - whole[area, :, 0]) > 0.4
        red = (whole[area, :, 0] - whole[area, :, 2]) > 0.4
        for colour, rises in ((blue, True), (red, False)):
            rows, columns = colour.nonzero().unbind(dim=1)
            left = rows[columns == columns.min()].float().mean()
            right = rows[columns == columns.max()].float().mean()
            assert bool(left > right) is rises
        # The step 4 of 10 lies at 48 + 0.4 * 448 = 227.
        broken = (gap[area, :, 2] - gap[area, :, 0]) > 0.4
        assert not bool(broken[:, 190:265].any())
        assert bool(blue[:, 190:265].any())
        dark = gap[top + 200 : top + 209, 222:233].amax(dim=-1) < 0.4
        assert int(dark.sum()) > int((whole[top + 200 : top + 209, 222:233].amax(dim=-1) < 0.4).sum())
