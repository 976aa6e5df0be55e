"""Learning rates of encoder and decoder keep their ratio, which nnU-Net's own scheduler loses."""
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.peers import require_peer

require_peer("torch")

from engine.batches import Batch
from engine.fine_tuning import ENCODER_FACTOR, LEARNING_RATE, MOST_EPOCHS
from engine.parameter_groups import parameter_groups
from engine.schedule import Schedule
from engine.training import Trainer
from engine.training_checkpoint import LATEST, read_state
from tests.support.tiny_training import SCHEDULE, tiny_setup

FINE = Schedule(
    epochs=MOST_EPOCHS,
    iterations=3,
    validation_iterations=1,
    learning_rate=LEARNING_RATE,
    encoder_factor=ENCODER_FACTOR,
)


class Watched(Trainer):
    """Notes the rates of each step."""

    rates: list[tuple[float, ...]]

    def step(self, batch: Batch) -> float:
        self.rates.append(tuple(group["lr"] for group in self.optimizer.param_groups))
        return super().step(batch)


def watched(root: Path, folder: Path, schedule: Schedule) -> Watched:
    trainer = Watched(tiny_setup(root, schedule=schedule), folder)
    trainer.rates = []
    return trainer


@pytest.mark.requirement("ART-21")
def test_the_groups_keep_their_ratio_at_every_step_while_the_rate_falls(tmp_path: Path) -> None:
    trainer = watched(tmp_path, tmp_path / "fold_0", FINE)
    assert trainer.run()
    assert len(trainer.rates) == FINE.epochs * FINE.iterations
    for encoder, decoder in trainer.rates:
        assert encoder == pytest.approx(ENCODER_FACTOR * decoder, rel=1e-12)
    decoders = [decoder for _, decoder in trainer.rates]
    assert decoders[0] == LEARNING_RATE
    expected = [LEARNING_RATE * (1 - epoch / 10) ** 0.9 for epoch in range(10) for _ in range(3)]
    assert decoders == pytest.approx(expected, rel=1e-12)
    assert [record.learning_rate for record in trainer.records] == pytest.approx(expected[::3], rel=1e-12)


def test_the_ratio_outlives_a_stop(tmp_path: Path) -> None:
    calls = iter(range(100))
    assert not watched(tmp_path, tmp_path / "fold_0", FINE).run(stop=lambda: next(calls) == 5)
    assert [group["factor"] for group in read_state(tmp_path / "fold_0" / LATEST).optimizer["param_groups"]] == [
        ENCODER_FACTOR,
        1.0,
    ]
    resumed = watched(tmp_path, tmp_path / "fold_0", FINE)
    assert resumed.run()
    assert all(encoder == pytest.approx(ENCODER_FACTOR * decoder) for encoder, decoder in resumed.rates)


def test_every_parameter_is_in_one_group_and_the_encoder_alone_in_the_first(tmp_path: Path) -> None:
    network = Trainer(tiny_setup(tmp_path), tmp_path / "fold_0").network
    slow, fast = (group["params"] for group in parameter_groups(network, FINE))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)] for p in slow} == {name for name in names.values() if name.startswith("encoder.")}
    assert len(slow) + len(fast) == len(names) == len({id(p) for p in (*slow, *fast)})


def test_an_ordinary_training_has_one_group_as_nnunet_has(tmp_path: Path) -> None:
    trainer = watched(tmp_path, tmp_path / "fold_0", SCHEDULE)
    (group,) = trainer.optimizer.param_groups
    assert "factor" not in group
    assert trainer.run()
    assert trainer.rates[0] == (SCHEDULE.learning_rate,)
