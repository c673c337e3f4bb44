"""One file a question, which prints a table, then one JSON line. Nothing here imports torch."""

# The questions of `contextlm bench`; the module that answers one has its name, with underscores.
QUESTIONS = {
    "scan": "How fast are the recurrences on each backend?",
    "train-step": "How fast do compressed models train beside attention of their size?",
    "context-kv": "What does attention in dilated windows gain over fetching each context?",
    "phase1": "What does projecting each vocabulary entry once gain?",
    "head": "What does computing a head's loss block by block gain?",
    "decode": "How fast is a token after a short and after a long text?",
    "prefill": "How fast is a long prompt read?",
    "stream": "Does memory stay constant over a million tokens?",
}
