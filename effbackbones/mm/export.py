"""A run of a dense task for mm's own tools: its config and its weights."""

from pathlib import Path
from typing import Any

from mmengine.config import Config

from effbackbones.checkpoint import write_checkpoint
from effbackbones.files import replacing
from effbackbones.mm.config import build_model_cfg, load_head
from effbackbones.predict_dense import open_run
from effbackbones.viz.dense import palette


def export_mm(run: str | Path, out: Path) -> tuple[Path, Path]:
    """Write `config.py` and `weights.pth` of a run's best checkpoint into a folder; return their paths.

    `mmdet.apis.init_detector(config, weights)`, or `mmseg.apis.init_model`, makes the trained model of them.

    Raises:
        CheckpointError: The folder holds no run with a checkpoint, or the checkpoint cannot be read.
        RecipeError: It is a run of classification.
    """
    module = open_run(run)
    recipe, classes = module.recipe, list(module.classes)
    model = build_model_cfg(recipe, module.classes)
    meta = {"classes": classes, "palette": palette(len(classes)).tolist()}
    dataset = "CocoDataset" if recipe.task == "detection" else "BaseSegDataset"  # mm asks it for colours
    pipeline = _test_pipeline(recipe.task, recipe.data.scale)
    config = Config(
        {
            "default_scope": load_head(str(recipe.model.head)).default_scope,
            "custom_imports": {"imports": ["effbackbones.mm"], "allow_failed_imports": False},
            "model": model,
            "test_pipeline": pipeline,
            "test_dataloader": {"dataset": {"type": dataset, "metainfo": meta, "pipeline": pipeline}},
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    files = out / "config.py", out / "weights.pth"
    with replacing(files[0]) as part:
        part.write_text(config.pretty_text, encoding="utf-8")
    weights = {name: value.contiguous() for name, value in module.model.state_dict().items()}
    write_checkpoint({"meta": {"dataset_meta": meta}, "state_dict": weights}, files[1])
    return files


def _test_pipeline(task: str, scale: list[int]) -> list[dict[str, Any]]:
    pack = "PackDetInputs" if task == "detection" else "PackSegInputs"
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": tuple(scale), "keep_ratio": True},
        {"type": pack, "meta_keys": ("img_path", "ori_shape", "img_shape", "scale_factor")},
    ]
