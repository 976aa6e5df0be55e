"""Options of `seggate predict`: those of nnUNetv2_predict by its names, and ours (docs/predict.md)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from gateway.command_options import DEFAULT_CONFIG, Config

_SEVERAL = frozenset({"-i", "--input", "-f"})


class NnUNetCommand(TyperCommand):
    """Takes `-f 0 1 2` as nnU-Net does: options that may be repeated take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(words: Iterable[str]) -> list[str]:
    """`-f 0 1` → `-f 0 -f 1`, for the options that take several values."""
    result: list[str] = []
    repeated = ""
    values = 0
    for word in words:
        if word.startswith("-") and len(word) > 1:
            repeated, values = (word if word in _SEVERAL else ""), 0
        else:
            values += 1
            if repeated and values > 1:
                result.append(repeated)
        result.append(word)
    return result


def predict(
    inputs: Annotated[
        list[Path],
        typer.Option(
            "-i",
            "--input",
            help="A folder with CASE_0000.nii.gz (one file per channel) or DICOM series, or one or more files.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results; made if it is absent.")],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="A bundle (folder or zip), a result folder of nnU-Net (or its zip or checkpoint), or the name of a "
            "registered model: NAME serves now, NAME:1.2.0 is that version.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("-d", help="nnU-Net's dataset, number or name, below nnUNet_results. Needs -c.")
    ] = None,
    configuration: Annotated[
        list[str] | None, typer.Option("-c", help="Configuration, e.g. 3d_fullres; may be repeated with -m.")
    ] = None,
    plans: Annotated[str | None, typer.Option("-p", help="Plans, with -d. Default: nnUNetPlans.")] = None,
    trainer: Annotated[str | None, typer.Option("-tr", help="Trainer, with -d. Default: nnUNetTrainer.")] = None,
    folds: Annotated[
        list[str] | None,
        typer.Option("-f", help="Folds, e.g. -f 0 1 2 or -f all. Default: all of a bundle, 0 to 4 of a result folder."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("-chk", help="File name of the checkpoints of a result folder. Default: checkpoint_final.pth."),
    ] = None,
    step_size: Annotated[
        float | None,
        typer.Option("-step_size", min=0.05, max=1.0, help="Step of the window. Default: the model's, 0.5 as a rule."),
    ] = None,
    disable_tta: Annotated[bool, typer.Option("--disable_tta", help="No mirrored passes: faster, less exact.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Share of the voxels that may change for speed, e.g. 0.001: half precision is tried, too, and what it "
            "costs is measured once and told."
        ),
    ] = None,
    save_probabilities: Annotated[
        bool,
        typer.Option("--save_probabilities", help="Also CASE.npz with all classes, and CASE.properties.json."),
    ] = False,
    continue_prediction: Annotated[
        bool, typer.Option("--continue_prediction", "--c", help="Leave cases whose results are there as they are.")
    ] = False,
    npp: Annotated[
        int, typer.Option("-npp", min=1, max=64, help="Cases read ahead, each by a thread, where memory allows.")
    ] = 1,
    nps: Annotated[
        int, typer.Option("-nps", min=1, max=64, help="Threads that write; as many results may wait for them.")
    ] = 1,
    previous: Annotated[
        Path | None, typer.Option("-prev_stage_predictions", help="Refused: a cascade runs its first stage itself.")
    ] = None,
    num_parts: Annotated[
        int, typer.Option("-num_parts", min=1, help="The cases are divided between so many calls.")
    ] = 1,
    part_id: Annotated[int, typer.Option("-part_id", min=0, help="Which of the calls this is, from 0 on.")] = 0,
    device: Annotated[str, typer.Option("-device", help="auto, cpu or cuda.")] = "auto",
    not_on_device: Annotated[
        bool, typer.Option("--not_on_device", help="Refused: results are always gathered in main memory.")
    ] = False,
    disable_progress_bar: Annotated[bool, typer.Option("--disable_progress_bar", help="No bar.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for each case, and what was chosen.")] = False,
    output_format: Annotated[
        Literal["nifti", "seg", "both"],
        typer.Option("--format", help="nifti, seg (DICOM Segmentation, for DICOM input) or both."),
    ] = "nifti",
    seg_encoding: Annotated[
        Literal["BINARY", "LABELMAP"], typer.Option("--seg-encoding", help="BINARY or LABELMAP.")
    ] = "BINARY",
    name: Annotated[str | None, typer.Option("--name", help="Name of the results, for one case.")] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            help="Voxel order of the training images, e.g. RAS or LPS, where the model does not say it: images are "
            "turned to it and results back. DICOM needs it; files are taken as stored without it."
        ),
    ] = None,
    postprocessing: Annotated[
        bool | None,
        typer.Option(
            "--postprocessing/--no-postprocessing",
            help="Apply the model's post-processing. Default: of a bundle; not of nnU-Net's, as nnUNetv2_predict.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the networks. Default: all cores.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where converted models are kept. Default: ~/.cache/seggate/bundles.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document a line: one for each case, a summary at the end.")
    ] = False,
) -> None:
    """Predict files: nnU-Net's folders, NIfTI or DICOM in, NIfTI or DICOM Segmentation out; a drop-in for
    nnUNetv2_predict. Exit code 1 when a case failed; the others are predicted."""
    from gateway.commands import predict as command
    from gateway.prediction.request import PredictRequest

    request = PredictRequest(
        inputs=tuple(inputs),
        output=output,
        model=model,
        dataset=dataset,
        configurations=tuple(configuration or ()),
        plans=plans,
        trainer=trainer,
        folds=tuple(folds or ()),
        checkpoint=checkpoint,
        orientation=orientation,
        postprocessing=postprocessing,
        step_size=step_size,
        mirroring=not disable_tta,
        tolerance=tolerance,
        device=device,
        threads=threads,
        format=output_format,
        seg_encoding=seg_encoding,
        name=name,
        save_probabilities=save_probabilities,
        continue_prediction=continue_prediction,
        ahead=npp,
        writers=nps,
        num_parts=num_parts,
        part_id=part_id,
        previous_stage_predictions=previous,
        not_on_device=not_on_device,
        config=config,
        cache=cache,
        verbose=verbose,
        quiet=disable_progress_bar,
    )
    raise typer.Exit(command.predict(request, as_json=as_json))
