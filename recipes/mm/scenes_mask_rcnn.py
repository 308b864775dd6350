# Mask R-CNN on S2AFormer-mini, from scratch, on scenes of garments, for mmdet's own runner.
#
# Command:     effb data scenes --out datasets/scenes
#              python train.py recipes/mm/scenes_mask_rcnn.py --work-dir runs/mm
#              where train.py is tools/train.py of mmdet's repository, or mmdet/.mim/tools/train.py of the installed
#              package.
# Settings:    those of recipes/scenes/mask_rcnn.yaml, which tells hardware, time and what to expect.

# ruff: noqa: C408

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"]
custom_imports = dict(imports=["effbackbones.mm"], allow_failed_imports=False)

classes = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
group_norm = dict(type="GN", num_groups=8)

model = dict(
    backbone=dict(_delete_=True, type="EffBackbone", model="s2aformer_mini", out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[32, 64, 160, 240], out_channels=64, norm_cfg=group_norm),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        mask_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=len(classes)),
        mask_head=dict(
            in_channels=64, conv_out_channels=64, num_convs=2, norm_cfg=group_norm, num_classes=len(classes)
        ),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(192, 144), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(192, 144), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
data_root = "{{$SCENES_ROOT:datasets/scenes/coco}}"
metainfo = dict(classes=classes)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=8, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline), **loader
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val2017.json")
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="EffOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
train_cfg = dict(max_epochs=8)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.002, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=8, T_max=8, convert_to_iter_based=True),
]
