"""What `contextlm compress` finds of one model: a record for each policy."""

from __future__ import annotations

from contextlm.results.facts import CacheBytes, Count, Figure, Finite, Positive, Record


class Bucket(Record):
    """Targets at positions ``first`` to ``last - 1``, and their mean loss in nats."""

    first: Count
    last: Positive
    loss: Figure


class PolicyFigures(Record):
    """One policy, measured.

    Attributes:
        spec: of the policy.
        name: the policy's own name, without settings; ``window+int8`` for a stack.
        share: bytes held at the end of the text, of those of the model's own cache.
        cache: bytes held after some tokens.
        positions: losses by position in the text.
        loss: the mean over the text, in nats.
        kl: mean Kullback-Leibler divergence of the next token from the full cache's, in nats.
        same_tokens: the share of positions at which the likeliest token is the full cache's.
        passkey: for each depth (0 the beginning, 1 the end), the share of digits found.
        prefill_tokens_per_second, decode_tokens_per_second: of one sequence of the text's length.
        seconds: that measuring it took.
    """

    spec: str
    name: str
    share: Finite
    cache: list[CacheBytes]
    positions: list[Bucket]
    loss: Figure
    kl: Figure
    same_tokens: Finite
    passkey: dict[str, Finite]
    prefill_tokens_per_second: Finite
    decode_tokens_per_second: Finite
    seconds: Finite


class Compression(Record):
    """A whole measurement; the first of `policies` is the model's own cache.

    Attributes:
        model: as it was named.
        model_type: of its configuration.
        tokens: length of the text.
        budgets: shares of the cache for which settings were proposed.
        command: what repeats it.
        refused: why policies that were asked for by default cannot serve the model.
    """

    model: str
    model_type: str
    parameters: Count
    dtype: str
    corpus: str
    tokens: Positive
    calibration_tokens: Count
    budgets: list[Finite]
    command: str
    policies: list[PolicyFigures]
    refused: dict[str, str] = {}
