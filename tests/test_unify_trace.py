"""The trace of a run: what is recorded, and that it belongs to its own run."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import torch
from host import Host
from unify_edit import STEPS, Edit


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
    assert trace.at == tuple(range(STEPS))
    assert trace.values.shape == (STEPS, 4, 2)
    assert trace.values.device.type == "cpu"
    assert bool((trace.values > 0).all())
    assert trace.usable.tolist() == [[True, True]] * STEPS
    alone = Edit(host, model, steps=STEPS)
    alone.run()
    torch.testing.assert_close(alone.trace().values[0, :, 0], trace.values[0, :, 0], rtol=1e-3, atol=1e-6)


def test_belongs_to_its_run(host: Host, model: Any) -> None:
    """Protects: one sampler in two runs gives two traces, and nothing of a run stays on the sampler."""
    edit = Edit(host, model)
    sampler = edit.sampler()
    before = dict(vars(sampler))
    edit.run(sampler)
    values = edit.trace().values.clone()
    edit.positive = small_models.conditioning(8)
    edit.run(sampler)
    first, second = edit.traces
    assert torch.equal(first.values, values)
    assert not torch.equal(second.values, values)
    assert vars(sampler) == before
    assert set(edit.output) == {"samples"}


def test_nothing_optimised(host: Host, model: Any) -> None:
    """Protects: a run whose losses are switched off has a trace without records, and a plot of it."""
    edit = Edit(host, model, batch=2)
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    edit.run()
    assert edit.trace().values.shape == (0, 4, 2)
    assert edit.trace().draw().shape == (2, 480, 512, 3)


def test_plot(host: Host) -> None:
    """Protects: a picture an image, with a rising and a falling curve where the values rise and fall, gaps
    where there is no value, and a cross at a skipped step.
    """
    module = host.pack_module("patches.unify.trace")
    up, down = torch.linspace(0.1, 1, 10), torch.linspace(1, 0.1, 10)
    values = torch.stack([up, down, 2 * up, 3 * down], dim=1)[:, :, None].repeat(1, 1, 2)
    usable = torch.ones(10, 2, dtype=torch.bool)
    values[4, :, 1] = torch.nan
    usable[4, 1] = False
    plot = module.Trace(10, tuple(range(10)), values, usable, None).draw()
    assert plot.shape == (2, 480, 512, 3)
    whole, gap = plot
    for top in (0, 240):
        area = slice(top + 38, top + 200)
        blue = (whole[area, :, 2] - whole[area, :, 0]) > 0.4
        red = (whole[area, :, 0] - whole[area, :, 2]) > 0.4
        for colour, rises in ((blue, True), (red, False)):
            rows, columns = colour.nonzero().unbind(dim=1)
            left = rows[columns == columns.min()].float().mean()
            right = rows[columns == columns.max()].float().mean()
            assert bool(left > right) is rises
        # The step 4 of 10 lies at 72 + 0.4 * 424 = 242.
        broken = (gap[area, :, 2] - gap[area, :, 0]) > 0.4
        assert not bool(broken[:, 206:278].any())
        assert bool(blue[:, 206:278].any())
        dark = gap[top + 200 : top + 209, 236:249].amax(dim=-1) < 0.4
        assert int(dark.sum()) > int((whole[top + 200 : top + 209, 236:249].amax(dim=-1) < 0.4).sum())
