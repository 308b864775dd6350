# STViT-R on Swin-S under UPerNet on ADE20K, 160k steps, for mmseg's own runner.
#
# Command:     ADE20K_ROOT=/path/to/ADEChallengeData2016 python train.py recipes/mm/upernet_stvit_r_swin_small.py \
#                --cfg-options model.backbone.checkpoint=/path/to/stvit_r_swin_small.pth
#              where train.py is tools/train.py of mmseg's repository, or mmseg/.mim/tools/train.py of the installed
#              package; dist_train.sh beside it runs several GPUs.
# Settings:    those of recipes/ade20k/upernet_stvit_r_swin_small.yaml,
#              which tells hardware, time, what to expect, and what differs from the published way.

# ruff: noqa: C408

# mmengine looks for mmseg:: under one name of the package only; this finds it under any.
_base_ = [__import__("mmseg").__path__[0] + "/.mim/configs/upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"]
custom_imports = dict(imports=["effbackbones.mm"], allow_failed_imports=False)

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffBackbone",
        model="stvit_r_swin_small",
        out_indices=(0, 1, 2, 3),
        checkpoint=None,
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

data_root = "{{$ADE20K_ROOT:datasets/ade20k}}"
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="EffOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=6e-05, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(no_decay=["norm", "rel_pos.table"]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-06, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
