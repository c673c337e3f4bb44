"""A recipe with its data, prepared once and checked before anything is written to a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from contextlm.base.errors import InputError
from contextlm.base.files import cache_folder
from contextlm.data.corpora import load_corpus
from contextlm.data.samples import Answers, Lines
from contextlm.data.synthetic import MARK, find_task
from contextlm.data.token_store import TokenStore, build_token_store, repeated_documents
from contextlm.data.tokenizers import (
    known_vocab_size,
    load_tokenizer,
    start_of_text,
    tokenizer_hash,
    vocab_entries,
)
from contextlm.data.windows import Windows
from contextlm.evaluation.memory import position_limit
from contextlm.evaluation.quality import unigram_perplexity
from contextlm.evaluation.tasks import load_tasks
from contextlm.lab.budgets import Budget, blocks_of
from contextlm.lab.embeddings import Embedding, LearningText, check_learning_text, load_pretrained
from contextlm.lab.matching import Match, matched
from contextlm.lab.pretrained import as_trained, config_of, trained_hash
from contextlm.models.base import HasContextBlock, ReadsStoredContexts
from contextlm.models.build import check_forward, meta_model
from contextlm.recipe.schema import Contender, Recipe
from contextlm.recipe.settings import TrainingSettings, TuningSettings
from contextlm.results.facts import CorpusFacts
from contextlm.training.optimisation import parameter_groups, resolve_precision, steps_per_epoch

Samples = Windows | Lines | Answers


@dataclass(frozen=True)
class Entry:
    """One contender, ready to train.

    Attributes:
        contender, training: as the recipe has them, overrides applied and widths matched.
        precision: the type that training computes in.
        config: with the tokenizer's ids.
        meta: its model on the meta device, to count and to ask.
        trained: hash of the trained model that it starts from, if it does.
        reads_store: whether phase 2 gives it the contexts of a store.
        train, validation: its samples, over the same text as all other contenders'.
        pool: `train`, and the samples behind it that budgets reach.
        budget: what it is trained on of the pool, where the recipe names budgets.
    """

    contender: Contender
    training: TrainingSettings
    precision: str
    config: PreTrainedConfig
    meta: PreTrainedModel = field(repr=False)
    reads_store: bool
    train: Samples
    validation: Samples
    pool: Samples
    budget: Budget | None = None
    trained: str | None = None

    def at(self, budget: Budget | None) -> Entry:
        """The contender, trained on this budget."""
        return replace(self, budget=budget)

    @property
    def samples(self) -> int:
        """Training samples of an epoch."""
        return len(self.train) if self.budget is None else self.budget.samples

    @property
    def windows_per_epoch(self) -> int:
        """Training samples that an epoch really uses: a dropped last batch does not count."""
        size = self.training.batch_size
        return self.samples - self.samples % size if self.training.drop_last else self.samples

    @property
    def steps(self) -> int:
        """Optimiser steps of all epochs."""
        return self.training.epochs * steps_per_epoch(self.training, self.samples)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Entries and width of its token embeddings."""
        entries, width = self.meta.get_input_embeddings().weight.shape
        return int(entries), int(width)


@dataclass(frozen=True)
class Prepared:
    """What all jobs of a recipe read.

    Attributes:
        recipe, device: what is run, and where.
        entries: its contenders by name, in the recipe's order.
        matches: what was chosen for those whose width was to be found.
        stream, validation_stream: the text behind all contenders' samples, as token ids.
        validation_documents: the validation split's documents, for `evaluation.long`.
        validation_bytes: UTF-8 bytes behind the `facts.validation_tokens` validation tokens; None
            for lines, and where tokens do not decode to the text.
        embedding: replaces the models' own, where the recipe names a pretrained one.
        learning_text: what an embedding is to be learned from, where the recipe wants that.
        budgets: the recipe's, smallest first; None alone where it names none.
        fingerprint: hashes of all of this that decides figures, by name.
    """

    recipe: Recipe
    device: torch.device
    tokenizer: PreTrainedTokenizerFast
    entries: Mapping[str, Entry]
    matches: Mapping[str, Match]
    stream: np.ndarray
    validation_stream: np.ndarray
    validation_documents: list[np.ndarray] = field(repr=False)
    validation_bytes: int | None
    facts: CorpusFacts
    embedding: Embedding | None
    learning_text: LearningText | None
    budgets: Sequence[Budget | None]
    fingerprint: Mapping[str, str]


@dataclass(frozen=True)
class _Checked:
    """A contender that fits its recipe, as far as can be told without the corpus."""

    contender: Contender
    config: PreTrainedConfig
    meta: PreTrainedModel
    training: TrainingSettings


def prepare(recipe: Recipe, device: torch.device) -> Prepared:
    """Load the corpus and the tokenizer, cut samples, and check that every contender fits them.

    What can be checked without the corpus is checked first.

    Raises:
        InputError: the recipe, its corpus or a contender is not usable; nothing was written.
        RunError: a hub is needed and cannot be reached.
    """
    if (recipe.unit == "answers") != (find_task(recipe.corpus) is not None):
        raise InputError(
            f"unit {recipe.unit!r} does not fit corpus {recipe.corpus!r}: synthetic tasks, and "
            "only they, are trained with unit 'answers'"
        )
    expected_size = recipe.vocab_size or known_vocab_size(recipe.tokenizer) or 1
    checked, matches = _check_contenders(recipe, expected_size)
    limits = recipe.documents
    corpus = load_corpus(
        recipe.corpus,
        (limits.train, limits.validation) if limits else None,
        recipe.validation,
        lines=recipe.unit == "lines",
    )
    tokenizer = load_tokenizer(recipe.tokenizer, corpus, cache_folder())
    vocab_size = _vocab_size(recipe, tokenizer)
    if vocab_size != expected_size:  # a tokenizer whose size was not known without loading it
        checked, matches = _check_contenders(recipe, vocab_size)
    ids = {"bos_token_id": start_of_text(tokenizer), "eos_token_id": int(tokenizer.eos_token_id)}
    stores = [
        build_token_store(corpus, split, tokenizer, cache_folder())
        for split in ("train", "validation")
    ]
    if recipe.evaluation.tasks:
        load_tasks(recipe.evaluation.tasks)  # what cannot be had is told before training
    train = _samples(recipe, stores[0], "train", tokenizer, checked)
    validation = _samples(recipe, stores[1], "validation", tokenizer, checked)
    pools = _pools(recipe, stores[0], tokenizer, checked, train)
    # A target farther ahead may leave a contender a sample less than the others.
    block = min(map(len, train.values()))
    budgets = _budgets(recipe, pools[recipe.baseline.name], block)
    entries = {}
    for name, fits in checked.items():
        contender = fits.contender
        training = fits.training
        entries[name] = Entry(
            contender=contender,
            training=training,
            precision=resolve_precision(training.precision, device),
            config=config_of(contender, vocab_size, **ids),
            meta=fits.meta,
            reads_store=reads_store(recipe, contender, fits.meta),
            train=train[name],
            validation=validation[name],
            pool=pools[name],
            trained=trained_hash(contender, tokenizer, corpus),
        )
        _check_steps(entries[name], recipe.tuning, budgets)
    first = entries[recipe.contenders[0].name]
    stream, validation_stream = (
        _stream(recipe, store, split, samples)
        for store, split, samples in zip(
            stores, ("train", "validation"), (first.train, first.validation), strict=True
        )
    )
    repeated, shared = repeated_documents(*stores)
    facts = CorpusFacts(
        name=corpus.name,
        tokenizer=recipe.written.get("tokenizer", recipe.tokenizer),
        vocab_size=vocab_size,
        train_tokens=len(stream),
        validation_tokens=len(validation_stream),
        train_windows=len(first.train),
        validation_windows=len(first.validation),
        sequence_length=recipe.sequence_length,
        repeated_documents=repeated,
        validation_documents_in_training=shared,
        unigram_ppl=unigram_perplexity(stream, validation_stream, vocab_size),
    )
    windows = recipe.unit == "windows"
    exact = windows and stores[1].facts.keeps_text
    learning = stream if recipe.embedding.tokens is None else stores[0].tokens
    embedding, text = _embedding(recipe, entries, tokenizer, learning, validation_stream)
    fingerprint = {
        "tokenizer": tokenizer_hash(tokenizer),
        # Samples of lines and answers may leave out what stands between them.
        "training_text": _sha256(stream) if windows else stores[0].facts.sha256,
        "validation_text": _sha256(validation_stream) if windows else stores[1].facts.sha256,
    }
    if text is not None:
        fingerprint["embedding_text"] = _sha256(text.train)
    if embedding is not None:
        fingerprint["embedding"] = _sha256(embedding.weight_VD.numpy())
    return Prepared(
        recipe=recipe,
        device=device,
        tokenizer=tokenizer,
        entries=entries,
        matches=matches,
        stream=stream,
        validation_stream=validation_stream,
        validation_documents=stores[1].documents,
        validation_bytes=stores[1].byte_count(facts.validation_tokens) if exact else None,
        facts=facts,
        embedding=embedding,
        learning_text=text,
        budgets=budgets,
        fingerprint=fingerprint,
    )


def _pools(
    recipe: Recipe,
    store: TokenStore,
    tokenizer: PreTrainedTokenizerFast,
    checked: Mapping[str, _Checked],
    train: Mapping[str, Samples],
) -> Mapping[str, Samples]:
    """The training samples that the longest budget reaches, by contender."""
    blocks = blocks_of(recipe.budgets[-1]) if recipe.budgets else 1
    if blocks == 1:
        return train
    assert recipe.budgets is not None
    if recipe.samples is None:
        raise InputError(
            f"budgets: {recipe.budgets[-1]:g} is more than all of the text: name samples.train"
        )
    if recipe.repeat_text:
        whole = _samples(
            recipe.model_copy(update={"samples": None}), store, "train", tokenizer, checked
        )
        blocks = min(blocks, min(map(len, whole.values())) // recipe.samples.train)
    more = recipe.samples.model_copy(update={"train": blocks * recipe.samples.train})
    wanted = recipe.model_copy(update={"samples": more})
    try:
        return _samples(wanted, store, "train", tokenizer, checked)
    except InputError as error:
        raise InputError(f"budgets: {recipe.budgets[-1]:g}: {error}") from None


def _budgets(recipe: Recipe, pool: Samples, block: int) -> Sequence[Budget | None]:
    """The recipe's budgets, counted on blocks of samples that every contender has."""
    if recipe.budgets is None:
        return [None]
    budgets: list[Budget] = []
    text_blocks = len(pool) // block
    for share in recipe.budgets:
        samples = round(share * block)
        if samples == 0:
            raise InputError(f"budgets: {share:g} of {block:,} training samples is none")
        if budgets and samples == budgets[-1].samples:
            raise InputError(
                f"budgets: {budgets[-1].share:g} and {share:g} of {block:,} training samples are "
                f"the same {samples:,}"
            )
        text = pool.first(min(blocks_of(share), text_blocks) * block).stream()
        passes, rest = divmod(samples, text_blocks * block)
        tokens = passes * pool.first(text_blocks * block).tokens_covered
        tokens += pool.first(rest).tokens_covered if rest else 0
        budgets.append(Budget(share, samples, block, text_blocks, _sha256(text), tokens))
    return budgets


def _embedding(
    recipe: Recipe,
    entries: Mapping[str, Entry],
    tokenizer: PreTrainedTokenizerFast,
    tokens: np.ndarray,
    validation: np.ndarray,
) -> tuple[Embedding | None, LearningText | None]:
    """Pretrained embeddings, or the text to learn some from, or neither."""
    if recipe.embedding.source == "random":
        return None, None
    shapes = {name: entry.embedding_shape for name, entry in entries.items()}
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other != shape:
            raise InputError(
                f"embedding: one table serves all contenders, but {first} needs "
                f"{shape[0]} x {shape[1]} and {name} {other[0]} x {other[1]}"
            )
    if recipe.embedding.source == "pretrained":
        return load_pretrained(recipe.embedding.path, tokenizer, *shape), None
    return None, check_learning_text(recipe.embedding, LearningText(tokens, validation, *shape))


def _stream(recipe: Recipe, store: TokenStore, split: str, samples: Samples) -> np.ndarray:
    """The text behind the samples of a split, whichever contenders there are.

    Windows count as if they predicted the next token; another target offset may take one less.
    """
    if recipe.unit != "windows":
        return samples.stream()
    return _cut(recipe, store, split, target_offset=1).stream()


def reads_store(recipe: Recipe, contender: Contender, model: PreTrainedModel) -> bool:
    """Whether phase 2 gives this contender the contexts of a store."""
    wanted = recipe.context_store is not None and contender.use_store
    return wanted and isinstance(model.base_model, ReadsStoredContexts)


def on_first_part(entry: Entry, tuning: TuningSettings) -> Entry:
    """The contender with the share of windows, and of warm-up, that tuning tries rates on.

    No fewer windows than make a batch, where an incomplete one is dropped.
    """
    assert isinstance(entry.train, Windows)  # a recipe with tuning has no lines
    fewest = entry.training.batch_size if entry.training.drop_last else 1
    wanted = max(fewest, round(tuning.share * len(entry.train)))
    warmup = round(tuning.share * entry.training.warmup)
    return replace(
        entry,
        train=entry.train.first(min(len(entry.train), wanted)),
        training=entry.training.model_copy(update={"warmup": warmup}),
    )


def _check_steps(
    entry: Entry, tuning: TuningSettings | None, budgets: Sequence[Budget | None]
) -> None:
    where = f"contenders.{entry.contender.name}"
    shortest = entry.at(budgets[0])
    if shortest.steps == 0:
        raise InputError(
            f"{where}: training.drop_last drops an incomplete batch, and {shortest.samples} "
            f"training windows do not make one batch of {entry.training.batch_size}"
        )
    trained = [(shortest, "training takes")]
    if tuning is not None:
        trained.append((on_first_part(entry, tuning), "training takes to tune a rate"))
    for part, what in trained:
        steps, before = part.steps, ""
        if part.training.schedule == "wsd":
            steps, before = part.training.stable_until(steps) + 1, " before its rate falls"
        if 0 < part.training.warmup >= steps:
            raise InputError(
                f"{where}: training.warmup {part.training.warmup} must be less than the "
                f"{steps} steps that {what}{before}"
            )


def _check_contenders(
    recipe: Recipe, vocab_size: int
) -> tuple[dict[str, _Checked], dict[str, Match]]:
    contenders, matches = matched(recipe, vocab_size)
    checked = {}
    for contender in contenders:
        try:
            checked[contender.name] = _check_contender(recipe, contender, vocab_size)
        except InputError as error:
            raise InputError(f"contenders.{contender.name}: {error}") from None
    return checked, matches


def _check_contender(recipe: Recipe, contender: Contender, vocab_size: int) -> _Checked:
    config = config_of(contender, vocab_size)
    if config.vocab_size < vocab_size:
        raise InputError(
            f"model.vocab_size {config.vocab_size} is less than the recipe's {vocab_size} entries"
        )
    model = meta_model(config)
    positions = position_limit(model)
    if positions is not None and recipe.sequence_length > positions:
        raise InputError(
            f"sequence_length {recipe.sequence_length} is more than the model's "
            f"{positions} positions"
        )
    if contender.from_ is None:
        check_forward(model)
    elif recipe.embedding.source != "random":
        raise InputError("embedding: a model `from` somewhere brings its own")
    training = recipe.training_of(contender)
    parameter_groups(as_trained(contender, model), training)
    if contender.phase1 is not None and not isinstance(model.base_model, HasContextBlock):
        raise InputError(
            f"phase1 needs a model with a context block, which {contender.model['type']!r} has not"
        )
    if reads_store(recipe, contender, model):
        _check_frozen(model)
    return _Checked(contender, config, model, training)


def _check_frozen(model: PreTrainedModel) -> None:
    """A store is right only as long as nothing that the contexts depend on learns."""
    parts = ("embed_tokens", "embed_norm", "context_block")
    for name, parameter in model.base_model.named_parameters():
        if parameter.requires_grad and name.startswith(parts):
            raise InputError(
                f"context_store: {name} learns in phase 2, which would make the stored contexts "
                "wrong: freeze it (freeze_context, freeze_embedding), or set use_store to false"
            )


def _vocab_size(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> int:
    # A BPE trained on a small corpus may end with fewer entries than were asked for; the model has
    # the size that was asked for, as `contextlm params` says.
    size = max(vocab_entries(tokenizer), known_vocab_size(recipe.tokenizer) or 0)
    if recipe.vocab_size is None:
        return size
    if recipe.vocab_size < size:
        raise InputError(
            f"vocab_size {recipe.vocab_size} is less than the {size} entries of tokenizer "
            f"{recipe.tokenizer!r}"
        )
    return recipe.vocab_size


def _samples(
    recipe: Recipe,
    store: TokenStore,
    split: str,
    tokenizer: PreTrainedTokenizerFast,
    checked: Mapping[str, _Checked],
) -> Mapping[str, Samples]:
    """The split's samples by contender, all of the same text."""
    if recipe.unit == "windows":
        return _windows(recipe, store, split, checked)
    if recipe.unit == "answers":
        answers = Answers(
            store.tokens,
            store.document_offsets,
            recipe.sequence_length,
            mark=int(tokenizer.convert_tokens_to_ids(MARK)),
            pad=int(tokenizer.pad_token_id),
            unknown=tokenizer.unk_token_id,
            samples=getattr(recipe.samples, split, None),
            name=f"corpus {recipe.corpus!r} ({split})",
        )
        return dict.fromkeys(checked, answers)
    lines = Lines(
        store.tokens,
        store.document_offsets,
        recipe.sequence_length,
        begin=start_of_text(tokenizer),
        pad=int(tokenizer.pad_token_id),
        samples=getattr(recipe.samples, split, None),
        name=f"corpus {recipe.corpus!r} ({split})",
    )
    return dict.fromkeys(checked, lines)


def _windows(
    recipe: Recipe, store: TokenStore, split: str, checked: Mapping[str, _Checked]
) -> dict[str, Windows]:
    """The split's windows by contender, cut from the same tokens.

    A recipe with a context store treats the text as one stream: the incomplete last window counts,
    and a model that reads tokens before a window gets them.
    """
    streams = recipe.context_store is not None
    windows = {}
    for contender in recipe.contenders:
        decoder = checked[contender.name].meta.base_model if streams else None
        windows[contender.name] = _cut(
            recipe,
            store,
            split,
            target_offset=recipe.target_offset_of(contender),
            history=getattr(decoder, "history_tokens", 0),
        )
    return windows


def _cut(
    recipe: Recipe, store: TokenStore, split: str, *, target_offset: int, history: int = 0
) -> Windows:
    tokens = store.tokens
    limit = getattr(recipe.tokens, split, None)
    if limit is not None:
        if len(tokens) < limit:
            raise InputError(
                f"tokens.{split}: {limit} asked for, but corpus {recipe.corpus!r} has {len(tokens)}"
            )
        tokens = tokens[:limit]
    return Windows(
        tokens,
        recipe.sequence_length,
        recipe.stride,
        target_offset,
        getattr(recipe.samples, split, None),
        history=history,
        fill=recipe.context_store is not None,
        name=f"corpus {recipe.corpus!r} ({split})",
    )


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
