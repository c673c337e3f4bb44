"""The model card of a checkpoint, its README.md: what it is, its data, its figures, how to load it.

The head is what Hugging Face's hub reads (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

from collections.abc import Iterator

from contextlm.lab.preparation import Entry
from contextlm.models.base import registry
from contextlm.models.build import baseline_types
from contextlm.models.outside import outside, sources
from contextlm.recipe.schema import Recipe
from contextlm.report import numbers
from contextlm.report.sheet import escape_markdown
from contextlm.results.result import Result


def model_card(result: Result, recipe: Recipe, entry: Entry) -> str:
    """The card as Markdown; it holds no times, like the result."""
    kind = result.architecture
    known = registry()
    policy = getattr(entry.config, "cache_policy", None)
    ours = kind in known or policy is not None
    origin = "contextlm" if ours else "transformers"
    about = known[kind].description if kind in known else baseline_types().get(kind, kind)
    worth = "These weights are for comparing architectures; they know no more than the text below."
    if entry.contender.from_ is not None:
        assert result.embedding is not None
        decodes = "" if policy is None else f", decoding by the cache policy {policy}"
        about = f"{result.embedding.path}{decodes}."
        towards = ", towards the original" if entry.contender.is_healed else ""
        worth = f"It was trained further with the text below{towards}."
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [contextlm, {kind}]",
        "---",
        "",
        f"# {result.contender}",
        "",
        f"`{kind}` of {origin}: {escape_markdown(about)}",
        "",
        f"A contender of the recipe `{result.recipe}` (scale {result.scale}, seed {result.seed}), "
        f"which asks: {escape_markdown(recipe.question)} {worth}",
        "",
        "## Load it",
        "",
        "```python",
        *_loading(entry, ours=ours),
        "```",
        "",
        "## Data and training",
        "",
        *(f"- {fact}" for fact in _training(result, recipe, entry)),
        "",
        "## Figures",
        "",
        "| figure | value |",
        "| :--- | ---: |",
        *(f"| {name} | {value} |" for name, value in _figures(result)),
        "",
    ]
    return "\n".join(lines)


def _loading(entry: Entry, *, ours: bool) -> Iterator[str]:
    if ours:
        yield "import contextlm"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    code = sources(entry.meta)
    if code:
        yield "from contextlm.models.outside import import_outside"
        yield ""
        for name, digest in code.items():
            file = name if outside()[name].place.is_dir() else f"{name}.py"
            yield f'import_outside(["{file}"])  # its author\'s code, sha256 {digest[:16]}...'
    yield ""
    yield 'checkpoint = "."  # this folder'
    yield "model = AutoModelForCausalLM.from_pretrained(checkpoint)"
    yield "tokenizer = AutoTokenizer.from_pretrained(checkpoint)"


def _training(result: Result, recipe: Recipe, entry: Entry) -> Iterator[str]:
    corpus, training = result.corpus, entry.training
    yield (
        f"{escape_markdown(corpus.name)}, {corpus.train_tokens:,} training and "
        f"{corpus.validation_tokens:,} validation tokens, tokenizer "
        f"{escape_markdown(corpus.tokenizer)} with {corpus.vocab_size:,} entries, "
        f"{corpus.train_windows:,} samples of {corpus.sequence_length:,} tokens"
    )
    if result.trained_tokens is not None:
        best = f"epoch {result.best_epoch} of {result.epochs} was the best"
        yield f"trained on {result.trained_tokens:,} tokens, repeats counted ({best})"
    rate = f"{result.learning_rate:g}" if result.learning_rate is not None else "?"
    yield (
        f"{training.optimizer}, highest learning rate {rate}, schedule {training.schedule}, "
        f"{training.batch_size} samples a step, {result.precision}"
    )
    if result.phase1 is not None:
        yield f"its context block was trained first, in {result.phase1.iterations} iterations"
    if result.target_offset > 1:
        yield f"it predicts the token {result.target_offset} ahead, as the document's code did"


def _figures(result: Result) -> Iterator[tuple[str, str]]:
    yield "parameters", numbers.count(result.parameters_total)
    yield "validation PPL", numbers.perplexity(result.validation_ppl)
    yield "validation loss", numbers.decimal(result.validation_loss, 4)
    if result.bits_per_byte is not None:
        yield "bits per byte", numbers.decimal(result.bits_per_byte, 3)
    yield "accuracy", numbers.percent(result.accuracy)
    if result.healing is not None:
        before, after = result.healing.before, result.healing.after
        yield "KL from the original, before training", numbers.significant(before.kl)
        yield "KL from the original", numbers.significant(after.kl)
    yield "train PPL", numbers.perplexity(result.train_ppl)
    for level in result.retrieval:
        yield f"right answers, {escape_markdown(level.level)}", numbers.percent(level.accuracy)
    for held in result.cache:
        yield f"cache at {held.tokens:,} tokens", numbers.human_bytes(held.logical)
