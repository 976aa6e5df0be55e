"""A result folder of nnU-Net with weights drawn from a seed; runs in nnU-Net's environment and imports nothing of ours.

    python nnunet_model.py FOLDER SEED MIRROR_AXES

FOLDER has plans.json and dataset.json. The network of its `3d_fullres` is made and initialised by nnU-Net, and kept as
fold_0/checkpoint_final.pth as its trainer keeps it; MIRROR_AXES is a JSON array.
"""

import json
import os
import sys


def main() -> None:
    folder, seed, mirror_axes = sys.argv[1:]
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    with open(os.path.join(folder, "plans.json")) as file:
        plans_json = json.load(file)
    with open(os.path.join(folder, "dataset.json")) as file:
        dataset_json = json.load(file)
    plans = PlansManager(plans_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    torch.manual_seed(int(seed))
    network = nnUNetTrainer.build_network_architecture(
        plans,
        plans.get_configuration("3d_fullres"),
        len(dataset_json["channel_names"]),
        heads,
        enable_deep_supervision=True,
    )
    checkpoint = {
        "network_weights": network.state_dict(),
        "current_epoch": 0,
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(json.loads(mirror_axes)) or None,
    }
    os.makedirs(os.path.join(folder, "fold_0"), exist_ok=True)
    # Written beside its place: a file of that name is whole.
    partial = os.path.join(folder, "partial.pth")
    torch.save(checkpoint, partial)
    os.replace(partial, os.path.join(folder, "fold_0", "checkpoint_final.pth"))


if __name__ == "__main__":
    main()
