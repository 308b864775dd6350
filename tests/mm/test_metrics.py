"""Metrics of dense tasks: average precision without objects, and ranks that are gathered."""

import json
import math
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmcv", reason="needs the mm extra")

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from small_scenes import dense_recipe, scenes

from effbackbones.data import DataError
from effbackbones.mm.data import build_data, read_instances
from effbackbones.mm.metrics import average_precision

OVERALL = {"box_ap", "box_ap50", "box_ap75"}


def open_scenes(tmp_path, edit=lambda content: None, *overrides):
    """Return the data of scenes whose evaluation annotations `edit` has changed."""
    root = Path(shutil.copytree(scenes() / "coco", tmp_path / "coco"))
    file = root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return build_data(dense_recipe("detection", tmp_path / "run", [f"data.root={root}", *overrides]).recipe)


def predicted(data, index, truth=None):
    """Return the sample of an image whose predictions are its annotations, those in `truth` if that is given."""
    info = data.val_annotations.get_data_info(index)
    boxes, labels, _ = read_instances((truth or data).val_annotations, index, masks=False)
    instances = InstanceData(
        bboxes=torch.as_tensor(boxes), labels=torch.as_tensor(labels), scores=torch.full((len(labels),), 0.9)
    )
    sample = DetDataSample(metainfo={"img_id": info["img_id"], "ori_shape": (info["height"], info["width"])})
    sample.pred_instances = instances
    return sample


def precision(data, samples):
    metric = average_precision(data, masks=False)
    metric.update(samples)
    return metric.compute()


def no_annotations(content):
    content["annotations"] = []


def test_annotations_themselves_as_predictions_have_a_precision_of_one(tmp_path):
    data = open_scenes(tmp_path)
    found = precision(data, [predicted(data, i) for i in range(3)])
    assert found.keys() > OVERALL
    assert set(found.values()) == {1.0}


def test_evaluation_without_annotations_has_precisions_that_are_not_a_number(tmp_path):
    data = open_scenes(tmp_path, no_annotations)
    truth = open_scenes(tmp_path / "truth")
    found = precision(data, [predicted(data, i, truth) for i in range(3)])
    assert found.keys() == OVERALL
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize(("edit", "expected"), [(lambda content: None, 0.0), (no_annotations, math.nan)])
def test_evaluation_without_predictions_has_a_precision_of_zero_or_none(tmp_path, edit, expected):
    data = open_scenes(tmp_path, edit)
    nothing = predicted(data, 0)
    nothing.pred_instances = nothing.pred_instances[:0]
    assert precision(data, [nothing]) == pytest.approx(dict.fromkeys(OVERALL, expected), nan_ok=True)


def test_evaluation_leaves_out_annotations_that_do_not_fit(tmp_path):
    def edit(content):
        content["annotations"][0]["bbox"] = [1, 2, 3]

    data = open_scenes(tmp_path, edit, "data.on_bad_image=skip")
    assert precision(data, [predicted(data, i) for i in range(3)])["box_ap"] == 1


def test_evaluation_without_a_usable_image_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no evaluation image could be used"):
        precision(open_scenes(tmp_path), [])


def evaluate_rank(rank, folder, data, samples, queue):
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queue.put(precision(data, samples))
    torch.distributed.destroy_process_group()


def test_ranks_have_the_same_precision_and_leave_no_files(tmp_path):
    data, folder = open_scenes(tmp_path), tmp_path / "work"
    folder.mkdir()
    samples = [predicted(data, i) for i in range(3)]
    samples[1].pred_instances = samples[1].pred_instances[:0]  # precision depends on the samples of both
    alone = precision(data, samples)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    parts = samples[::2], samples[1::2]
    ranks = [context.Process(target=evaluate_rank, args=(i, folder, data, part, queue)) for i, part in enumerate(parts)]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    assert 0 < alone["box_ap"] < 1
    assert found == [alone, alone]
    assert not (folder / ".dist_test").exists()
