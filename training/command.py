"""`python -m training --config FILE`: train a bridge with one process or many, on one machine or several.

    python -m training --config FILE                            one GPU, or the CPU
    accelerate launch -m training --config FILE                 as `accelerate config` says
    python dev.py train --config FILE                           with dev.py's ComfyUI

Run the first two in the pack's own folder, with ComfyUI's Python. The same command again continues from
the last checkpoint. --print-config shows every setting.
"""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import numpy as np
import torch

from ..models.bridge import AttentionBridge, BridgeSettings
from ..models.bridge_file import save_bridge
from ..patches.attention.networks import network_of
from ..patches.host.autograd import gradients
from ..patches.host.out_of_memory import OutOfMemory
from ..pictures.contact_sheet import save_image
from .base_model import BaseModelLoader, free
from .cache import EncodedPairs, encode_shard, indexed_pairs
from .checkpoints import Checkpoints
from .config import Config, documented, read_config
from .libraries import library
from .settings import PRECISIONS, DataConfig
from .trainer import ProcessGroup, Trainer
from .validation import Validation, validation_data

if TYPE_CHECKING:
    from accelerate import Accelerator

BRIDGE = "bridge.safetensors"
ADVICE = (
    "Set train.checkpointing to true, with which the same command continues, or start again in another "
    "output folder with a smaller batch or resolution"
)
# A process may wait for another one's images or encoding.
PATIENCE = timedelta(hours=24)


class Run:
    """One run of the command.

    accelerator: of Hugging Face accelerate.

    Raises ValueError for settings, data or checkpoints that do not fit, and OSError if nothing can be
    written.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        device = comfy.model_management.get_torch_device()
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.base = BaseModelLoader(config.base, config.encoders)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.checkpoint.keep)
        self._encoders = self.base.fingerprint()
        pairs, self.validation = self._data()
        self.model = self.base.network(PRECISIONS[config.train.precision] or torch.float32)
        network = network_of(self.model.model.diffusion_model)
        family = type(self.model.model.model_config).__name__
        settings = BridgeSettings(family, network.widths, **vars(config.bridge))
        bridge = AttentionBridge(settings, torch.float32).reset(config.train.seed).to(device)
        self.trainer = Trainer(
            self.model.model,
            bridge,
            pairs,
            config.train,
            device,
            ProcessGroup(accelerator.process_index, accelerator.num_processes, self._sum),
            {
                "base": self._encoders,
                "bridge": vars(config.bridge),
                "pairs": f"{len(pairs)} ({hashlib.sha256(repr(pairs.files).encode()).hexdigest()[:8]})",
            },
        )

    def train(self) -> bool:
        """Continue until the last step, or until a signal stops the process. Returns whether all steps are
        done.

        Raises what `Trainer.run` raises; the steps before are then saved.
        """
        trainer = self.trainer
        found = self.checkpoints.resume(trainer)
        self._check_same()
        if found:
            self.say(f"continuing from {found.name}")
        if self.config.logging.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        start = trainer.step, time.monotonic()
        with _signals() as stopped, gradients():
            done = trainer.run(
                self.config.steps, lambda: self._after_step(start, stopped()), self._keep, ADVICE
            )
        if not done:
            self.say(f"stopped: step {trainer.step} is saved, the same command continues")
            return False
        if self.accelerator.is_main_process:
            save_bridge(trainer.learned(), self.output / BRIDGE)
        self.say(f"done: {self.output / BRIDGE}")
        return True

    def _after_step(self, start: tuple[int, float], stopped: bool) -> bool:
        """Log, save and validate when due. Returns whether any process has received a stop signal."""
        config, step = self.config, self.trainer.step
        stop = bool(self._sum(torch.tensor(float(stopped), device=self.trainer.device)) > 0)
        last = stop or step == config.steps
        if last or step % config.logging.every == 0:
            self._log(*start)
        if last or step % config.checkpoint.every == 0:
            self._check_same()
            if self.accelerator.is_main_process:
                self.checkpoints.save(self.trainer)
        every = config.validation.every
        if self.validation is not None and every and (step % every == 0 or step == config.steps):
            self._validate(self.validation)
        return stop

    def _keep(self) -> str:
        """Save without communicating with the other processes, which may be waiting for this step's
        gradient.
        """
        if not self.trainer.step:
            return "with nothing learned yet"
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.trainer)
        return "the steps before are saved"

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def _data(self) -> tuple[EncodedPairs, Validation | None]:
        """Every process encodes its shard, then all read the whole."""
        config = self.config
        pairs = self._encoded(config.data)
        if not config.validation.every:
            return pairs, None
        data = validation_data(config.data, config.validation)
        shown = pairs if data is config.data else self._encoded(data)
        main = self.accelerator.is_main_process
        return pairs, Validation.of(config.validation, data, shown) if main else None

    def _encoded(self, data: DataConfig) -> EncodedPairs:
        config, accelerator = self.config, self.accelerator
        cache = Path(config.cache) if config.cache else self.output / "encoded"
        shard = accelerator.process_index, accelerator.num_processes

        def report(done: int) -> None:
            if done % 100 == 0:
                self.say(f"encoded {done * shard[1]} pairs of {data.name}")

        encode_shard(data, self._encoders, self.base.encoders, cache, shard, report)
        free()
        accelerator.wait_for_everyone()
        pairs = indexed_pairs(data, self._encoders, cache)
        if pairs is None:
            raise ValueError(
                f"the indexes of the encoded pairs in {cache} are not complete: with several machines the "
                "folder must be one that all of them see, and the data the same on all"
            )
        return pairs

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    def _check_same(self) -> None:
        """Raises ValueError unless all processes have the same step and weights."""
        digest = hashlib.sha256(str(self.trainer.step).encode())
        for weight in self.trainer.bridge.parameters():
            digest.update(weight.detach().cpu().numpy().tobytes())
        mark = torch.tensor([int.from_bytes(digest.digest()[:7], "big")], device=self.trainer.device)
        marks = self.accelerator.gather(mark).tolist()
        if len(set(marks)) > 1:
            other = [rank for rank, found in enumerate(marks) if found != marks[0]]
            raise ValueError(
                f"the processes {', '.join(map(str, other))} have other weights than process 0: with several "
                "machines the output folder must be one that all of them see"
            )

    def _log(self, first: int, begin: float) -> None:
        """The loss is the mean since the previous line; speed and remaining time are of this session."""
        trainer, train, steps = self.trainer, self.config.train, self.config.steps
        recent = trainer.losses[-self.config.logging.every :]
        speed = (trainer.step - first) / (time.monotonic() - begin)
        metrics = {
            "loss": sum(recent) / len(recent),
            "gradient_norm": trainer.gradient_norm,
            "learning_rate": train.rate(trainer.step - 1),
            "samples_per_second": speed * train.batch * train.accumulate * self.accelerator.num_processes,
        }
        left = timedelta(seconds=round((steps - trainer.step) / speed))
        self.say(
            f"step {trainer.step}/{steps}  loss {metrics['loss']:.4f}  "
            f"{metrics['samples_per_second']:.2f} samples/s  {left} left"
        )
        self.accelerator.log(metrics, trainer.step)

    def _validate(self, validation: Validation) -> None:
        picture = validation.picture(self.trainer, self.model, self.base)
        path = self.output / "validation" / f"step-{self.trainer.step:06}.png"
        save_image(picture, path)
        self.say(f"validation: {path}")
        if self.config.logging.tensorboard:
            tracker = self.accelerator.get_tracker("tensorboard")
            images = {"validation": np.asarray(picture)[None]}
            tracker.log_images(images, self.trainer.step, dataformats="NHWC")


@contextmanager
def _signals() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM was received; a second one stops the process at once."""
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def accelerator_for(config: Config) -> Accelerator:
    """The processes, each of which trains on the host's device.

    Raises ValueError if a GPU is requested and there is none, if torch cannot use the device, or if several
    processes would exchange gradients on another device.
    Raises ImportError, with the command that installs it, if a library is missing.
    """
    accelerate = library("accelerate")
    if config.logging.tensorboard:
        library("tensorboard")
    cpu = comfy.model_management.cpu_mode()
    if cpu and config.device == "cuda":
        raise ValueError("device is cuda but torch finds no GPU here: install a torch for it, or take auto")
    accelerator = accelerate.Accelerator(
        cpu=cpu,
        mixed_precision="no",  # the trainer has its own autocast, whatever `accelerate config` says
        log_with="tensorboard" if config.logging.tensorboard else None,
        project_dir=config.output,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    device = comfy.model_management.get_torch_device()
    check_device(device, PRECISIONS[config.train.precision] or torch.float32)
    meet = accelerator.device
    if accelerator.num_processes > 1 and (meet.type, meet.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"ComfyUI computes on {device} but accelerate's processes meet on {meet}: unset "
            "ACCELERATE_TORCH_DEVICE, or train with one process"
        )
    return accelerator


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError unless torch can compute in `dtype` on `device`: it may be built for other cards."""
    try:
        square = torch.ones(8, 8, device=device).to(dtype)
        (square @ square).float().sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"torch {torch.__version__} cannot compute in {str(dtype).removeprefix('torch.')} on {device} "
            f"({reason}): install a torch made for this device, or take another precision"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="the run's settings, such as training/configs/folder.yaml")
    what.add_argument("--print-config", action="store_true", help="print every setting with its default")
    args = parser.parse_args()
    if args.print_config:
        print(documented(), end="")
        return
    try:
        config = read_config(args.config)
        accelerator = accelerator_for(config)
        Run(config, accelerator).train()
        accelerator.end_training()
    except (ValueError, OSError, ImportError, FloatingPointError, OutOfMemory) as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
