"""nnU-Net's half of the tests beside it: runs in nnU-Net's environment (`make nnunet-peer`), imports none of ours.

    python nnunet_side.py COMMAND ROOT JSON

ROOT holds nnU-Net's three folders raw, preprocessed and results; JSON is an object with the command's arguments. The
last line on the standard output is a JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any


def plan_and_preprocess(root: str, dataset: str, configurations: list[str], plans: str | None = None) -> Any:
    """Fingerprint, plans (unless `plans`, a file, is given) and preprocessing, in one process each."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    number = int(dataset[7:10])
    folder = os.path.join(root, "preprocessed", dataset)
    os.makedirs(folder, exist_ok=True)
    if plans is None:
        api.extract_fingerprints([number], num_processes=1, check_dataset_integrity=False)
        api.plan_experiments([number])
    else:
        shutil.copy(plans, os.path.join(folder, "nnUNetPlans.json"))
        shutil.copy(os.path.join(root, "raw", dataset, "dataset.json"), folder)
    for configuration in configurations:
        DefaultPreprocessor(verbose=False).run(dataset, configuration, "nnUNetPlans", num_processes=1)
    return {}


def plan(root: str, datasets: list[str], planner: str) -> Any:
    """The plans that a planner makes of fingerprints alone: each dataset has dataset.json in raw and the fingerprint in
    preprocessed, and no images. The first image would only say which reader takes its kind of file."""
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as default
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as res
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    default.get_filenames_of_train_images_and_targets = lambda *_: {}
    kind = getattr(res, planner, None) or getattr(default, planner)
    kind.determine_reader_writer = lambda self: SimpleITKIO
    plans = {}
    for dataset in datasets:
        made = kind(dataset)
        made.plan_experiment()
        with open(os.path.join(root, "preprocessed", dataset, made.plans_identifier + ".json")) as file:
            plans[dataset] = json.load(file)
    return plans


def verify(root: str, dataset: str) -> Any:
    """nnU-Net's own check of a raw dataset, which raises; and the cases that it sees."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = os.path.join(root, "raw", dataset)
    verify_dataset_integrity(folder, num_processes=1)
    return {"cases": sorted(get_filenames_of_train_images_and_targets(folder))}


def dump(root: str, folder: str, out: str) -> Any:
    """The arrays of a preprocessed folder as .npy."""
    import blosc2
    import numpy as np

    os.makedirs(out, exist_ok=True)
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".b2nd")]
    for name in names:
        np.save(os.path.join(out, name[:-5] + ".npy"), blosc2.open(os.path.join(folder, name), mode="r")[:])
    return {"files": len(names)}


def predict(
    root: str,
    model: str,
    files: list[list[str]],
    out: str,
    checkpoint: str = "checkpoint_final.pth",
    previous: str | None = None,
) -> Any:
    """Fold 0 of a model folder on lists of files, with mirroring. `previous`: a folder with the label maps of a
    cascade's first stage."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, verbose=False
    )
    predictor.initialize_from_trained_model_folder(model, (0,), checkpoint)
    os.makedirs(out, exist_ok=True)
    names = [os.path.join(out, os.path.basename(first).replace("_0000.nii.gz", "")) for first, *_ in files]
    predictor.predict_from_files_sequential(
        files, names, save_probabilities=False, overwrite=True, folder_with_segs_from_prev_stage=previous
    )
    return {"mirror_axes": predictor.allowed_mirroring_axes}


def _trainer(root: str, dataset: str, configuration: str) -> Any:
    """nnU-Net's, for fold 0, with its workers in few processes."""
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 - nnU-Net spells it so
    os.environ["nnUNet_def_n_proc"] = "1"  # noqa: SIM112
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = os.path.join(root, "preprocessed", dataset)
    with open(os.path.join(folder, "nnUNetPlans.json")) as file:
        plans = json.load(file)
    with open(os.path.join(folder, "dataset.json")) as file:
        dataset_json = json.load(file)
    return nnUNetTrainer({**plans, "continue_training": True}, configuration, 0, dataset_json, torch.device("cpu"))


def validate(root: str, dataset: str, configuration: str, checkpoint: str) -> Any:
    """The validation of fold 0 by nnU-Net's trainer, with the predictions for a next stage where there is one."""
    references = os.path.join(root, "preprocessed", dataset, "gt_segmentations")
    shutil.copytree(os.path.join(root, "raw", dataset, "labelsTr"), references, dirs_exist_ok=True)
    trainer = _trainer(root, dataset, configuration)
    trainer.initialize()
    trainer.load_checkpoint(checkpoint)
    trainer.perform_actual_validation()
    return {"folder": os.path.join(trainer.output_folder, "validation")}


def resample_next_stage(
    root: str, dataset: str, configuration: str, following: str, logits: dict[str, str], out: str
) -> Any:
    """Logits (.npy, by case) of a configuration as label maps on the grid of the following one."""
    import numpy as np
    import torch
    from nnunetv2.inference.export_prediction import resample_and_save
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    trainer, target = _trainer(root, dataset, configuration), _trainer(root, dataset, following)
    os.makedirs(out, exist_ok=True)
    for name, file in logits.items():
        _, _, _, properties = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder, [name]).load_case(name)
        data, _, _, _ = nnUNetDatasetBlosc2(target.preprocessed_dataset_folder, [name]).load_case(name)
        resample_and_save(
            torch.from_numpy(np.load(file)),
            list(data.shape[1:]),
            os.path.join(out, name),
            trainer.plans_manager,
            trainer.configuration_manager,
            properties,
            trainer.dataset_json,
            1,
            nnUNetDatasetBlosc2,
        )
    return {}


def continue_training(root: str, dataset: str, configuration: str, checkpoint: str, iterations: int) -> Any:
    """One epoch of nnU-Net's trainer from a checkpoint; says what it loaded and what it did."""
    import torch

    trainer = _trainer(root, dataset, configuration)
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = iterations, 2
    trainer.initialize()
    trainer.load_checkpoint(checkpoint)
    began = trainer.current_epoch
    trainer.num_epochs = began + 1
    network = trainer.network
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    momenta = saved["optimizer_state"]["state"]
    parameters = dict(network.named_parameters())
    loaded = {
        "epoch": began,
        "parameters": list(parameters),
        "without_momentum": [name for index, name in enumerate(parameters) if index not in momenta],
        "momenta_loaded": all(
            torch.equal(trainer.optimizer.state[parameter]["momentum_buffer"], momenta[index]["momentum_buffer"])
            for index, parameter in enumerate(parameters.values())
            if index in momenta
        ),
    }
    trainer.run_training()
    log = trainer.logger.get_checkpoint()
    final = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    return {
        **loaded,
        "epoch_after": torch.load(final, map_location="cpu", weights_only=False)["current_epoch"],
        "train_losses": [float(value) for value in log["train_losses"]],
        "final": final,
    }


COMMANDS: dict[str, Any] = {
    f.__name__: f
    for f in (plan_and_preprocess, plan, verify, dump, predict, validate, resample_next_stage, continue_training)
}

if __name__ == "__main__":
    command, where, arguments = sys.argv[1:]
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = os.path.join(where, kind)
    import torch

    torch.set_num_threads(1)
    answer = COMMANDS[command](where, **json.loads(arguments))
    print()
    print(json.dumps(answer))
