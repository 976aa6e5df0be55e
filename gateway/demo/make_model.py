"""Makes the demo model's bundle again: `python -m gateway.demo.make_model PATH`.

PATH is the folder with nnU-Net's result folders of the hippocampus dataset. The bundle goes to gateway/demo/model,
which must not exist; the same input gives the same bytes but for the times in backends.json. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import EngineError
from engine.model_card import read_card

HERE = Path(__file__).resolve().parent
CARD = HERE / "hippocampus-mr.toml"
MODEL = HERE / "model"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when the bundle was written, 1 when the import was refused; the reason goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m gateway.demo.make_model", description="Make the demo model.")
    parser.add_argument("path", type=Path, help="folder with the result folders of nnU-Net v2, or one of them")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to make (default: %(default)s)")
    parser.add_argument("--no-phantoms", action="store_true", help="leave the sanity cases out, which take a minute")
    chosen = parser.parse_args(arguments)
    # Here, so that the paths of this module can be used where torch is not installed.
    from engine.export import import_model

    try:
        bundle = import_model(
            chosen.path,
            chosen.out,
            card=read_card(CARD),
            configurations=["3d_fullres"],
            phantoms=not chosen.no_phantoms,
            progress=lambda share, text: print(f"{share:4.0%}  {text}"),  # noqa: T201 - a command's output
            notice=lambda text: print(f"note: {text}"),  # noqa: T201
        )
    except EngineError as exc:
        print(f"refused: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{bundle.name} {bundle.semver}, weights {bundle.weights_digest}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
