# TransNeXt-Tiny under UPerNet on ADE20K, 160k steps, for mmseg's own runner.
#
# Command:     ADE20K_ROOT=/path/to/ADEChallengeData2016 python train.py recipes/mm/upernet_transnext_tiny.py \
#                --cfg-options model.backbone.checkpoint=/path/to/transnext_tiny.pth
#              where train.py is tools/train.py of mmseg's repository, or mmseg/.mim/tools/train.py of the installed
#              package; dist_train.sh beside it runs several GPUs.
# Settings:    those of recipes/ade20k/upernet_transnext_tiny.yaml,
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
        model="transnext_tiny",
        out_indices=(0, 1, 2, 3),
        checkpoint=None,
        drop_path_rate=0.4,
        bias_mode="interpolate",
        img_size=512,
    ),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

data_root = "{{$ADE20K_ROOT:datasets/ade20k}}"
train_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="EffOptimWrapperConstructor",
    optimizer=dict(type="AdamW", lr=6e-05, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(no_decay=["query_embedding", "relative_pos_bias_local", "cpb", "temperature", "norm"]),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-06, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
