"""What happens to a run: sources that let it, a small disk, a clock that goes wrong (see faulting.py)."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from busigen.data.geometry import edit_region
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.noise import uniform
from tests.harness.noise_source import NoiseSource

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static time_t back(void) { return access(getenv("CLOCK_SET_BACK"), F_OK) ? 0 : 365 * 24 * 3600; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec -= back();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return result;
}
time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    return now ? (*now = precise.tv_sec) : precise.tv_sec;
}
"""
"""The wall clock goes a year wrong once the file CLOCK_SET_BACK is there. As when a clock is set, the monotonic one and
the times of files are left alone; libfaketime fakes the former, too, or makes sleeping fail."""


def clock_library(folder: Path) -> Path | None:
    """``CLOCK`` as a library to be loaded before others; None where there is no compiler."""
    library = folder / "clock.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-", "-ldl"]
    try:
        subprocess.run(command, input=CLOCK, text=True, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return library


class Happening(NoiseSource):
    """Lets something happen when a sample is drawn."""

    def __init__(self, index: int = -1, what: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.index, self.what = index, what

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        generated = super().draw(seed, indices, done)
        if self.index in indices:
            self.what()
        return generated


class Painting(Happening):
    """Paints noise into the images of a folder, and asks of it what the sampler does."""

    def __init__(self, images: Path, index: int = -1, what: Callable[[], object] = lambda: None) -> None:
        super().__init__(index, what)
        self.images = HealthyFolder(images)

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "healthy": self.images.fingerprint()}

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        generated, samples = super().draw(seed, indices, done), []
        for sample in generated.samples:
            picked = self.images.pick(uniform(seed, sample.index, sample.attempt, "healthy"))
            image = np.where(edit_region(sample.mask, picked.valid), sample.image, picked.pixels)
            row = {**sample.row, "healthy_sha256": picked.row["healthy_sha256"]}
            samples.append(replace(sample, image=image, row=row))
        self.images.refuse_changes()
        return SampleBatch(samples, generated.rejections)


def die() -> None:
    """As if the machine lost its power, as far as this process can tell."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_up(disk: Path, neighbour: Path, left: int) -> None:
    """Write ``neighbour`` until the disk has ``left`` bytes."""
    # The run itself may take the last room while this is written.
    with suppress(OSError):
        neighbour.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))


def another_image() -> bytes:
    """A PNG that no healthy folder held before."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(40, 140, (64, 80), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def mount(*arguments: object) -> bool:
    """Whether the system mounted what it was asked to."""
    return not subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True).returncode


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A real file system with 8 MiB; None where none may be mounted."""
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
