"""One life of a process with a durable workflow of two steps, for tests of gateway/durable.py.

    python -m tests.support.durable_life URL EXECUTOR FOLDER WORKFLOW_ID [--die] [--recover EXECUTOR]
        [--stop-in wait|step]

Each step writes a line to FOLDER/lines. With --die the process ends by kill -9 between the steps, with --stop-in it
stops in order during an hour's wait between them, or during a step that lasts longer than it is waited for. Otherwise
it ends once the workflow has, or at once where it has ended already.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

from dbos import DBOS

from gateway import durable
from storage.database import Database
from tests.support.waiting import wait_until

QUEUE, WORKFLOW = "probe-queue", "probe"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("executor")
    parser.add_argument("folder", type=Path)
    parser.add_argument("workflow_id")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--recover", default="")
    parser.add_argument("--stop-in", choices=("wait", "step"))
    options = parser.parse_args()
    lines = options.folder / "lines"

    def note(what: str) -> str:
        with lines.open("a") as file:
            file.write(f"{what} {options.executor}\n")
        return what

    stopped = threading.Event()

    def outlast(what: str) -> str:
        note(what)
        stopped.wait()
        return what

    database = Database(options.url)
    execution = durable.Execution(drain_s=1)
    durable.configure(database, executor_id=options.executor)

    @DBOS.workflow(name=WORKFLOW)
    def probe(argument: str) -> dict[str, object]:
        first = execution.step("first", outlast if options.stop_in == "step" else note, f"first {argument}")
        if options.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if options.stop_in == "wait":
            execution.wait(3600)
        second = execution.step("second", note, f"second {argument}")
        return {"steps": [first, second], "retry_in_s": None}

    durable.launch(queues=[(QUEUE, 1)], poll_s=0.05)
    if options.recover:
        print(durable.recover(options.recover), durable.recover(options.recover))
    if options.stop_in:
        wait_until(lambda: lines.exists(), "the first step has run or runs")
        execution.stop()
        stopped.set()
        database.close()
        return
    enqueuer = durable.Enqueuer(database)
    wait_until(lambda: enqueuer.ended([options.workflow_id]), "the workflow has ended")
    print(enqueuer.ended([options.workflow_id])[options.workflow_id])
    enqueuer.close()
    execution.stop()
    database.close()


if __name__ == "__main__":
    main()
