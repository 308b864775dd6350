# S2AFormer-mini under RetinaNet on COCO, 1x (12 epochs), for mmdet's own runner.
#
# Command:     COCO_ROOT=/path/to/coco python train.py recipes/mm/retinanet_1x_s2aformer_mini.py \
#                --cfg-options model.backbone.checkpoint=/path/to/s2aformer_mini.pth
#              where train.py is tools/train.py of mmdet's repository, or mmdet/.mim/tools/train.py of the installed
#              package; dist_train.sh beside it runs several GPUs.
# Settings:    those of recipes/coco/retinanet_1x_s2aformer_mini.yaml,
#              which tells hardware, time, what to expect, and what differs from the published way.

# ruff: noqa: C408

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"]
custom_imports = dict(imports=["effbackbones.mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffBackbone",
        model="s2aformer_mini",
        out_indices=(1, 2, 3),
        checkpoint=None,
        drop_path_rate=0.0,
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 160, 240], start_level=0),
)

data_root = "{{$COCO_ROOT:datasets/coco}}"
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val2017.json")
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="EffOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=0.0001, betas=(0.9, 0.999), weight_decay=0.0001),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
