"""Names of attributes that a subclass of ``Monitor`` must not define."""

# Names of earlier versions -> their names now.
RENAMED = {
    "displaces": "moves_weights",
    "owes": "measures_at_end",
    "coarse": "reduced_resolution",
    "settle_for": "fit_to_budget",
    "in_retrospect": "run_summary",
    "joins": "allows_concat",
    "follows": "wants_weights",
    "follow": "on_weights",
    "forget": "reset_warm_start",
    "say_once": "warn_once",
}
# Names that a subclass must not define.
RESERVED = {
    "disabled",
    "failed",
    "history",
    "is_watched",
    "key",
    "keys",
    "loss",
    "measured",
    "must_measure",
    "prefix",
    "run_files",
    "run_rows",
    "seconds_spent",
    "skipped",
    "warn_once",
    "_bookkeeping",
}
