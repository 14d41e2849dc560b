from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from command_line import SMALL, composed
from hypothesis import given
from hypothesis import strategies as st
from plain import QUIET, make_module, make_stream, weights
from torch import nn

from clkit import ConfigurationError, StreamCheckpoint, StreamDataModule
from clkit.evaluation.connectivity import line
from clkit.metrics.connectivity_file import Line, read_lines, write_lines
from clkit.metrics.history import History
from clkit.report import write_report
from clkit.report.tables import path_table
from clkit.run.checkpoint import checkpoints, experience_ends, latest_checkpoint
from clkit.run.cli import main
from clkit.run.connect import connect
from clkit.run.train import run
from clkit.strategies import InterpolatedLoRA


class Quadratic(pl.LightningModule):
    """The loss of a batch of points: mean of ``curvature * (w - point)**2``, known in closed form on any line."""

    def __init__(self, curvature=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.curvature = curvature

    def training_step(self, batch):
        loss = self.curvature * (self.w - batch[0]).square().sum(dim=1).mean()
        self.log("loss", loss)
        return loss


def distance(module, batch):
    return (module.w - batch[0]).square().sum(dim=1)


def test_a_quadratic_loss_is_its_closed_form():
    points = {"a": torch.randn(5, 2), "b": torch.randn(3, 2)}
    data = {name: [(part,) for part in x.split(2)] for name, x in points.items()}
    start, end = torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 0.5])
    found = line(Quadratic(), {"w": start}, {"w": end}, data, points=5, score=distance)
    assert found.mu.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for k, x in enumerate(points.values()):
        # |u + mu d|^2 with u from the points to the start and d along the line
        u, d = start - x, end - start
        closed = [((u * u).sum(1).mean() + 2 * mu * (u @ d).mean() + mu**2 * d @ d).item() for mu in found.mu]
        assert found.loss[:, k].tolist() == pytest.approx(closed, rel=1e-5)
        assert found.score[:, k].tolist() == pytest.approx(closed, rel=1e-5)
    assert found.loss_barrier.tolist() == [0, 0]
    # the score is a convex function, so it falls below its chord, by |d|^2 / 4 in the middle
    assert found.score_barrier.tolist() == pytest.approx([(d @ d).item() / 4] * 2, rel=1e-4)


def test_the_barrier_of_a_concave_loss_is_known_too():
    data = {"a": [(torch.zeros(1, 2),)]}
    ends = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([-1.0, 2.0])}
    found = line(Quadratic(-1.0), *ends, data, score=None)
    assert found.loss_barrier.tolist() == pytest.approx([8 / 4])
    assert np.isnan(found.score).all()
    assert np.isnan(found.score_barrier).all()


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_a_barrier_is_the_largest_height_above_the_chord(values):
    mu = np.linspace(0, 1, len(values))
    found = Line("a", "b", ("E",), mu, np.array(values)[:, None], np.full((len(values), 1), np.nan))
    heights = [value - ((1 - m) * values[0] + m * values[-1]) for m, value in zip(mu[1:-1], values[1:-1], strict=True)]
    assert found.loss_barrier[0] == pytest.approx(max([0.0, *heights]))


def noisy():
    module = make_module()
    module.net.insert(2, nn.BatchNorm1d(16))
    module.net.insert(3, nn.Dropout(0.5))
    return module


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_the_ends_are_exact_and_the_module_and_the_random_numbers_stay_as_they_are():
    module, other = noisy(), noisy()
    with torch.no_grad():
        for tensor in [*module.parameters(), *other.parameters()]:
            tensor.add_(torch.randn_like(tensor))
        other.net[2].running_mean += 1
        other.net[2].num_batches_tracked += 7
    module.net[3].eval()
    before, modes = state(module), [layer.training for layer in module.modules()]
    random = torch.get_rng_state()
    seen = []

    def score(module, batch):
        seen.append(state(module))
        assert not any(layer.training for layer in module.modules())
        return (module(batch[0]).argmax(1) == batch[1]).float()

    batch = make_stream(1)[0].test.batch(torch.arange(20))
    found = line(module, before, state(other), {"E0": [batch]}, points=3, score=score)
    assert all(torch.equal(seen[0][name], value) for name, value in before.items() if value.is_floating_point())
    assert all(torch.equal(seen[2][name], value) for name, value in other.state_dict().items())
    assert seen[1]["net.2.num_batches_tracked"] == 7
    torch.testing.assert_close(seen[1]["net.1.weight"], (before["net.1.weight"] + other.net[1].weight) / 2)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [layer.training for layer in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(other.eval()(batch[0]), batch[1]).item()
    assert found.loss[-1, 0] == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [{"w": torch.zeros(3)}, {"v": torch.zeros(2)}, {}])
def test_weights_of_another_network_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="'start' do not fit Quadratic: "):
        line(Quadratic(), wrong, {"w": torch.zeros(2)}, {})


def test_a_line_has_at_least_two_points():
    with pytest.raises(ConfigurationError, match="points=1"):
        line(Quadratic(), {}, {}, {}, points=1)


def test_lines_are_written_and_read(tmp_path):
    mu = np.linspace(0, 1, 3)
    some = [
        Line("a", "b", ("x, y", "z"), mu, np.random.rand(3, 2), np.random.rand(3, 2)),
        Line("b", "c", ("x, y",), mu, np.random.rand(3, 1), np.full((3, 1), np.nan)),
    ]
    write_lines(tmp_path / "lines.csv", some)
    for there, here in zip(some, read_lines(tmp_path / "lines.csv"), strict=True):
        assert (there.start, there.end, there.experiences) == (here.start, here.end, here.experiences)
        for name in ("mu", "loss", "score"):
            np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
    table = pd.read_csv(tmp_path / "lines.csv")
    assert list(table) == ["start", "end", "mu", "experience", "loss", "score"]
    (tmp_path / "lines.csv").write_text("start,end\na,b\n")
    with pytest.raises(ConfigurationError, match="clkit connect"):
        read_lines(tmp_path / "lines.csv")


def test_falls_on_the_line_beside_those_in_training():
    scores = np.array([[0.9, np.nan], [0.3, 0.5], [0.8, 0.9]])
    history = History(np.array([1, 2, 3]), np.array([0, 1, 1]), np.array(["step"] * 3), scores)
    score = np.array([[0.9, 0.1], [0.85, 0.5], [0.88, 0.9]])
    found = Line("a", "b", ("a", "b"), np.linspace(0, 1, 3), np.zeros((3, 2)), score)
    assert path_table([found], history).rows == (("a → b", "5.0", "5.0", "60.0", "60.0"),)


def fit(folder, strategies=(), ckpt_path=None):
    data = StreamDataModule(make_stream(), batch_size=8, epochs=2)
    ends = []

    class Ends(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            ends.append(state(module))

    checkpoint = StreamCheckpoint(folder, every_n_steps=4, keep_ends=True)
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": data.total_epochs}
    trainer = pl.Trainer(callbacks=[*strategies, Ends(), checkpoint], **settings)
    module = make_module()
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, ends


def test_the_weights_of_each_experiences_end_are_kept_and_nothing_else(tmp_path):
    module, ends = fit(tmp_path, [InterpolatedLoRA()])
    assert [path.name for path in experience_ends(tmp_path)] == [f"end={k:03d}.ckpt" for k in range(3)]
    assert [path.name for path in checkpoints(tmp_path)] == ["step=000000030.ckpt", "step=000000028.ckpt"]
    assert latest_checkpoint(tmp_path).name == "step=000000030.ckpt"
    for path, expected in zip(experience_ends(tmp_path), ends, strict=True):
        content = torch.load(path, weights_only=True)
        assert not {"optimizer_states", "callbacks"} & set(content)
        assert all(torch.equal(value, expected[name]) for name, value in content["state_dict"].items())
    # the fast learner's, although the slow one is in the module at the end
    assert not torch.equal(weights(module), torch.cat([value.flatten() for value in ends[-1].values()]))


def test_ends_are_not_kept_unasked(tmp_path):
    data = StreamDataModule(make_stream(), batch_size=8)
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 3}
    pl.Trainer(callbacks=[StreamCheckpoint(tmp_path)], **settings).fit(make_module(), datamodule=data)
    assert experience_ends(tmp_path) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs of one network, with the .hydra folder that the command line makes."""
    from omegaconf import OmegaConf

    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("run")
        config = composed(*SMALL, "checkpoint.keep_ends=true", f"seed={seed}", "scenario.n_experiences=5")
        run(config, folder)
        (folder / ".hydra").mkdir(exist_ok=True)
        OmegaConf.save(config, folder / ".hydra" / "config.yaml")
        folders.append(folder)
    return folders


def test_the_lines_of_a_run_end_where_its_evaluation_ended(trained, tmp_path):
    folder = trained[0]
    lines, files = connect([folder], points=3, output=tmp_path)
    assert [path.name for path in files] == ["connectivity.csv", "connectivity.png", "connectivity.svg"]
    assert [(found.start, found.end) for found in lines] == [
        ("0-1", "2-3"),
        ("2-3", "4-5"),
        ("4-5", "6-7"),
        ("6-7", "8-9"),
    ]
    assert [len(found.experiences) for found in lines] == [2, 3, 4, 5]
    history = pd.read_csv(folder / "history.csv")
    rows = history[history.phase == "step"].groupby("experience").last()
    for k, found in enumerate(lines, start=1):
        after = rows.loc[k][[f"E{i}" for i in range(k + 1)]].tolist()
        assert found.score[-1].tolist() == pytest.approx(after)
    # one line ends where the next one starts
    np.testing.assert_array_equal(lines[0].loss[-1], lines[1].loss[0][:2])


def test_two_checkpoints_of_two_runs(trained, tmp_path):
    files = [experience_ends(folder / "checkpoints")[-1] for folder in trained]
    (found,), _ = connect(files, points=5, output=tmp_path)
    assert (found.start, found.end, len(found.experiences)) == ("end=004", "end=004", 5)
    for folder, score in zip(trained, (found.score[0], found.score[-1]), strict=True):
        final = json.loads((folder / "metrics.json").read_text())["accuracy_matrix"][-1]
        # 50 of the test samples against all of them
        assert np.abs(score - np.array(final)).max() < 0.25


def test_the_command_writes_into_the_run_and_the_report_shows_it(trained, capsys):
    folder = trained[0]
    write_report([folder])
    assert "mode connectivity" not in (folder / "report.html").read_text()
    assert main(["connect", str(folder), "--points", "3"]) == 0
    said = capsys.readouterr().out
    assert "0-1 → 2-3" in said
    assert str(folder / "connectivity.csv") in said
    write_report([folder])
    assert ': mode connectivity"' in (folder / "report.html").read_text()
    run(composed(*SMALL, "checkpoint.keep_ends=true", "seed=0", "resume=false"), folder)
    assert not list(folder.glob("connectivity.*"))


def test_mistakes_are_answered_in_a_sentence(trained, tmp_path, capsys):
    one = experience_ends(trained[1] / "checkpoints")[0]
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(one.read_bytes())
    other = tmp_path / "other.ckpt"
    content = torch.load(one, weights_only=True)
    content["state_dict"].pop("net.1.weight")
    torch.save(content, other)
    (tmp_path / "empty").mkdir()
    for paths, expected in [
        ([tmp_path / "empty"], "keep_ends=true"),
        ([alone, one], "lies in no run's folder"),
        ([one, other], "does not fit the network"),
        ([one, tmp_path / "none.ckpt"], "There is no checkpoint"),
        ([one] * 3, "Got 3 paths"),
        ([one, one, "--points=1"], "points=1"),
    ]:
        assert main(["connect", *map(str, paths)]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert len(said.splitlines()) == 1
