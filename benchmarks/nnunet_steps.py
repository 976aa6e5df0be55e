"""nnU-Net's own training steps, for benchmarks/train.py; runs in nnU-Net's environment and imports nothing of ours.

    python nnunet_steps.py RAW PREPROCESSED RESULTS PLANS CONFIGURATION THREADS

The three folders are nnU-Net's. The dataset in RAW is preprocessed with PLANS, a trainer with its own loader and
augmentation is made, and then each number of steps on the standard input is answered with one line: seconds.
"""

import json
import os
import shutil
import sys
import time


def main() -> None:
    raw, preprocessed, results, plans_file, configuration, threads = sys.argv[1:]
    os.environ.update(nnUNet_raw=raw, nnUNet_preprocessed=preprocessed, nnUNet_results=results)
    import torch
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    torch.set_num_threads(int(threads))
    answers = sys.stdout
    sys.stdout = sys.stderr  # what nnU-Net prints is no answer
    with open(plans_file) as file:
        plans = json.load(file)
    name = maybe_convert_to_dataset_name(plans["dataset_name"])
    with open(os.path.join(raw, name, "dataset.json")) as file:
        dataset_json = json.load(file)
    shutil.copy(plans_file, os.path.join(preprocessed, name, "plans.json"))
    DefaultPreprocessor(verbose=False).run(name, configuration, "plans", num_processes=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = nnUNetTrainer({**plans, "continue_training": False}, configuration, 0, dataset_json, device)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            trainer.train_step(next(trainer.dataloader_train))
        answers.write(f"{time.perf_counter() - started}\n")
        answers.flush()
    os._exit(0)  # its loaders' processes end with it


if __name__ == "__main__":
    main()
