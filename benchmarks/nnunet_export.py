"""nnU-Net's own export alone, for benchmarks/export.py; runs in nnU-Net's environment and imports nothing of ours.

    python nnunet_export.py PLANS DATASET_JSON LOGITS SHAPE SPACING_MM LABELS

LOGITS is a file of float16 (classes, Z, Y, X) on the grid of the plans' `3d_fullres`, read whole before the clock
starts. SHAPE and SPACING_MM of the image are JSON arrays. The last line is one JSON object: seconds of CPU and of wall
time.
"""

import json
import sys
import time

import numpy as np


def main() -> None:
    plans_file, dataset_file, logits_file, shape, spacing, labels_file = sys.argv[1:]
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    with open(dataset_file) as file:
        dataset_json = json.load(file)
    plans = PlansManager(plans_file)
    shape = json.loads(shape)
    properties = {
        "spacing": json.loads(spacing),
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, size] for size in shape],
    }
    logits = torch.from_numpy(np.load(logits_file))
    cpu, wall = time.process_time(), time.perf_counter()
    found = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, plans.get_configuration("3d_fullres"), plans.get_label_manager(dataset_json), properties
    )
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    np.save(labels_file, found)
    print(json.dumps({"cpu_s": round(cpu, 3), "wall_s": round(wall, 3)}))


if __name__ == "__main__":
    main()
