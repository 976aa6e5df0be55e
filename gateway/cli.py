"""`seggate …`: the command line. Each command's module is loaded only when the command runs.

Exit codes: 0 done, 1 not done (the message says why), 2 wrong usage or configuration.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gateway.command_options import DEFAULT_CONFIG, Config, Json
from gateway.corrections_cli import corrections
from gateway.dataset_cli import dataset
from gateway.deletion_cli import delete, keep, retention
from gateway.fine_tuning_cli import train_fine_tune
from gateway.learning_cli import learn
from gateway.models_cli import models
from gateway.monitoring_cli import canary, models_pause, models_resume, tasks
from gateway.predict_cli import NnUNetCommand, predict
from gateway.training_cli import evaluate, export, plan, select, train

app = typer.Typer(
    name="seggate",
    help="Brings an nnU-Net model into the hospital network and keeps it honest there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
config = typer.Typer(help="Look at the configuration.", no_args_is_help=True, rich_markup_mode=None)
audit = typer.Typer(help="Look at the ledger as evidence.", no_args_is_help=True, rich_markup_mode=None)
schedule = typer.Typer(help="Jobs that recur.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models")
app.add_typer(tasks, name="tasks")
app.add_typer(audit, name="audit")
app.add_typer(schedule, name="schedule")
app.add_typer(config, name="config")


@app.command()
def serve(
    config: Config = DEFAULT_CONFIG,
    roles: Annotated[
        str, typer.Option(help="Comma-separated: receiver, worker, delivery, scheduler, web. Default: all.")
    ] = "receiver,worker,delivery,scheduler,web",
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C: receive, segment, deliver, report."""
    from gateway.commands import serve as command

    raise typer.Exit(command.serve(config, roles))


@app.command()
def demo(
    study: Annotated[
        Path | None, typer.Option(help="A folder of DICOM files to send instead of the synthetic study.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    state: Annotated[Path, typer.Option(help="Folder for the demo's state; emptied at start.")] = Path("demo-state"),
    pacs: Annotated[
        Literal["orthanc", "embedded"] | None,
        typer.Option(help="The PACS: Orthanc, or a small archive of ours. Default: Orthanc where it is installed."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(help="Give up after so many seconds.")] = 300,
    as_json: Json = False,
) -> None:
    """Show the whole path on this machine: C-STORE in, segmentation in a PACS, report in an EMR."""
    from gateway.commands import demo as command

    raise typer.Exit(command.demo(study=study, keep=keep, state=state, pacs=pacs, timeout_s=timeout_s, as_json=as_json))


@app.command()
def check(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Test configuration, disk, clock, ports, models and every destination; print what the others must enter."""
    from gateway.commands import check as command

    raise typer.Exit(command.check(config, as_json=as_json))


@app.command()
def send(
    path: Annotated[Path, typer.Argument(help="A folder (searched) or a file.", exists=True)],
    to: Annotated[str, typer.Option("--to", help="The receiver, as AE@host:port.")],
    calling_ae: Annotated[str, typer.Option("--from", help="Our AE title.")] = "SEGGATE-SCU",
    as_json: Json = False,
) -> None:
    """Send DICOM files by C-STORE, unchanged; names each file that cannot be sent and sends the rest."""
    from gateway.commands import send as command

    raise typer.Exit(command.send(path, to=to, calling_ae=calling_ae, as_json=as_json))


@app.command()
def studies(
    config: Config = DEFAULT_CONFIG,
    state: Annotated[str | None, typer.Option(help="Only studies in this state, e.g. failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List studies with their state."""
    from gateway.commands import studies as command

    raise typer.Exit(command.studies(config, state=state, limit=limit, as_json=as_json))


@app.command()
def show(
    study: Annotated[str, typer.Argument(help="Study Instance UID, or the beginning of it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Show the ledger of a study: every event with its evidence, every rule with what was true."""
    from gateway.commands import studies as command

    raise typer.Exit(command.show(config, study, as_json=as_json))


@app.command()
def retry(
    study: Annotated[str | None, typer.Argument(help="Study Instance UID, or the beginning of it.")] = None,
    all_parked: Annotated[bool, typer.Option("--all", help="Every study in which something is parked.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Put parked work back on its queue, from where it stopped; route an unmatched study by the rules of today."""
    from gateway.commands import studies as command

    raise typer.Exit(command.retry(config, study, all_parked=all_parked, as_json=as_json))


@app.command()
def release(
    study: Annotated[str, typer.Argument(help="Study Instance UID, or the beginning of it.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name: nothing about the patient.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Take a study out of quarantine: what came first stays in use, what differs from it stays aside."""
    from gateway.commands import studies as command

    raise typer.Exit(command.release(config, study, reason=reason, as_json=as_json))


@app.command()
def withhold(
    destination: Annotated[str, typer.Argument(help="A name of destinations.toml, also one that was taken out of it.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name: nothing about the patient.")],
    study: Annotated[str | None, typer.Option(help="Only this study: its UID, or the beginning of it.")] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Give up for good what is parked for a destination: it is not sent there any more, and retry leaves it alone."""
    from gateway.commands import studies as command

    raise typer.Exit(command.withhold(config, destination, reason=reason, study=study, as_json=as_json))


@app.command()
def complete(
    study: Annotated[str, typer.Argument(help="Study Instance UID, or the beginning of it.")],
    wait: Annotated[bool, typer.Option("--wait", help="The opposite: wait, whatever the rules say.")] = False,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Declare a study whole now (or, with --wait, keep it open until this is called again)."""
    from gateway.commands import studies as command

    raise typer.Exit(command.complete(config, study, wait=wait, as_json=as_json))


@app.command()
def alarms(
    config: Config = DEFAULT_CONFIG,
    clear: Annotated[int | None, typer.Option(help="Clear the alarm with this number.")] = None,
    acknowledge: Annotated[int | None, typer.Option(help="This one is open and quiet. Needs --reason.")] = None,
    snooze: Annotated[int | None, typer.Option(help="This one is quiet for a while. Needs --for and --reason.")] = None,
    quiet_for: Annotated[str | None, typer.Option("--for", help="How long, with --snooze: 30m, 12h or 7d.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; the ledger keeps it with who said it.")] = None,
    as_json: Json = False,
) -> None:
    """List open alarms: what a person must look at; clear, acknowledge or snooze one."""
    from gateway.commands import alarms as command

    chosen = [number for number in (clear, acknowledge, snooze) if number is not None]
    if len(chosen) > 1 or (snooze is None) != (quiet_for is None):
        raise typer.BadParameter("one of --clear, --acknowledge and --snooze at a time; --snooze and --for go together")
    if clear is None and chosen:
        raise typer.Exit(command.take_on_alarm(config, chosen[0], reason=reason, quiet_for=quiet_for))
    raise typer.Exit(command.alarms(config, clear=clear, as_json=as_json))


@app.command()
def drift(
    model: Annotated[str | None, typer.Argument(help="A model's name. Default: every model that has served.")] = None,
    config: Config = DEFAULT_CONFIG,
    raise_alarms: Annotated[
        bool, typer.Option("--alarms", help="Raise and clear alarms too, as the scheduler does.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a PNG of what has drifted: both distributions. Needs MODEL.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare each model's latest studies with its first, and with what it was trained on."""
    from gateway.commands import drift as command

    raise typer.Exit(command.drift(config, model, raise_alarms=raise_alarms, plot=plot, as_json=as_json))


@schedule.command("list")
def schedule_list(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """List the jobs that recur, with their cron lines and when they are due."""
    from gateway.commands import schedule as command

    raise typer.Exit(command.list_jobs(config, as_json=as_json))


@schedule.command("run")
def schedule_run(
    job: Annotated[str, typer.Argument(help="A job's name, as `schedule list` has it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Start a run of a job now, in a worker, whatever its cron line says."""
    from gateway.commands import schedule as command

    raise typer.Exit(command.run_job(config, job, as_json=as_json))


@audit.command("verify")
def audit_verify(
    subject: Annotated[
        str | None, typer.Argument(help="study:UID, model:NAME or gateway. Default: every chain of the ledger.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Check the hash chains of the ledger: an event that was changed, removed from between, or reordered is named."""
    from gateway.commands import audit as command

    raise typer.Exit(command.verify(config, subject, as_json=as_json))


@config.command("show")
def config_show(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Print the settings in force, the files they are from and what the environment sets; secrets stay hidden."""
    from gateway.commands import config as command

    raise typer.Exit(command.show(config, as_json=as_json))


app.command()(canary)
app.command(cls=NnUNetCommand)(predict)
models.command("pause")(models_pause)
models.command("resume")(models_resume)
app.add_typer(dataset, name="dataset")
train.command("fine-tune")(train_fine_tune)
app.add_typer(train, name="train")
app.add_typer(corrections, name="corrections")
app.add_typer(learn, name="learn")
for command in (retention, delete, keep, plan, evaluate, select, export):
    app.command()(command)


def main() -> None:
    """Entry of the console script."""
    if "WORLD_SIZE" not in os.environ:
        _run()
        return
    from gateway.training_launcher import leaves_at_once

    with leaves_at_once():
        _run()


def _run() -> None:
    from gateway.settings_invalid import SettingsInvalid
    from storage.errors import StorageError

    if sys.argv[1:2] != ["predict"]:  # it must start fast, and calls this itself where something may log
        from gateway.logs import keep_off_standard_output

        keep_off_standard_output()
    try:
        app()
    except SettingsInvalid as error:
        sys.stderr.write(f"seggate: {error}\n")
        sys.exit(2)
    except StorageError as error:
        sys.stderr.write(f"seggate: {error}\n")
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        sys.stderr.write(f"seggate: {what}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
