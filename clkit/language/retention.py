"""What is left of texts that a model read a few times, at every step of the training on others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.datamodule import stream_data
from clkit.data.hooks import Hooks
from clkit.data.loader import StreamLoader
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.schedule import Every, LogSpaced, Schedule
from clkit.evaluation.token_scores import language_model, loss_and_strength
from clkit.files import result_folder, write_atomically
from clkit.language.answers import rouge_l
from clkit.language.dataset import Pad, Sample
from clkit.language.generation import write_on
from clkit.language.models import load_tokenizer, transformers
from clkit.language.text_store import TextFiles
from clkit.method.evaluation_mode import untouched
from clkit.method.forward import to_device
from clkit.metrics.retention_file import Retention
from clkit.rng import private_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MATERIALS = ("texts", "words", "letters")
_RECALL = ("recall", "exact", "rouge")


class RetentionProbe(Hooks):
    r"""Plants texts in the training once, and follows what is left of them at every step after.

    Half of the texts, drawn from the seed, are planted: from step ``at`` on they take the place of the stream's batches
    until each has come ``exposures`` times. The other half, one foil for each, is never trained on. Measured before the
    first exposure, after each pass, and by the schedule after the last one, with :math:`\ell_s` and :math:`\ell_f` the
    mean losses of a planted text's tokens and its foil's, :math:`\ell^0` those before the first exposure:

    - ``recognition``: share of pairs with :math:`\ell_s < \ell_f`, ties half; ``corrected``: with
      :math:`\ell_s - \ell^0_s < \ell_f - \ell^0_f`, for texts that are easier than others from the start;
    - the same against other foils: ``word``, the planted text with one word exchanged for another text's; ``shuffled``,
      its words in another order; ``paraphrase``, what says the same in other words; ``natural``, where the texts are
      made of random words or letters, the foil as it was before;
    - ``margin``: mean of :math:`\sigma(\ell_f - \ell_s)`; ``drop``: mean of
      :math:`(\ell^0_s - \ell_s) - (\ell^0_f - \ell_f)`, how much more the loss of planted texts fell than their foils';
      ``loss_planted`` and ``loss_foil``;
    - ``strength``: extraction strength of the planted texts, see
      :func:`~clkit.evaluation.token_scores.loss_and_strength`;
    - ``recall_50``, ...: after a cue of so many percent of a planted text's tokens, the share of the rest that a greedy
      continuation has in the right places; ``exact_50``, ...: the share of texts that it has whole; ``rouge_50``, ...:
      :func:`~clkit.language.answers.rouge_l` of the continuation and the rest as texts. The paper's ROUGE is of the
      whole text with the cue, which gives about one half for nothing recalled.

    Writes ``retention.csv`` (a row for each measurement) whenever recall is measured, and at the end
    ``retention.json`` (what is left of each score, see
    :meth:`~clkit.metrics.retention_file.Retention.summary`, and which texts were planted); the report draws
    them. The training is what it would be on those batches, bit for bit. Planted texts do not come into strategies'
    memories, which hold what the stream gave. Put it after the strategies.

    Args:
        texts: At least two texts: a list, or a ``.txt`` (one a line), ``.jsonl`` or ``.parquet`` file.
        tokenizer: The model's, or its name or path.
        n: Number of texts to plant; half of all when ``None``.
        at: Optimizer step before which the first of them comes, from 0.
        exposures: How often each comes.
        batch_size: Planted texts in a step and process; as many as the stream's batches have when ``None``.
        every: Steps between measurements after the last exposure, or a
            :class:`~clkit.evaluation.schedule.Schedule` of those steps.
        recall_every: The same for recall, which generates.
        cues: Shares of a text that are given for recall.
        paraphrases: One for each text: a list, or the entry or column of the file that has them.
        material: What is planted: the ``"texts"``; as many ``"words"``, drawn without order from all of them; or the
            ``"letters"`` of each word, and the words, in random order.
        max_length: Most tokens of a text; longer ones are cut at the end.
        eval_batch_size: Texts in one forward of a measurement.
        dir: Folder of the files; the trainer's log or root folder when ``None``.
        seed: Seeds which texts are planted, their pairs and their order.

    Raises:
        ConfigurationError: If a number is out of range, there are too few texts, or the stream ends before all are
            planted.

    Reference: Orhan, *Recognition, recall, and retention of few-shot memories in large language models*,
    arXiv 2303.17557.
    """

    def __init__(
        self,
        texts: str | Path | Sequence[str],
        tokenizer: str | PreTrainedTokenizerBase,
        *,
        n: int | None = None,
        at: int = 0,
        exposures: int = 3,
        batch_size: int | None = None,
        every: int | Schedule | None = None,
        recall_every: int | Schedule | None = None,
        cues: Sequence[float] = (0.5,),
        paraphrases: str | Sequence[str] | None = None,
        material: str = "texts",
        max_length: int = 128,
        eval_batch_size: int = 16,
        dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        least = {"n": (n, 1), "at": (at, 0), "exposures": (exposures, 1), "batch_size": (batch_size, 1)}
        for name, (value, lowest) in {**least, "max_length": (max_length, 4)}.items():
            if value is not None:
                check_whole(name, value, lowest)
        check_whole("eval_batch_size", eval_batch_size, 1)
        for cue in cues:
            if not 0 < cue < 1:
                raise ConfigurationError(f"cues={list(cues)} is not possible; use shares above 0 and below 1.")
        if material not in MATERIALS:
            raise ConfigurationError(f"material={material!r} is unknown; use one of {', '.join(MATERIALS)}.")
        if paraphrases is not None and material != "texts":
            raise ConfigurationError(f"material={material!r} has no paraphrases; leave them out.")
        self.at, self.exposures, self.batch_size, self.seed = at, exposures, batch_size, seed
        self.every = _schedule(every, LogSpaced(10, 1.25))
        self.recall_every = _schedule(recall_every, LogSpaced(2, 2.0))
        self.cues, self.max_length, self.eval_batch_size = tuple(cues), max_length, eval_batch_size
        self._texts, self._n, self.material = _read(texts), n, material
        self._paraphrases = None if paraphrases is None else _paraphrases(texts, paraphrases, len(self._texts))
        self._tokenizer = tokenizer
        self._own_dir = None if dir is None else Path(dir)
        self.rows: list[dict[str, float]] = []
        self._before: list[float] = []
        self._last_step = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._texts)} texts, at={self.at}, exposures={self.exposures})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = stream_data(trainer)
        if trainer.accumulate_grad_batches > 1 or not pl_module.automatic_optimization:
            raise ConfigurationError(
                "RetentionProbe plants one batch in each optimizer step; set accumulate_grad_batches=1 and use "
                "automatic optimization, or leave it out."
            )
        self._dir = result_folder(trainer, self._own_dir)
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        self._set_texts(self._tokenizer)
        rng, size = private_rng(self.seed, 14), self.batch_size or data.batch_size
        rows = [torch.from_numpy(rng.permutation(len(self._planted))) for _ in range(self.exposures)]
        share: dict[str, Any] = {"rank": trainer.global_rank, "world_size": trainer.world_size, "collate_fn": Pad()}
        self._passes = [StreamLoader(_Texts(self._planted), order, size, **share) for order in rows]
        self._steps = sum(map(len, self._passes))
        if stage == "fit" and self.at + self._steps > data.total_steps:
            raise ConfigurationError(
                f"Planting {len(self._planted)} texts {self.exposures} time(s) from step {self.at} on takes "
                f"{self._steps} steps of {size}, but the stream ends after {data.total_steps}; plant fewer or earlier."
            )

    def _set_texts(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Choose which texts are planted, and make the foils of each."""
        n = len(self._texts) // 2 if self._n is None else self._n
        if n < 1 or 2 * n > len(self._texts):
            raise ConfigurationError(
                f"RetentionProbe has {len(self._texts)} texts to plant {n} and keep a foil for each; give it "
                f"{max(2 * n, 2)} or more."
            )
        rng = private_rng(self.seed, 13)
        order = rng.permutation(len(self._texts))
        self._chosen = {"planted": order[:n].tolist(), "foils": order[n : 2 * n].tolist()}
        natural = [self._texts[i].split() for i in order[: 2 * n]]
        texts = natural if self.material == "texts" else _made_of(natural, self.material, private_rng(self.seed, 18))
        planted, foils = texts[:n], texts[n:]
        exchanged = []
        for k, own in enumerate(planted):
            other = planted[(k + 1) % n] if n > 1 else foils[k]
            place = int(rng.integers(len(own)))
            fresh = [word for word in other if word != own[place]] or ["other"]
            exchanged.append([*own[:place], fresh[int(rng.integers(len(fresh)))], *own[place + 1 :]])
        kinds = {"recognition": foils, "word": exchanged}
        kinds["shuffled"] = [rng.permutation(own).tolist() for own in planted]
        if self.material != "texts":
            kinds["natural"] = natural[n:]
        if self._paraphrases is not None:
            kinds["paraphrase"] = [self._paraphrases[i].split() for i in order[:n]]
        self._planted = self._encoded(planted, tokenizer)
        self._foils = {name: self._encoded(kind, tokenizer) for name, kind in kinds.items()}

    def _encoded(self, words: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
        texts = [" ".join(own) for own in words]
        found: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        short = [text for text, tokens in zip(texts, found, strict=True) if len(tokens) < 4]
        if short:
            raise ConfigurationError(f"The text {short[0]!r} has fewer than 4 tokens; plant longer ones.")
        return [torch.tensor(tokens[: self.max_length]) for tokens in found]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        data = stream_data(trainer)
        self._last_step = data.step
        if data.step == self.at and not self.rows:
            self._measure(trainer, pl_module, exposures=0, since=0, recall=True)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        position = stream_data(trainer).step - self.at
        for loader in self._passes:
            if 0 <= position < len(loader):
                rows = loader.indices(position).tolist()
                return to_device(trainer, Pad()([_sample(self._planted[i]) for i in rows]))
            position -= len(loader)
        return batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = stream_data(trainer).step
        if step == self._last_step:
            return
        since = step - self.at - self._steps
        if since <= 0:
            ends = [sum(map(len, self._passes[: k + 1])) for k in range(self.exposures)]
            if step - self.at in ends:
                exposures = 1 + ends.index(step - self.at)
                self._measure(trainer, pl_module, exposures=exposures, since=0, recall=exposures == self.exposures)
            return
        recall = bool(self.cues) and self.recall_every.due(since)
        if recall or self.every.due(since):
            self._measure(trainer, pl_module, exposures=self.exposures, since=since, recall=recall)

    def _measure(self, trainer: Trainer, module: LightningModule, *, exposures: int, since: int, recall: bool) -> None:
        with untouched(trainer, module):
            planted, strength = self._scored(trainer, module, self._planted)
            foils = {name: self._scored(trainer, module, kind)[0] for name, kind in self._foils.items()}
            recalled = [self._recalled(module, cue) for cue in self.cues] if recall else []
        others = foils["recognition"]
        if not exposures:
            self._before = [*planted.tolist(), *others.tolist()]
        before = torch.tensor(self._before, dtype=torch.float64)
        base, base_others = before[: len(planted)], before[len(planted) :]
        scores = {
            "recognition": _less(planted, others),
            "corrected": _less(planted - base, others - base_others),
            **{name: _less(planted, kind) for name, kind in foils.items() if name != "recognition"},
            "margin": float((others - planted).sigmoid().mean()),
            "drop": float(((base - planted) - (base_others - others)).mean()),
            "loss_planted": float(planted.mean()),
            "loss_foil": float(others.mean()),
            "strength": float(strength.mean()),
        }
        for cue, found in zip_longest(self.cues, recalled, fillvalue=(math.nan,) * len(_RECALL)):
            scores |= {f"{name}_{100 * cue:g}": value for name, value in zip(_RECALL, found, strict=True)}
        data = stream_data(trainer)
        about = {"step": data.step, "experience": data.experience.index, "exposures": exposures, "since": since}
        self.rows.append({**about, **scores})
        if recall:
            self._write(trainer)
        for logger in trainer.loggers:
            shown = {f"retention/{name}": value for name, value in scores.items() if not math.isnan(value)}
            logger.log_metrics(shown, step=data.step)

    def _scored(self, trainer: Trainer, module: LightningModule, texts: list[Tensor]) -> Tensor:
        """Loss and extraction strength of each text, ``float64`` ``[2, N]`` on the CPU."""
        parts = []
        for part in _split(texts, self.eval_batch_size):
            batch = to_device(trainer, Pad()([_sample(text) for text in part]))
            parts.append(torch.stack(loss_and_strength(module, batch)))
        return torch.cat(parts, dim=1).double().cpu()

    def _recalled(self, module: LightningModule, cue: float) -> tuple[float, float, float]:
        """Of what comes after the cue: mean share of the tokens, share of texts that are whole, and mean ROUGE-L."""
        model, tokenizer = language_model(module), cast("PreTrainedTokenizerBase", self._tokenizer)
        device = model.get_input_embeddings().weight.device
        shares, rouge = [], []
        for part in _split(self._planted, self.eval_batch_size):
            cues = [text[: max(int(cue * len(text)), 1)] for text in part]
            rest = [text[len(given) :] for text, given in zip(part, cues, strict=True)]
            batch = Pad("left")([{"input_ids": given} for given in cues])
            batch.pop("position_ids", None)
            longest = max(map(len, rest))
            config = transformers().GenerationConfig(
                max_new_tokens=longest, min_new_tokens=longest, do_sample=False, use_cache=True, pad_token_id=0
            )
            inputs = {key: value.to(device) for key, value in batch.items()}
            written = write_on(model, inputs, config).cpu()[:, batch["input_ids"].shape[1] :]
            for row, right in zip(written, rest, strict=True):
                own = row[: len(right)]
                shares.append(float((own == right).double().mean()))
                rouge.append(rouge_l(str(tokenizer.decode(own)), str(tokenizer.decode(right))))
        found = torch.tensor(shares, dtype=torch.float64)
        return float(found.mean()), float((found == 1).double().mean()), sum(rouge) / len(rouge)

    @property
    def table(self) -> Retention:
        """All measurements so far."""
        return Retention.of(self.rows)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            write_atomically(self._dir / "retention.csv", self.table.text())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)
        if not trainer.is_global_zero or not self.rows:
            return
        summary = {
            name: {key: None if math.isnan(value) else value for key, value in found.items()}
            for name, found in self.table.summary().items()
        }
        about = {"at": self.at, "exposures": self.exposures, "steps": self._steps, **self._chosen}
        content = json.dumps({"scores": summary, "planting": about}, indent=2, allow_nan=False)
        write_atomically(self._dir / "retention.json", content + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._before = [dict(row) for row in state_dict["rows"]], list(state_dict["before"])


class _Texts(Dataset[Sample]):
    """Texts with a label for every token."""

    def __init__(self, texts: list[Tensor]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Sample:
        return _sample(self.texts[index])


def _sample(tokens: Tensor) -> Sample:
    return {"input_ids": tokens, "labels": tokens}


def _split(texts: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _less(a: Tensor, b: Tensor) -> float:
    """Share of pairs with the first below the second, ties half."""
    return float(((a < b).double() + 0.5 * (a == b).double()).mean())


def _schedule(given: int | Schedule | None, default: Schedule) -> Schedule:
    return default if given is None else given if isinstance(given, Schedule) else Every(given)


def _read(texts: str | Path | Sequence[str], column: str = "text") -> list[str]:
    if isinstance(texts, (str, Path)):
        texts = [text for text, _ in TextFiles([texts], column=column, separator="\n")]
    return [text for text in texts if text.strip()]


def _paraphrases(texts: str | Path | Sequence[str], given: str | Sequence[str], n: int) -> list[str]:
    if not isinstance(given, str):
        found = list(given)
    elif isinstance(texts, (str, Path)) and Path(texts).suffix != ".txt":
        found = _read(texts, given)
    else:
        raise ConfigurationError(
            f"paraphrases={given!r} names an entry of a .jsonl or column of a .parquet file, which the texts are not; "
            "give such a file, or a list of paraphrases."
        )
    if len(found) != n:
        raise ConfigurationError(f"RetentionProbe has {len(found)} paraphrases of {n} texts; give it one for each.")
    return found


def _made_of(texts: list[list[str]], material: str, rng: np.random.Generator) -> list[list[str]]:
    """Texts of as many random words of all of them, or of their own words' letters, without order."""
    if material == "words":
        words = iter(rng.permutation([word for own in texts for word in own]).tolist())
        return [[next(words) for _ in own] for own in texts]
    return [["".join(rng.permutation(list(word))) for word in rng.permutation(own)] for own in texts]
