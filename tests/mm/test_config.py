"""mm's configs with our backbones: what is found, what is set, what is refused, and what then trains."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mm.small_heads import CLASSES, MASK_RCNN, UPERNET, build, recipe
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from effbackbones.config import RecipeError
from effbackbones.mm.config import (
    HeadError,
    build_from_cfg,
    build_model,
    build_model_cfg,
    check_head,
    load_head,
    predicts_masks,
    swap_backbone,
)

RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
DINO = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
MASK2FORMER = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
PANOPTIC = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py"
SEM_FPN = "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"
FCN = "mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py"
SEGFORMER = "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
MASK2FORMER_SEG = "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"
DEEPLAB = "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py"
OCR = "mmseg::ocrnet/ocrnet_hr18_4xb4-160k_ade20k-512x512.py"
KNET = "mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py"

WIDTHS = [56, 112, 224, 448]  # of uniformer_xxs
SMALL = {"model": "uniformer_xxs", "depths": [1, 1, 1, 1]}


def at(cfg: Any, field: str) -> Any:
    """Return what a config has at a dotted place."""
    for name in field.split("."):
        cfg = cfg[int(name)] if name.isdigit() else cfg[name]
    return cfg


def write(folder: Path, text: str) -> str:
    path = folder / "own.py"
    path.write_text(text)
    return str(path)


class Evil:
    """What makes a folder as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


# Finding a config


@pytest.mark.parametrize("name", [MASK_RCNN, UPERNET])
def test_load_head_of_a_package_knows_the_models_package(name):
    config = load_head(name)
    assert config.default_scope == name.split("::")[0]
    assert config.model.backbone.depth == 50


def test_load_head_of_a_base_config_takes_the_package_it_is_in():
    assert load_head("mmseg::_base_/models/upernet_r50.py").default_scope == "mmseg"


def test_load_head_of_a_file_takes_its_default_scope(tmp_path):
    config = load_head(write(tmp_path, "default_scope = 'mmdet'\nmodel = dict(type='RetinaNet')"))
    assert config.default_scope == "mmdet"
    assert config.model.type == "RetinaNet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coc.py", f"no such config; nearest: .*{MASK_RCNN}"),
        ("mmdet::retinanet_r50_fpn_1x_coco.py", f"no such config; nearest: {RETINANET}$"),
        ("mmseg::../mmseg/version.py", "mmseg has no such config"),
        ("mmpose::x.py", "expected mmdet::FILE, mmseg::FILE or the path"),
        ("nowhere.py", "no such file; expected a path, or mmdet::FILE"),
    ],
    ids=["misspelt", "folder", "outside", "package", "file"],
)
def test_load_head_of_unknown_name_raises_with_what_is_near(name, message):
    with pytest.raises(HeadError, match=message):
        load_head(name)
    assert issubclass(HeadError, RecipeError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "cannot be read: SyntaxError"),
        ("model = dict(type='RetinaNet')", "default_scope=None, expected mmdet or mmseg"),
        ("default_scope = 'mmdet'", "holds no model"),
    ],
    ids=["syntax", "scope", "model"],
)
def test_load_head_of_unusable_file_raises(tmp_path, text, message):
    with pytest.raises(HeadError, match=rf"own\.py: {message}"):
        load_head(write(tmp_path, text))


def test_load_head_of_unchanged_file_runs_it_once_and_gives_a_copy(tmp_path):
    name = write(tmp_path, f"""
open({str(tmp_path / "runs")!r}, "a").write("x")
default_scope = "mmdet"
model = dict(type="RetinaNet")
""")  # fmt: skip
    load_head(name).model.type = "Other"
    assert load_head(name).model.type == "RetinaNet"
    assert (tmp_path / "runs").read_text() == "x"


def test_load_head_of_rewritten_file_reads_it_anew(tmp_path):
    name = write(tmp_path, "default_scope = 'mmdet'\nmodel = dict(type='RetinaNet')")
    load_head(name)
    write(tmp_path, "default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')")
    assert load_head(name).model.type == "EncoderDecoder"


# Swapping


@pytest.mark.parametrize(
    ("head", "stages", "fields"),
    [
        (MASK_RCNN, (0, 1, 2, 3), {"neck.in_channels": WIDTHS, "roi_head.bbox_head.in_channels": 256}),
        (RETINANET, (1, 2, 3), {"neck.in_channels": WIDTHS[1:], "neck.start_level": 0, "bbox_head.in_channels": 256}),
        (DINO, (1, 2, 3), {"neck.in_channels": WIDTHS[1:]}),
        (MASK2FORMER, (0, 1, 2, 3), {"panoptic_head.in_channels": WIDTHS}),
        (SEM_FPN, (0, 1, 2, 3), {"neck.in_channels": WIDTHS, "decode_head.in_channels": [256] * 4}),
        (UPERNET, (0, 1, 2, 3), {"decode_head.in_channels": WIDTHS, "auxiliary_head.in_channels": 224}),
        (
            FCN,
            (2, 3),
            {
                "decode_head.in_channels": 448,
                "decode_head.in_index": 1,
                "auxiliary_head.in_channels": 224,
                "auxiliary_head.in_index": 0,
            },
        ),
        (SEGFORMER, (0, 1, 2, 3), {"decode_head.in_channels": WIDTHS}),
        (MASK2FORMER_SEG, (0, 1, 2, 3), {"decode_head.in_channels": WIDTHS}),
        (
            DEEPLAB,
            (0, 2, 3),
            {"decode_head.in_channels": 448, "decode_head.in_index": 2, "decode_head.c1_in_channels": 56},
        ),
        (OCR, (0, 1, 2, 3), {"decode_head.0.in_channels": WIDTHS, "decode_head.1.in_channels": WIDTHS}),
        (
            KNET,
            (0, 1, 2, 3),
            {
                "decode_head.kernel_generate_head.in_channels": WIDTHS,
                "decode_head.kernel_update_head.0.in_channels": 512,
                "auxiliary_head.in_channels": 224,
            },
        ),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_swap_backbone_sets_the_channels_of_what_takes_the_maps(head, stages, fields):
    config = load_head(head)
    model = swap_backbone(config.model, SMALL, config.default_scope)
    assert model.backbone == {"type": "EffBackbone", "out_indices": stages, **SMALL}
    assert {field: at(model, field) for field in fields} == fields


@pytest.mark.parametrize("head", [MASK_RCNN, UPERNET])
def test_swap_backbone_leaves_the_config_and_the_random_state_as_they_were(head):
    config = load_head(head)
    before, state = config.model.to_dict(), torch.get_rng_state()
    swap_backbone(config.model, SMALL, config.default_scope)
    assert config.model.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_swap_backbone_below_another_model_finds_it():
    config = load_head(RETINANET)
    wrapper = ConfigDict(type="SemiBaseDetector", detector=config.model)
    model = swap_backbone(wrapper, SMALL, "mmdet")
    assert model.detector.backbone.type == "EffBackbone"
    assert model.detector.neck.in_channels == WIDTHS[1:]


def test_swap_backbone_of_several_necks_sets_the_first():
    model = load_head("mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py").model
    first, second = swap_backbone(model, SMALL, "mmdet").neck
    assert first.in_channels == WIDTHS[1:]
    assert second.in_channels == 256


def test_swap_backbone_takes_away_all_weights_of_the_config():
    config = load_head("mmseg::_base_/models/upernet_r50.py")
    config.model.decode_head.init_cfg = [
        {"type": "Pretrained", "checkpoint": "somewhere.pth"},
        {"type": "Normal", "std": 0.01},
    ]
    text = str(swap_backbone(config.model, SMALL, "mmseg"))
    assert "open-mmlab://" not in text
    assert "Pretrained" not in text
    assert "'type': 'Normal'" in text


@pytest.mark.parametrize(
    ("strides", "dilations"), [((1, 2, 1, 1), (1, 1, 2, 4)), ((1, 2, 2, 1), (1, 1, 1, 2))], ids=["8", "16"]
)
def test_swap_backbone_of_dilated_backbone_takes_all_stages(strides, dilations):
    config = load_head(UPERNET)
    config.model.backbone.update(strides=strides, dilations=dilations)
    assert swap_backbone(config.model, SMALL, "mmseg").backbone.out_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "out_indices": (1, 2, 3)}},
         "backbone: the config's own has maps of strides 8, 8, 8; expected some of 4, 8, 16, 32"),
        ({"auxiliary_head": {"in_channels": 300}},
         r"auxiliary_head\.in_channels: 300 of the maps 2 are not channels .* \[256, 512, 1024, 2048\]"),
        ({"auxiliary_head": {"in_index": 7}}, r"auxiliary_head\.in_channels: 1024 of the maps 7 are not"),
        ({"decode_head": {"in_channels": [256, 512, 1024]}}, r"decode_head\.in_channels: \[256, 512, 1024\] of the"),
        ({"neck": {"type": "FPN", "in_channels": [1, 2, 3, 4]}}, r"neck\.in_channels: \[1, 2, 3, 4\] are not"),
        ({"neck": {"type": "Feature2Pyramid", "embed_dim": 1}}, "neck: Feature2Pyramid has no in_channels to set"),
        ({"backbone": {"depth": 51}}, "backbone: mmseg cannot build it: .*depth 51"),
        ({"backbone": None}, "backbone: the model has none to replace"),
    ],
    ids=["strides", "channels", "index", "number", "neck", "no_channels", "broken", "none"],
)  # fmt: skip
def test_swap_backbone_without_counterpart_raises_and_names_the_field(change, message):
    model = load_head(UPERNET).model
    for key, value in change.items():
        model[key] = value if model.get(key) is None or value is None else {**model[key], **value}
    with pytest.raises(HeadError, match=message):
        swap_backbone(model, SMALL, "mmseg")


def test_swap_backbone_of_plain_transformer_raises_and_names_the_strides():
    config = load_head("mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py")
    config.model.backbone.update(num_layers=4, out_indices=(0, 1, 2, 3), embed_dims=12, num_heads=1)
    with pytest.raises(HeadError, match="maps of strides 16, 16, 16, 16"):
        swap_backbone(config.model, SMALL, "mmseg")


# What a recipe sets


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        (MASK_RCNN, {"roi_head.bbox_head.num_classes": 5, "roi_head.mask_head.num_classes": 5}),
        (RETINANET, {"bbox_head.num_classes": 5}),
        (UPERNET, {"decode_head.num_classes": 5, "auxiliary_head.num_classes": 5}),
        (KNET, {"decode_head.kernel_update_head.2.num_classes": 5, "decode_head.kernel_generate_head.num_classes": 5}),
        (MASK2FORMER_SEG, {"decode_head.num_classes": 5, "decode_head.loss_cls.class_weight": [1.0] * 5 + [0.1]}),
        *(
            (
                name,
                {
                    "panoptic_head.num_things_classes": 5,
                    "panoptic_head.num_stuff_classes": 0,
                    "panoptic_head.loss_cls.class_weight": [1.0] * 5 + [0.1],
                    "panoptic_fusion_head.num_things_classes": 5,
                    "panoptic_fusion_head.num_stuff_classes": 0,
                },
            )
            for name in (MASK2FORMER, PANOPTIC)
        ),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_build_model_cfg_sets_the_classes_everywhere(head, fields):
    model = build_model_cfg(recipe(head), CLASSES)
    assert {field: at(model, field) for field in fields} == fields


def test_build_model_cfg_sets_tied_outputs_and_drops_weights_of_other_classes(tmp_path):
    text = """
_base_ = "BASE"
model = dict(decode_head=dict(out_channels=150, loss_decode=dict(class_weight=[0.5, 1.5] * 75)))
""".replace("BASE", load_head(UPERNET).filename)
    model = build_model_cfg(recipe(write(tmp_path, text)), CLASSES)
    assert model.decode_head.out_channels == 5
    assert "class_weight" not in model.decode_head.loss_decode


def test_build_model_cfg_takes_the_backbone_of_the_recipe():
    model = build_model_cfg(
        recipe(MASK_RCNN, drop_path_rate=0.2, norm_eval=True, grad_checkpointing=True, frozen_stages=1), CLASSES
    )
    assert model.backbone == {
        "type": "EffBackbone",
        "model": "uniformer_xxs",
        "out_indices": (0, 1, 2, 3),
        "drop_path_rate": 0.2,
        "frozen_stages": 1,
        "norm_eval": True,
        "with_cp": True,
        "depths": [1, 1, 1, 1],
    }


@pytest.mark.parametrize("head", [MASK_RCNN, UPERNET])
def test_build_model_cfg_normalises_rgb_and_keeps_the_rest_of_the_preprocessor(head):
    before = load_head(head).model.data_preprocessor
    after = build_model_cfg(recipe(head), CLASSES).data_preprocessor
    assert after.bgr_to_rgb is True
    np.testing.assert_allclose(after.mean, [123.675, 116.28, 103.53])
    np.testing.assert_allclose(after.std, [58.395, 57.12, 57.375])
    ours = ("mean", "std", "bgr_to_rgb", "size")
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


@pytest.mark.parametrize(("sync_bn", "kind"), [(False, "BN"), (True, "SyncBN")])
def test_build_model_cfg_has_synchronised_norms_only_where_told(sync_bn, kind):
    model = build_model_cfg(recipe(UPERNET), CLASSES, sync_bn)
    assert model.decode_head.norm_cfg.type == model.auxiliary_head.norm_cfg.type == kind


def test_build_model_cfg_merges_overrides_last():
    overrides = {
        "rpn_head": {"loss_cls": {"loss_weight": 0.5}},
        "roi_head": {"bbox_head": {"num_classes": 9}},
        "neck": {"_delete_": True, "type": "mmdet.PAFPN", "norm_cfg": {"_delete_": True, "type": "BN"}},
        "test_cfg": {"rcnn": {"max_per_img": 7}},
        "new": {"a": {"b": 1}},
    }
    model = build_model_cfg(recipe(MASK_RCNN, overrides), CLASSES)
    assert model.rpn_head.loss_cls == {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 0.5}
    assert (model.roi_head.bbox_head.num_classes, model.roi_head.mask_head.num_classes) == (9, 5)
    assert model.neck == {"type": "mmdet.PAFPN", "norm_cfg": {"type": "BN"}}
    assert model.test_cfg.rcnn.max_per_img == 7
    assert model.new.a.b == 1
    assert overrides["neck"]["_delete_"] is True


def test_build_model_cfg_merges_a_mapping_into_each_entry_of_a_list():
    cascade = "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
    model = build_model_cfg(recipe(cascade, {"roi_head": {"bbox_head": {"reg_class_agnostic": False}}}), CLASSES)
    assert [head.reg_class_agnostic for head in model.roi_head.bbox_head] == [False] * 3
    assert [head.num_classes for head in model.roi_head.bbox_head] == [5] * 3


@pytest.mark.parametrize(("key", "old"), [("num_outs", "5"), ("in_channels", r"\[56")], ids=["number", "list"])
def test_build_model_cfg_of_mapping_for_something_else_raises_and_names_the_field(key, old):
    with pytest.raises(HeadError, match=rf"model\.head_overrides\.neck\.{key}: a mapping cannot be merged into {old}"):
        build_model_cfg(recipe(MASK_RCNN, {"neck": {key: {"a": 1}}}), CLASSES)


def test_build_model_cfg_sets_the_classes_of_a_head_for_one_class():
    head = "mmdet::crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py"
    model = build_model_cfg(recipe(head), CLASSES)
    assert model.roi_head.bbox_head.num_classes == 5


def test_build_model_cfg_of_region_proposals_alone_raises():
    with pytest.raises(HeadError, match="num_classes: no head has it"):
        build_model_cfg(recipe("mmdet::rpn/rpn_r50_fpn_1x_coco.py"), CLASSES)


def test_build_model_cfg_of_head_that_would_download_raises_and_names_the_field():
    head = "mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py"
    with pytest.raises(HeadError, match=r": teacher_ckpt: https://\S+ would be loaded: .* model\.checkpoint; a model"):
        build_model_cfg(recipe(head), CLASSES)


def test_build_model_cfg_without_data_preprocessor_raises_and_names_it(tmp_path):
    text = f"_base_ = {load_head(RETINANET).filename!r}\nmodel = dict(data_preprocessor=None)"
    with pytest.raises(HeadError, match=r"own\.py: data_preprocessor: the model has none"):
        build_model_cfg(recipe(write(tmp_path, text)), CLASSES)


# Overrides are plain data

CALL = {"type": "subprocess.getoutput", "cmd": "touch marker"}


@pytest.mark.parametrize(
    ("head", "overrides", "message"),
    [
        (MASK_RCNN, {"data_preprocessor": {"batch_augments": [CALL]}},
         r"data_preprocessor\.batch_augments\.0\.type: 'subprocess"),
        (MASK_RCNN, {"neck": {"init_cfg": CALL}},
         r"neck\.init_cfg\.type: 'subprocess\.getoutput' is no part of models"),
        (MASK_RCNN, {"neck": {"type": "mmdet.utils.misc.get_test_pipeline_cfg"}}, r"neck\.type: 'mmdet\.utils\.misc"),
        (MASK_RCNN, {"neck": {"type": ["FPN"]}}, r"neck\.type: \['FPN'\] is no part"),
        (MASK_RCNN, {"test_cfg": {"rcnn": {"nms": {"type": "__import__('os').mkdir('marker')"}}}},
         r"nms\.type: .* is no part"),
        (MASK_RCNN, {"type": "KnowledgeDistillationSingleStageDetector", "teacher_config": "evil.py"},
         r"teacher_config: 'evil\.py'; expected a word"),
        (UPERNET, {"decode_head": {"loss_decode": {"class_weight": "evil.pkl"}}},
         r"class_weight: 'evil\.pkl'; expected a word"),
        (MASK_RCNN, {"neck": {"init_cfg": {"type": "Pretrained", "checkpoint": "evil.pkl"}}},
         r"neck\.init_cfg\.checkpoint: 'evil\.pkl' would be loaded: .* are model\.checkpoint"),
        (MASK_RCNN, {"teacher_ckpt": "evil.pkl"}, r"teacher_ckpt: 'evil\.pkl' would be loaded"),
        (MASK_RCNN, {"roi_head": {"bbox_head": {"pretrained": "evil.pkl"}}},
         r"bbox_head\.pretrained: 'evil\.pkl' would be loaded"),
    ],
    ids=["list", "init", "function", "kind", "expression", "config", "load", "pretrained", "teacher", "old"],
)  # fmt: skip
def test_build_model_of_override_that_is_more_than_data_raises_and_runs_nothing(
    tmp_path, monkeypatch, head, overrides, message
):
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    Path("evil.py").write_text("import os; os.mkdir('marker')")
    with pytest.raises(HeadError, match=rf"^{head}: model\.head_overrides\..*{message}"):
        build_model(recipe(head, overrides), CLASSES)
    assert not Path("marker").exists()


def test_build_model_cfg_takes_every_kind_of_type_that_models_have():
    overrides = {
        "neck": {"init_cfg": {"type": "Xavier", "layer": "Conv2d"}, "norm_cfg": {"type": "BN"}},
        "roi_head": {"bbox_roi_extractor": {"roi_layer": {"type": "RoIAlign", "output_size": 7}}},
        "train_cfg": {"rcnn": {"assigner": {"type": "mmdet.MaxIoUAssigner"}}},
        "test_cfg": {"rcnn": {"nms": {"type": "soft_nms"}}},
    }
    model = build_model_cfg(recipe(MASK_RCNN, overrides), CLASSES)
    assert model.neck.init_cfg == overrides["neck"]["init_cfg"]
    assert model.test_cfg.rcnn.nms == {"type": "soft_nms", "iou_threshold": 0.5}


@pytest.mark.parametrize("before", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["unset", "contrary"])
def test_build_from_cfg_of_evil_pickle_does_not_run_it(tmp_path, monkeypatch, before):
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    torch.save(Evil(tmp_path / "marker"), tmp_path / "evil.pth")
    cfg = build_model_cfg(recipe(RETINANET), CLASSES)
    cfg.neck.init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "evil.pth")}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        build_from_cfg(cfg, "mmdet")
    assert not (tmp_path / "marker").exists()
    assert {name: value for name, value in os.environ.items() if name.startswith("TORCH_FORCE_")} == before


# Masks

MASKLESS = {"roi_head": {"mask_head": None, "mask_roi_extractor": None}}


@pytest.mark.parametrize(
    ("head", "overrides", "masks"),
    [
        (MASK_RCNN, {}, True),
        (MASK_RCNN, MASKLESS, False),
        (RETINANET, {}, False),
        (RETINANET, {"mask_head": {"type": "CondInstMaskHead"}}, True),
        (DINO, {}, False),
        (MASK2FORMER, {}, True),
        ("mmdet::solov2/solov2_r50_fpn_1x_coco.py", {}, True),
        ("mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", {}, True),
        ("mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py", {}, True),
        ("mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py", {}, False),
    ],
)
def test_predicts_masks_is_true_of_heads_with_masks_after_the_overrides(head, overrides, masks):
    assert predicts_masks(recipe(head, overrides)) is masks


def test_predicts_masks_of_override_that_does_not_fit_raises_and_names_the_head():
    with pytest.raises(HeadError, match=rf"^{RETINANET}: model\.head_overrides\.neck\.num_outs: a mapping cannot"):
        predicts_masks(recipe(RETINANET, {"neck": {"num_outs": {"a": 1}}}))


def test_build_model_cfg_error_names_the_head():
    with pytest.raises(HeadError, match=r"mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024\.py: backbone: "):
        build_model_cfg(recipe("mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py"), CLASSES)


# Building

FEW_LAYERS = {"encoder": {"num_layers": 1}, "decoder": {"num_layers": 1}}
FEW_QUERIES = {"num_queries": 20, "transformer_decoder": {"num_layers": 1}}


@pytest.mark.parametrize(
    ("head", "overrides"),
    [
        (MASK_RCNN, {}),
        (RETINANET, {}),
        (DINO, FEW_LAYERS),
        (MASK2FORMER, {"panoptic_head": FEW_QUERIES}),
        (SEM_FPN, {}),
        (UPERNET, {}),
        (FCN, {}),
        (SEGFORMER, {}),
        (MASK2FORMER_SEG, {"decode_head": FEW_QUERIES}),
        (OCR, {}),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_build_model_runs_with_every_kind_of_head(head, overrides):
    model = build_model(recipe(head, overrides, name="s2aformer_mini"), CLASSES)
    assert type(model.backbone.model).__name__ == "S2AFormer"
    assert model.training


@pytest.mark.parametrize(
    ("head", "overrides", "message"),
    [
        (MASK_RCNN, {"neck": {"in_channels": [56, 112, 224, 449]}}, r"neck\.lateral_convs|neck: cannot take"),
        (MASK_RCNN, {"roi_head": {"bbox_head": {"in_channels": 128}}}, r"roi_head\.bbox_head: cannot take"),
        (MASK_RCNN, {"backbone": {"out_indices": [1, 2, 3]}}, "neck: cannot take"),
        (UPERNET, {"decode_head": {"in_channels": [56, 112, 224, 449]}}, "decode_head: cannot take"),
        (UPERNET, {"auxiliary_head": {"in_channels": 7}}, "auxiliary_head: cannot take"),
        (UPERNET, {"decode_head": {"colour": 1}}, "model: mmseg cannot build it: .*'colour'"),
    ],
    ids=["neck", "roi_head", "maps", "decode_head", "auxiliary_head", "unknown"],
)
def test_build_model_that_cannot_run_raises_and_names_the_field(head, overrides, message):
    with pytest.raises(HeadError, match=rf"^{head}: {message}"):
        build_model(recipe(head, overrides), CLASSES)


def test_build_model_of_wrapped_detector_raises_and_names_the_backbone(tmp_path):
    text = f"""
_base_ = {load_head(RETINANET).filename!r}
model = dict(
    _delete_=True,
    type="SemiBaseDetector",
    detector={{{{_base_.model}}}},
    data_preprocessor=dict(
        type="MultiBranchDataPreprocessor", data_preprocessor={{{{_base_.model.data_preprocessor}}}}
    ),
    semi_train_cfg=dict(freeze_teacher=True),
    semi_test_cfg=dict(predict_on="teacher"),
)
"""
    with pytest.raises(
        HeadError, match=r"own\.py: backbone: that of SemiBaseDetector is not EffBackbone; .* own runner"
    ):
        build_model(recipe(write(tmp_path, text)), CLASSES)


def test_check_head_leaves_the_model_as_it_was():
    cfg = build_model_cfg(recipe(UPERNET), CLASSES)
    model = build(UPERNET)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_head(model, cfg, "mmseg")
    assert model.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# Training

SIDE = 64


def instances(size: tuple[int, int] = (SIDE, SIDE)) -> DetDataSample:
    """Return a sample with two boxes and their masks."""
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]])
    masks = np.zeros((2, *size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size, "scale_factor": (1, 1)})
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 3]), masks=BitmapMasks(masks, *size))
    return sample


def segments(size: tuple[int, int] = (SIDE, SIDE)) -> SegDataSample:
    """Return a sample with a label at every pixel."""
    sample = SegDataSample(metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size})
    labels = torch.randint(0, len(CLASSES), (1, *size), generator=torch.Generator().manual_seed(0))
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


@pytest.mark.parametrize(
    ("head", "sample"),
    [(MASK_RCNN, instances), (RETINANET, instances), (UPERNET, segments), (FCN, segments), (DEEPLAB, segments)],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_model_has_finite_losses_whose_gradient_reaches_the_stem(head, sample):
    torch.manual_seed(0)
    model = build(head)
    images = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8) for _ in range(2)]
    data = model.data_preprocessor({"inputs": images, "data_samples": [sample(), sample()]}, True)
    loss, losses = model.parse_losses(model(**data, mode="loss"))
    assert all(value.isfinite() for value in losses.values())
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert [key for key, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert gradients[next(key for key in gradients if key.startswith("backbone.model.stem."))].any()


def test_build_model_of_plain_norms_has_no_synchronised_one():
    model = build(UPERNET)
    kinds = {type(module) for module in model.modules()}
    assert nn.BatchNorm2d in kinds
    assert nn.SyncBatchNorm not in kinds
