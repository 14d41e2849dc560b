import pytest
import torch
from clkit_example import ERACE
from clkit_example.er_ace import masked_cross_entropy
from pytorch_lightning import Trainer
from torch.nn.functional import cross_entropy

from clkit import ConfigurationError, StreamDataModule
from clkit.memory.buffer import ReservoirBuffer
from clkit.testing import CHECKS, SmallModule, check_strategy, small_stream

SAMPLE = 6 * 4 + 8  # bytes of an input and a label


@pytest.mark.parametrize("check", CHECKS)
def test_it_keeps_the_promises_of_a_strategy(check):
    check_strategy(lambda: ERACE(16), only=[check], state_limit=16 * SAMPLE)


def test_the_softmax_is_over_the_given_classes():
    logits, y = torch.randn(5, 6), torch.tensor([1, 3, 3, 1, 1])
    expected = cross_entropy(logits[:, [1, 3]], torch.tensor([0, 1, 1, 0, 0]))
    torch.testing.assert_close(masked_cross_entropy(logits, y, [1, 3]), expected)


class Recording(SmallModule):
    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def test_weights_equal_those_of_a_plain_loop():
    torch.manual_seed(0)
    module = Recording()
    plain = SmallModule()
    plain.load_state_dict(module.state_dict())
    data = StreamDataModule(small_stream(), batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=data.total_epochs, callbacks=[ERACE(16)], enable_model_summary=False, **quiet)
    trainer.fit(module, datamodule=data)

    optimizer, memory = plain.configure_optimizers(), ReservoirBuffer(16)
    for step, (x, y) in enumerate(module.batches):
        seen = 2 * (1 + step // 6)  # 48 samples of two classes an experience
        present = sorted(set(y.tolist()))
        loss = cross_entropy(plain(x)[:, present], torch.tensor([present.index(label) for label in y.tolist()]))
        old = memory.sample(len(y))
        if old is not None:
            loss = loss + cross_entropy(plain(old[0])[:, :seen], old[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory.insert((x, y))
    assert len(module.batches) == 18
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight)


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        ERACE(batch_size=0)
