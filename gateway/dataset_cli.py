"""Options of `seggate dataset`: check, convert, exclude."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway.command_options import Json
from gateway.training_cli import DatasetName, Preprocessed, Processes, Results

dataset = typer.Typer(help="Training datasets in nnU-Net's format.", no_args_is_help=True, rich_markup_mode=None)


@dataset.command("check")
def dataset_check(
    folder: Annotated[Path, typer.Argument(help="A dataset in nnU-Net's format: DatasetNNN_Name.")],
    dataset_name: DatasetName = None,
    preprocessed: Preprocessed = Path("preprocessed"),
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Read every image and label map and name all that is wrong, with its cause and what to do."""
    from gateway.commands import dataset as command

    raise typer.Exit(
        command.check(
            folder, dataset_name=dataset_name, preprocessed=preprocessed, processes=processes, as_json=as_json
        )
    )


@dataset.command("convert")
def dataset_convert(
    source: Annotated[
        Path, typer.Argument(help="Folder with DICOM series and labels, searched with all folders below it.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DATASET", help="The dataset to be made: DatasetNNN_Name.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PATTERN|...]",
            help="A label, and the segments or ROIs that it is made of; may be repeated: values are 1, 2, ... in this "
            "order. Default: every name that is found, sorted.",
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="The same as a JSON file, instead of --label.")] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=MODALITY[:DESCRIPTION]]",
            help="A channel and the series that it takes, e.g. FLAIR=MR:*flair*; may be repeated, in the order of the "
            "channels. Default: one channel, called by its modality.",
        ),
    ] = None,
    cases: Annotated[
        Path | None, typer.Option(help="CSV or JSON file that says which series and labels make a case.")
    ] = None,
    nifti: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Names of NIfTI label maps in SOURCE, e.g. '*_seg.nii.gz'."),
    ] = None,
    overlap: Annotated[
        Literal["refuse", "first", "last"],
        typer.Option(help="Voxels of two labels: an error, or the label listed first or last gets them."),
    ] = "refuse",
    ignore_references: Annotated[
        bool,
        typer.Option(
            "--ignore-references",
            help="Take labels of another frame of reference or PatientID, or that name absent images, by coordinates.",
        ),
    ] = False,
    between_slices: Annotated[
        Literal["refuse", "nearest"],
        typer.Option(help="Contours between two slices: an error, or taken for the nearest slice's."),
    ] = "refuse",
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Share from which on a voxel of a FRACTIONAL segment counts.")
    ] = 0.5,
    orientation: Annotated[
        str, typer.Option(help="Voxel order of all cases: patient directions in which x, y and z grow.")
    ] = "LPS",
    skip_faulty: Annotated[
        bool, typer.Option("--skip-faulty", help="Finish the dataset without the cases that have errors.")
    ] = False,
    identities: Annotated[
        Path | None,
        typer.Option(help="Private file: which case is whose. Default: DATASET.identities.json beside the dataset."),
    ] = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Make a dataset from DICOM series and their SEG, RTSTRUCT or NIfTI labels, under pseudonyms, resumably."""
    from gateway.commands import dataset_convert as command

    raise typer.Exit(
        command.convert(
            source,
            folder,
            words=label or (),
            labels=labels,
            channels=channel or (),
            cases=cases,
            nifti=nifti,
            overlap=overlap,
            between=between_slices,
            ignores_references=ignore_references,
            threshold=threshold,
            orientation=orientation,
            skip_faulty=skip_faulty,
            identities=identities,
            processes=processes,
            as_json=as_json,
        )
    )


@dataset.command("exclude")
def dataset_exclude(
    case: Annotated[str, typer.Argument(help="Name of the case, as in imagesTr.")],
    folder: Annotated[
        Path, typer.Argument(metavar="[DATASET]", help="The dataset, DatasetNNN_Name. Default: this folder.")
    ] = Path("."),
    reason: Annotated[str | None, typer.Option(help="Why; kept with the dataset. Nothing about the patient.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Use the case again.")] = False,
    dataset_name: DatasetName = None,
    preprocessed: Preprocessed = Path("preprocessed"),
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Use a case no more, and list the models and bundles that were trained on it. Its files stay."""
    from gateway.commands import dataset as command

    options = command.ExcludeOptions(
        case=case,
        folder=folder,
        reason=reason,
        undo=undo,
        dataset_name=dataset_name,
        preprocessed=preprocessed,
        results=results,
    )
    raise typer.Exit(command.exclude_case(options, as_json=as_json))
