"""The recipe: every key a recipe may hold, with its type, its meaning and its default.

A recipe is a YAML file of these sections. `load.py` reads one into a :class:`Recipe`; nothing here
is ever imported or called by name from a recipe: names resolve in the registries of `timm`
(models, optimizers, schedules) and in the fixed choices below.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, help: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Any:
    """Return a dataclass field with its one-line meaning and its bounds (`None` values are not bounded)."""
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


METRICS = {"classification": ("top1", "loss"), "detection": ("box_ap", "mask_ap"), "segmentation": ("miou",)}
"""The evaluation metrics that can select a checkpoint, by task, the usual one first."""


@dataclass
class ModelConfig:
    name: str = key("", "model of the timm registry, such as uniformer_small (required)")
    checkpoint: str | None = key(
        None,
        "weights to start from: a weight file (official format or ours), a run folder, or timm::NAME, those of the "
        "model in timm's hub, such as timm::resnet50.a1_in1k: the network is used for these alone",
    )
    drop_rate: float = key(0.0, "dropout in front of the classifier", ge=0, le=1)
    drop_path_rate: float = key(0.0, "stochastic depth of the last block; earlier blocks scale linearly", ge=0, le=1)
    args: dict[str, Any] = key({}, "further constructor arguments of the model, such as attention: window")
    head: str | None = key(
        None,
        "dense tasks: the mm config whose backbone this model replaces: mmdet::FILE or mmseg::FILE of the installed "
        "package, such as mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py, or a path; it is a program, run as mm does",
    )
    head_overrides: dict[str, Any] = key(
        {}, "dense tasks: merged into the model of that config; a mapping given for a list changes each of its entries"
    )
    frozen_stages: int = key(
        -1, "-1 trains everything; n keeps the stem and the first n stages as they are", ge=-1, le=4
    )
    linear_probe: bool = key(False, "train the classifier alone; all the rest stays as it is")
    norm_eval: bool = key(False, "keep the statistics of batch norms frozen while training")
    grad_checkpointing: bool | list[int] = key(
        False,
        "recompute activations in the backward pass: less memory, slower; batch-norm statistics move twice a step; a "
        "list names the stages that do so, from 0 on, of models of the zoo",
    )
    compile: bool = key(False, "torch.compile the model: minutes of compilation, then faster steps")
    channels_last: bool = key(False, "store activations as NHWC: often faster convolutions")


@dataclass
class DataConfig:
    source: Literal["fashion_mnist", "folder", "shards", "hf", "synthetic", "coco", "ade20k"] = key(
        "folder",
        "kind of dataset: folders of classes, shards (tar files in webdataset's layout), hf (what `datasets` saves to "
        "disk); coco is for detection, ade20k for segmentation, in the layouts of these sets",
    )
    root: str | None = key(None, "where the dataset lies; fashion_mnist has the images that ship as its default")
    train_shards: str = key(
        "train*.tar",
        "shards to train on, below data.root: a glob, a range such as train-{0000..0145}.tar, or a .txt list of them",
    )
    val_shards: str = key("val*.tar", "shards to evaluate, likewise")
    split_by_node: bool = key(
        False,
        "node n of N trains on shards n, n + N, ... alone, and needs no others; an epoch is as many batches as the "
        "node with the fewest images can fill, and takes an image at most once",
    )
    val_share: float = key(
        0.1,
        "share of each class that is evaluated where the folder of data.root holds classes alone, no train/ and val/; "
        "which images these are is the same in every run",
        gt=0,
        le=0.9,
    )
    num_classes: int | None = key(
        None, "number of classes; where null it is read from the dataset, that of shards from its classes.txt", gt=0
    )
    size: int = key(224, "side of the square model input, for segmentation that of the training crop, pixels", ge=32)
    scale: list[int] = key(
        [1333, 800], "dense tasks: longer and shorter side that an image is resized to fit, its ratio kept, pixels"
    )
    test_flip: bool = key(False, "dense tasks: evaluate and predict with the mirrored image too, merged as mm does")
    batch_size: int = key(128, "training images per device and step", gt=0)
    shrink_batch: bool = key(
        False, "a training set of fewer images than a batch makes the batch smaller, instead of being an error"
    )
    global_batch: int | None = key(
        None,
        "images of one optimizer step over all devices: batch_size follows from it, over the number of devices and "
        "trainer.accumulate, so that the batch stays when these change; null: it follows from batch_size",
        gt=0,
    )
    eval_batch_size: int | None = key(None, "evaluation images per device and step; null: batch_size", gt=0)
    workers: int = key(4, "loader processes per device; 0 loads in the training process", ge=0)
    mean: list[float] = key(
        [0.485, 0.456, 0.406],
        "per-channel mean taken off the input (0 to 1 scale); by default that of the weights the model starts from",
    )
    std: list[float] = key(
        [0.229, 0.224, 0.225],
        "per-channel deviation the input is divided by (0 to 1 scale); by default that of the weights, as the mean",
    )
    crop_pct: float = key(0.875, "evaluation: side of the centre crop over that of the resized image", gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "random"] = key("bicubic", "resampling of images")
    on_bad_image: Literal["error", "skip"] = key(
        "error", "an image or annotation that cannot be used: stop, or skip and count it (as any box without area)"
    )
    max_bad_images: int = key(100, "stop after so many skipped images", ge=0)
    synthetic_images: int = key(256, "images of the synthetic source, for training and for evaluation", gt=0)


@dataclass
class AugmentConfig:
    scale: list[float] = key([0.08, 1.0], "area range of the random resized crop; [1, 1] for none")
    ratio: list[float] = key([0.75, 1.3333], "aspect-ratio range of the random resized crop; [1, 1] for none")
    hflip: float = key(0.5, "probability of a horizontal flip", ge=0, le=1)
    resize: Literal["fixed", "multiscale", "detr"] = key(
        "fixed",
        "detection: to data.scale; or shorter side drawn from 0.6 to 1 of it (480 to 800 of 800); or, half the time, a "
        "crop between two resizes, as DETR does",
    )
    zoom: list[float] = key([0.5, 2.0], "segmentation: range of the factor on data.scale before the crop")
    photometric: bool = key(False, "dense tasks: mm's distortion of brightness, contrast, saturation and hue")
    color_jitter: float | None = key(
        None, "strength of colour jitter; has no effect beside a policy (timm's rule)", ge=0
    )
    policy: str | None = key(None, "AutoAugment or RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1")
    erase: float = key(0.0, "probability of random erasing", ge=0, le=1)
    repeats: int = key(1, "repeated augmentation: views of an image in one epoch of unchanged length", ge=1)
    mixup: float = key(0.0, "mixup alpha; 0 for none", ge=0)
    cutmix: float = key(0.0, "cutmix alpha; 0 for none", ge=0)
    mix_prob: float = key(1.0, "probability that a batch is mixed", ge=0, le=1)
    switch_prob: float = key(0.5, "probability of cutmix where both are on", ge=0, le=1)
    smoothing: float = key(0.0, "label smoothing", ge=0, le=1)


@dataclass
class OptimConfig:
    name: str = key("adamw", "optimizer of timm's registry")
    lr: float = key(1e-3, "peak learning rate", gt=0)
    lr_batch: int | None = key(
        None, "global batch lr belongs to: lr scales linearly with the real one; null: no scaling", gt=0
    )
    weight_decay: float = key(0.05, "weight decay; norms, biases and what the model exempts have none", ge=0)
    betas: list[float] | None = key(None, "Adam's betas; null: the optimizer's own")
    eps: float | None = key(None, "the optimizer's epsilon; null: its own", gt=0)
    momentum: float | None = key(None, "momentum of SGD; null: the optimizer's own", ge=0, le=1)
    layer_decay: float | None = key(
        None, "factor of the learning rate per layer from the head down; null: none", gt=0, le=1
    )
    backbone_lr: float = key(1.0, "dense tasks: factor of the learning rate of the backbone", gt=0)
    no_decay: list[str] | None = key(
        None, "dense tasks: parts of the names of parameters without weight decay, instead of the usual rule"
    )
    clip_grad: float | None = key(None, "clip the norm of the gradient; null: no clipping", gt=0)


@dataclass
class ScheduleConfig:
    name: Literal["cosine", "poly", "step", "multistep", "constant"] = key(
        "cosine", "decay of the learning rate, per step"
    )
    warmup_epochs: float = key(0.0, "epochs of linear warm-up, counted in the schedule", ge=0)
    warmup_steps: int | None = key(None, "optimizer steps of linear warm-up, in place of warmup_epochs", ge=0)
    warmup_lr: float = key(1e-6, "learning rate at the start of the warm-up; never scaled", ge=0)
    min_lr: float = key(0.0, "learning rate at the end; never scaled", ge=0)
    decay_epochs: float = key(30.0, "step schedule: epochs between decays", gt=0)
    milestones: list[float] = key([], "multistep schedule: epochs after which the rate decays")
    decay_rate: float = key(0.1, "step and multistep schedules: factor of a decay", gt=0, le=1)
    power: float = key(1.0, "poly schedule: power of the share of steps that are left", gt=0)


@dataclass
class EmaConfig:
    decay: float | None = key(None, "decay of the running average of the weights; null: no average is kept", gt=0, le=1)
    warmup: bool = key(False, "let the decay grow from 0 to its value over the first steps")


@dataclass
class LoraConfig:
    rank: int | None = key(
        None, "LoRA: rank of what is added to the linear layers of the blocks, which rest themselves; null: off", gt=0
    )
    alpha: float = key(16.0, "LoRA: what is added counts alpha / rank times", gt=0)
    dropout: float = key(0.0, "LoRA: dropout on the input of what is added, where a layer is called as one", ge=0, le=1)


@dataclass
class DistillConfig:
    teacher: str | None = key(None, "model of the timm registry that is imitated; null: no distillation")
    checkpoint: str | None = key(None, "weights of the teacher, named as in model.checkpoint")
    alpha: float = key(0.5, "share of the teacher's logits in the loss, beside that of the labels", ge=0, le=1)
    temperature: float = key(1.0, "what logits are divided by before they are compared", gt=0)
    hard: bool = key(False, "learn the teacher's most probable class instead of its probabilities")
    features: float = key(
        0.0, "weight of the distance (1 - cosine) of a projection of the pooled features to the teacher's", ge=0
    )


@dataclass
class TrainerConfig:
    epochs: int = key(300, "epochs of training", gt=0)
    steps: int | None = key(None, "optimizer steps to stop after, where that comes before the epochs", gt=0)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "kind of device")
    devices: int | str = key("auto", "devices per node: a number, or auto for all (one process on CPU)")
    nodes: int = key(1, "machines", gt=0)
    strategy: Literal["auto", "ddp", "fsdp"] = key(
        "auto",
        "how several devices work together: ddp, or fsdp, which shards weights, gradients and optimizer; auto: ddp "
        "where there are several",
    )
    precision: Literal["32", "bf16", "fp16"] = key(
        "32", "32, or automatic mixed precision in bf16 or fp16; heads with operators of mmcv keep to 32"
    )
    accumulate: int = key(1, "batches whose gradients add up to one optimizer step", gt=0)
    sync_bn: bool = key(False, "batch-norm statistics over all devices; plain batch norms where there is no CUDA")
    seed: int = key(0, "seed of initial weights, data order, augmentation and dropout", ge=0)
    val_every: int = key(1, "epochs between evaluations", gt=0)
    monitor: (
        Literal["top1", "loss", "box_ap", "mask_ap", "miou", "top1_ema", "box_ap_ema", "mask_ap_ema", "miou_ema"] | None
    ) = key(None, "evaluation metric that selects the best checkpoint; null: top1, box_ap or miou, as the task is")
    save_every: int | None = key(
        None, "also save the last checkpoint every so many steps; null: at each epoch's end", gt=0
    )
    log_every: int = key(50, "steps between rows of metrics.csv", gt=0)
    limit_train: int | None = key(None, "batches per training epoch; null: all", gt=0)
    limit_val: int | None = key(None, "batches per evaluation; null: all", gt=0)
    overfit: bool = key(False, "debugging: train on the first batch alone, evaluate on it")


@dataclass
class RunConfig:
    dir: str | None = key(None, "run folder; null: runs/<recipe name>")
    force: bool = key(False, "resume although the recipe differs from the one the run began with")
    loggers: list[Literal["tensorboard", "wandb"]] | None = key(
        None,
        "where metrics go beside metrics.csv, [] for nowhere; wandb uses the network; null: tensorboard if installed",
    )


@dataclass
class Recipe:
    """A whole recipe. `task` says which training module it is for."""

    task: Literal["classification", "detection", "segmentation"] = key("classification", "what is trained")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def monitor(self) -> str:
        """The evaluation metric that selects the best checkpoint: `trainer.monitor`, or the task's first."""
        return self.trainer.monitor or METRICS[self.task][0]
