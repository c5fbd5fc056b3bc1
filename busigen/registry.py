"""Classes, stages, presets, solver steps, geometry, providers and launchers; imports neither torch nor onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

RESOLUTION = 256  # Side of the square, letterboxed working image in pixels.
CLASSES = ("normal", "benign", "malignant")  # Every image class, in the order of the denoisers' class embedding.
LESION_CLASSES = ("benign", "malignant")  # The classes with a LoRA adapter, which ``generate --classes`` accepts.
NORMAL = "normal"  # The class of a healthy image, which a dataset may hold as well.
SAMPLE_CLASSES = (*LESION_CLASSES, NORMAL)  # Those that a dataset's samples can have, in the order of their labels.
SYNTHETIC = "synthetic"  # The value of ``generate --healthy`` that asks for synthetic backgrounds.
STAGES = ("mask", "lesion", "blend")  # The three denoising stages, in sampling order.
BUCKETS = (128, 256)  # Window sides in pixels; each sample uses the smallest that holds its edit region.
BUCKET_CONTEXT = 8  # Pixels around the edit region that a window holds, where the image allows.
LATENT_FACTOR = 8  # Pixels per latent cell and axis.
MASK_CHANNELS = 4  # Of a pixel-unshuffled mask condition: 2 x 2 grid points per cell.
PLACE_CHANNELS = 2  # Row and column of each cell, which the healthy prior reads.
SCANNERS = 8  # Most scanners that a checkpoint can tell apart: one condition channel each, all of them 0 for any.
FEWEST_OF_SCANNER = 40  # Training images of a scanner from which on it is learnt by its name.

# What a user can ask of an outline, in the order of its code's first numbers (busigen.data.geometry).
ATTRIBUTES = ("across", "depth", "size", "height_width")
TALLER_THAN_WIDE = "1.05:1.6"  # The ``generate --height-width`` that ``--taller-than-wide`` stands for.
BIRADS = ("2", "3", "4", "5")  # Categories that can be asked for, in the order of stage 1's condition.

MAX_LESIONS = 3  # Of an image: with more, few images have room for outlines as large as real ones.

# Images by class and BI-RADS category in BUS-BRA's ``bus_data.csv``; BUSI has no categories.
BIRADS_IMAGES = {"benign": {"2": 314, "3": 274, "4": 170, "5": 2}, "malignant": {"2": 4, "3": 15, "4": 248, "5": 100}}
# Length of stage 1's condition: each attribute's value, whether it is asked for, the category as one-hot.
ASKED_LENGTH = 2 * len(ATTRIBUTES) + len(BIRADS)
FIELD_EDGE = 1.0  # Half the side of an outline's frame, in units of the root of the lesion's area.
FIELD_LIMIT = 0.35  # Signed distance, in the same units, at which an outline's field saturates.
SPLITS = {"train": 0.75, "val": 0.10, "test": 0.15}  # Share of groups in each split.


@dataclass(frozen=True)
class UNetShape:
    """Size of one denoiser (a diffusers ``UNet2DConditionModel``)."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int = 1
    head_dim: int = 32
    groups: int = 16


@dataclass(frozen=True)
class OutlineShape:
    """Size of stage 1 (:class:`busigen.training.networks.build.OutlineTransformer`).

    ``coefficients`` of an outline's form are read in tokens of ``group``; its field has ``grid`` samples a side (even).
    """

    coefficients: int
    grid: int
    group: int
    dim: int
    layers: int
    heads: int


_TINY = UNetShape(channels=(16, 32), attention=(False, True), head_dim=16, groups=8)


@dataclass(frozen=True)
class Preset:
    """The sizes of every network. ``patch`` and window sides are pixels; the rest are channel or layer counts."""

    name: str
    about: str
    latent_channels: int
    encoder_channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    patch: int
    context_dim: int
    context_layers: int
    context_heads: int
    outline: OutlineShape
    denoisers: dict[str, UNetShape] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of context tokens per image."""
        return (RESOLUTION // self.patch) ** 2


PRESETS = {
    "compact": Preset(
        name="compact",
        about="trained from scratch; the shipped default",
        latent_channels=8,
        encoder_channels=(32, 32, 64, 128),
        encoder_layers=(0, 1, 1, 2),
        decoder_channels=(16, 32, 64, 128),
        decoder_layers=(1, 1, 1, 2),
        patch=16,
        context_dim=128,
        context_layers=4,
        context_heads=4,
        outline=OutlineShape(coefficients=256, grid=48, group=16, dim=128, layers=4, heads=4),
        denoisers={
            # The two have one shape, because the blend's training starts from the lesion's weights.
            "lesion": UNetShape(channels=(48, 80, 128), attention=(False, True, True)),
            "blend": UNetShape(channels=(48, 80, 128), attention=(False, True, True)),
            # Attention among 8 x 8 cells and fewer, for the layout; among 32 x 32 it is dear.
            "prior": UNetShape(channels=(32, 64, 128, 160), attention=(False, False, True, True)),
        },
    ),
    "tiny": Preset(
        name="tiny",
        about="compact shrunk until a whole run takes minutes on two cores; for tests and trials, not for use",
        latent_channels=4,
        encoder_channels=(8, 8, 16, 16),
        encoder_layers=(0, 1, 1, 1),
        decoder_channels=(8, 8, 16, 16),
        decoder_layers=(0, 1, 1, 1),
        patch=32,
        context_dim=32,
        context_layers=1,
        context_heads=2,
        outline=OutlineShape(coefficients=16, grid=32, group=8, dim=32, layers=2, heads=2),
        denoisers={name: _TINY for name in ("lesion", "blend", "prior")},
    ),
}

# What Stable Diffusion does not draw is compact's, and is taken from a checkpoint of it.
STABLE_DIFFUSION = "sd15"
PRESETS[STABLE_DIFFUSION] = replace(
    PRESETS["compact"],
    name=STABLE_DIFFUSION,
    about="stages 2 and 3 by a Stable Diffusion inpainting model of yours (--base-model), with LoRAs; all else compact",
)
DEFAULT_PRESET = "compact"
PAINTING = ("lesion", "blend")  # The stages that Stable Diffusion draws in its preset.
PAINTED_CHANNELS = 4  # Of its latents.
PAINTING_STEPS = 8  # Network evaluations of each of them, unless `export --steps` says otherwise.
SHOWN_AT = (256, 512)  # Sides in pixels at which Stable Diffusion can be shown windows, the default first.
PROMPTS = {  # What Stable Diffusion is asked for, unless `train --prompt` says otherwise.
    "benign": "breast ultrasound image with a benign lesion",
    "malignant": "breast ultrasound image with a malignant lesion",
}

# Outlines of a sample's first lesion, at export, and of a further one, that are drawn before the draw is refused.
OUTLINES, MAX_OUTLINES = 4, 16
SOLVER_STEPS = {"mask": 4, "lesion": 4, "blend": 2, "prior": 6}  # Network evaluations per denoiser, fixed at export.
# Time from which the prior finishes phantoms, unless `export --prior-start` says otherwise, and its evaluations then.
PRIOR_START, STARTED_STEPS = 0.5, 2
# Deviation of what a denoiser leaves open, until it is measured (busigen.training.networks.variance).
SOLVER_SPREAD = {"lesion": 0.85, "blend": 0.7, "prior": 1.0}
# How much denser a denoiser's steps lie near pure noise, where the layout is decided (Esser et al. 2024, 5.3.2).
SOLVER_SHIFT = {"mask": 1.5, "lesion": 1.5, "blend": 1.5, "prior": 3.0}
# Deviation of the decoder's noise in use, and a further factor for synthetic backgrounds. It is trained with 1 on real
# images' latents; generated ones vary more between cells and would come out too grainy (docs/studies/figures.md).
SPECKLE_GAIN, BACKGROUND_SPECKLE = 0.94, 0.95
GRAIN_FADE = 8.0  # Pixels from an edit region's rim over which pasted speckle fades in (docs/studies/scanners.md).
OPSETS = (20, 23)  # ONNX opsets that export can write, the default first (docs/export.md).


@dataclass(frozen=True)
class Precision:
    """What a graph computes in; ``above`` is the fallback of a component that fails in it, empty for the highest."""

    about: str
    above: str


# What ``export --precision`` accepts, the default first.
PRECISIONS = {
    "fp32": Precision("fp32 throughout, weights stored in fp16: the choice for CPUs", ""),
    "fp16": Precision("convolutions and matrix products in fp16, norms, softmax and the solver in fp32", "fp32"),
    "bf16": Precision("the same in bf16: fp32's range, an eighth of fp16's precision", "fp32"),
    "int8": Precision("the context encoder's matrix products in int8, where that is faster; all else in fp32", "fp32"),
}
# What ``export --loop`` accepts.
LOOPS = {
    "loop": "one node that runs an evaluation per step: opens fast, which the CPU wants",
    "unrolled": "every step written out: slow to open, and nothing is left to decide while it runs, as on a GPU",
}
PARITY_DRAWS = 64  # Per class, over which export compares each target with the checkpoint.


@dataclass(frozen=True)
class Provider:
    """What can run a bundle's graphs: needs an NVIDIA card (``gpu``) or an ``extra`` of pyproject.toml.

    ``onnxruntime`` is ONNX Runtime's name for it, empty if it runs without, and ``options`` are given with it.
    """

    name: str
    about: str
    gpu: bool = False
    extra: str = ""
    onnxruntime: str = ""
    options: tuple[tuple[str, str], ...] = ()


_CUDA = (
    ("device_id", "0"),
    # The default takes the algorithm that is fastest at that moment, so that two runs may differ in their bytes.
    ("cudnn_conv_algo_search", "HEURISTIC"),
    # Every session has an arena of its own; by default they double, and sixteen of them hold much for nothing.
    ("arena_extend_strategy", "kSameAsRequested"),
)

# By name, from the slowest to the fastest; ``auto`` tries them from the last.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("cpu", "ONNX Runtime on the processor; runs everywhere", onnxruntime="CPUExecutionProvider"),
        Provider(
            name="cuda-tf32",
            about="cuda, with matrix products in TF32: faster, less exact, and never chosen by auto before cuda",
            gpu=True,
            extra="cuda",
            onnxruntime="CUDAExecutionProvider",
            options=(*_CUDA, ("use_tf32", "1")),
        ),
        Provider(
            name="cuda",
            about="ONNX Runtime on an NVIDIA card, in fp32 where the graph says fp32",
            gpu=True,
            extra="cuda",
            onnxruntime="CUDAExecutionProvider",
            options=(*_CUDA, ("use_tf32", "0")),
        ),
        Provider(
            name="tensorrt-rtx",
            about="TensorRT for RTX: engines that are finished on the card that runs them",
            gpu=True,
            extra="tensorrt-rtx",
        ),
        Provider(
            name="tensorrt",
            about="TensorRT: engines that are built for the card that runs them",
            gpu=True,
            extra="tensorrt",
        ),
    )
}
AUTO = "auto"


@dataclass(frozen=True)
class EngineTarget:
    """A library that builds engines from a bundle's graphs, and runs them as the provider of the same name.

    ``ahead``: it builds without a card, for other machines; ``portable``: engines run on every operating system that it
    supports.
    """

    about: str
    library: str
    extra: str
    ahead: bool
    portable: bool


# What ``export --target`` and ``build-engines`` make beside the ONNX graphs.
ENGINE_TARGETS = {
    "tensorrt": EngineTarget("TensorRT; built on the card that runs them", "tensorrt", "tensorrt", False, False),
    "tensorrt-rtx": EngineTarget("TensorRT for RTX; built anywhere", "tensorrt_rtx", "tensorrt-rtx", True, True),
}


@dataclass(frozen=True)
class TargetFormat:
    """A format of ``convert --to``, named as its module in `busigen.runtime.convert.formats`; it may need an extra."""

    about: str
    extra: str = ""


FORMATS = {
    "files": TargetFormat("images/CLASS/ and masks/CLASS/ with PNG files of the same names"),
    "busi": TargetFormat("BUSI's layout: benign/benign (1).png and benign (1)_mask.png"),
    "nnunet": TargetFormat("nnU-Net v2's raw layout, with dataset.json and folds"),
    "coco": TargetFormat("COCO instances, as RLE and as polygons"),
    "yolo": TargetFormat("YOLO segmentation labels and data.yaml"),
    "monai": TargetFormat("images, label maps and MONAI's datalist with folds"),
    "hf": TargetFormat("Hugging Face: Parquet with embedded images, for load_dataset and its Hub"),
    "dicom": TargetFormat("ultrasound images and segmentations", extra="dicom"),
}
LAUNCHERS = ("local", "ray", "slurm")
# Extras by the protocol of an ``--out`` URL; for all others, it is "remote".
STORE_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# Protocols whose objects appear whole or not at all; elsewhere a file is renamed once it is written.
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci")
# Options of fsspec unless its user sets others; with its own, one attempt on a dead network takes minutes.
STORE_OPTIONS = {"s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}}}
# Protocols that no dataset can be written to, and why.
UNFIT_STORES = {
    "memory": "lies in the memory of a process, and is gone with it",
    **dict.fromkeys(("http", "https", "data", "github"), "can be read but not written to"),
    **dict.fromkeys(("zip", "tar"), "is an archive, which cannot be continued"),
}
# Commands that copy a dataset from a URL to the folder ``copy``.
COPY_COMMANDS = {"s3": "aws s3 sync {} copy", "gs": "gcloud storage rsync -r {} copy"}
# Fewest rows of an engine call: ONNX Runtime sums a batch of one in another order than the rows of a larger one, and
# the bytes of a sample must not depend on the batch size.
MIN_BATCH = 2
DEFAULT_BATCH = 16
SHARD_SIZE = 100  # samples, unless asked otherwise; what an interruption loses: minutes of work on a CPU, not hours


def rows_per_call(side: int, batch_size: int) -> int:
    """Rows of a full call on windows of ``side`` pixels: ``batch_size`` at the smallest, fewer of the larger ones."""
    return max(MIN_BATCH, batch_size * BUCKETS[0] ** 2 // side**2)
