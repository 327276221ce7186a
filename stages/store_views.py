"""The views of results.duckdb: what people ask of many runs, over the tables of `store_schema`.

Knows SQL text only. Runs are compared by what they are made of and not by what it was called: a model by its
fingerprint, a text by its tokens (another file of the same name, or another sequence length, is another text), a search
by everything but how far it goes; and where two runs hold the same measurement, the second from the cache, it counts
once.
"""

from __future__ import annotations

from collections.abc import Mapping

_REMOVED = """
    SELECT DISTINCT run_id, step, count(*) OVER so_far AS num_blocks_removed, perplexity, ratio,
           list_sort(list(block_kind || ':' || layer_index) OVER so_far) AS blocks
    FROM search_steps
    WINDOW so_far AS (PARTITION BY run_id ORDER BY step)
"""
"""A row a step: what is gone once it is done. A step may take several blocks, and then has a row in search_steps for
each."""

_NAMED = """
    SELECT * REPLACE (
        first_value(model) OVER (
            PARTITION BY coalesce(model_fingerprint, model) ORDER BY created_at, run_id
        ) AS model
    ) FROM runs
"""
"""The runs, with each model by the name that its first run gave it: typed otherwise it is still one model."""

PERPLEXITY_BY_RATIO = f"""
WITH named AS ({_NAMED}), removed AS ({_REMOVED}), texts AS (
    SELECT run_id, starts_with(role, 'external:') AS is_external,
           regexp_replace(role, '^(external:)?(text:)?', '') AS text,
           arg_max(coalesce(token_digest, fingerprint), started_at) AS text_fingerprint
    FROM stage_runs
    WHERE status = 'completed' AND stage = 'calibrate'
    GROUP BY ALL
), points AS (
    SELECT run_id, p.text, p.variant, p.num_blocks_removed, p.perplexity, 1 AS choice
    FROM perplexities p JOIN runs r USING (run_id)
    WHERE p.num_blocks_removed IS NOT NULL OR r.external IS NOT NULL
    UNION ALL
    SELECT run_id, 'calibration', 'pruned', num_blocks_removed, perplexity, 2 FROM removed
), measured AS (
    SELECT p.*, coalesce(x.text_fingerprint, t.text_fingerprint) AS text_fingerprint
    FROM points p
    LEFT JOIN texts t ON t.run_id = p.run_id AND t.text = p.text AND NOT t.is_external
    LEFT JOIN texts x ON x.run_id = p.run_id AND x.text = p.text AND x.is_external AND p.variant = 'pruned'
    QUALIFY row_number() OVER (PARTITION BY p.run_id, p.text, p.num_blocks_removed ORDER BY p.choice) = 1
)
SELECT run_id, r.name, r.model, r.strategy, r.metric, r.block_kinds, r.settings, m.text, m.num_blocks_removed,
       CASE WHEN m.num_blocks_removed = 0 THEN 0
            WHEN r.external IS NOT NULL THEN 1 - r.num_parameters_left / r.num_parameters
            ELSE s.ratio END AS ratio,
       m.perplexity, d.perplexity AS dense_perplexity, m.perplexity / d.perplexity AS times_dense, r.created_at,
       r.model_fingerprint, m.text_fingerprint, c.text_fingerprint AS calibration_fingerprint, r.comparison,
       coalesce(r.search_family, r.pruned_fingerprint, r.external) AS search_family
FROM measured m
JOIN named r USING (run_id)
LEFT JOIN texts c ON c.run_id = m.run_id AND c.text = 'calibration' AND NOT c.is_external
LEFT JOIN removed s ON s.run_id = m.run_id AND s.num_blocks_removed = m.num_blocks_removed
LEFT JOIN measured d ON d.run_id = m.run_id AND d.text = m.text AND d.num_blocks_removed = 0
                    AND d.text_fingerprint IS NOT DISTINCT FROM m.text_fingerprint
ORDER BY r.created_at, run_id, m.text, m.num_blocks_removed
"""
"""A row a run, text and number of removed blocks. On the calibration set that is every step of the search; on another
text the dense model and the exported one. A model that was pruned elsewhere has no number of blocks; where its own
tokenizer cuts a text into other tokens, that is another text, with which the dense perplexity cannot be compared.
`search_family` is the same for searches of which one is the start of the other; of a model that was pruned elsewhere
it stands for the model."""

ACCURACIES = """
SELECT run_id, string_agg(DISTINCT name, ', ' ORDER BY name) FILTER (NOT is_average) AS tasks,
       greatest(sum(num_examples) FILTER (variant = 'dense' AND NOT is_average),
                sum(num_examples) FILTER (variant = 'pruned' AND NOT is_average)) AS num_questions,
       coalesce(avg(value) FILTER (variant = 'dense' AND is_average), avg(value) FILTER (variant = 'dense'))
           AS dense_accuracy,
       coalesce(avg(value) FILTER (variant = 'pruned' AND is_average), avg(value) FILTER (variant = 'pruned'))
           AS pruned_accuracy
FROM (
    SELECT *, metric = 'acc_norm or acc' AS is_average,
           task || if(num_fewshot > 0, ' (' || num_fewshot || '-shot)', '') AS name
    FROM evaluations
    WHERE split_part(metric, ',', 1) IN ('acc', 'acc_norm', 'acc_norm or acc')
    QUALIFY row_number() OVER (
        PARTITION BY run_id, variant, task ORDER BY split_part(metric, ',', 1) = 'acc_norm' DESC, rowid
    ) = 1
)
GROUP BY run_id
"""
"""A row a run that measured tasks: which (with how many examples in the prompt), with how many questions in all, and
the mean accuracies. A task counts with acc_norm where it has one, else acc. The mean is the one that the evaluation
gives, as in the paper's tables; artifacts of earlier versions have none: there, that over the tasks."""

LEADERBOARD = """
WITH entries AS (
    SELECT p.*, a.* EXCLUDE (run_id),
           coalesce(r.pruned_fingerprint,
                    min(r.pruned_fingerprint) OVER (PARTITION BY p.search_family, p.num_blocks_removed),
                    p.search_family || ' ' || p.num_blocks_removed) AS pruned_model
    FROM perplexity_by_ratio p
    JOIN runs r USING (run_id)
    JOIN perplexities e ON e.run_id = p.run_id AND e.text = p.text AND e.variant = 'pruned'
                       AND e.num_blocks_removed IS NOT DISTINCT FROM p.num_blocks_removed
    LEFT JOIN accuracies a ON a.run_id = p.run_id
), once AS (
    SELECT * FROM entries
    WINDOW same_model AS (PARTITION BY model_fingerprint, text, text_fingerprint, search_family, pruned_model),
    same_model_and_tasks AS (
        PARTITION BY model_fingerprint, text, text_fingerprint, search_family, pruned_model, tasks, num_questions
        ORDER BY created_at DESC, run_id DESC
    )
    QUALIFY row_number() OVER same_model_and_tasks = 1
        AND (tasks IS NOT NULL OR NOT bool_or(tasks IS NOT NULL) OVER same_model)
)
SELECT if(ratio IS NULL, NULL, 1 + (
           SELECT count(DISTINCT o.pruned_model) FROM once o
           WHERE o.model_fingerprint = e.model_fingerprint AND o.text = e.text
             AND o.text_fingerprint IS NOT DISTINCT FROM e.text_fingerprint
             AND o.ratio >= e.ratio AND o.perplexity < e.perplexity AND o.pruned_model <> e.pruned_model
       )) AS rank,
       model, text, name, strategy, metric, block_kinds, settings, num_blocks_removed, ratio, perplexity,
       dense_perplexity, times_dense, pruned_accuracy, dense_accuracy, tasks, num_questions, run_id, created_at,
       model_fingerprint, text_fingerprint, pruned_model
FROM once e
ORDER BY model, text, rank, ratio DESC, run_id
"""
"""A row a pruned model, text and set of tasks, for each search that led to it. `rank`: one more than the models that
lack at least as many parameters of the same model and have a lower perplexity on the same text, each counted once; so
that rank 1 is the best for its size. `pruned_model`: its content, or where it was not evaluated its search and
length."""

BLOCK_REDUNDANCY = f"""
WITH named AS ({_NAMED}), searches AS (
    SELECT run_id, r.model, r.model_fingerprint, r.strategy, max(s.step) AS num_steps
    FROM search_steps s
    JOIN named r USING (run_id)
    WHERE r.strategy IS DISTINCT FROM 'laco'
    GROUP BY run_id, r.model, r.model_fingerprint, r.strategy, r.search_family
    QUALIFY row_number() OVER (PARTITION BY r.search_family ORDER BY num_steps DESC, run_id DESC) = 1
), candidates AS (
    SELECT run_id, layer_index, block_kind, min(rank) AS first_rank
    FROM (
        SELECT run_id, layer_index, block_kind, rank FROM block_scores WHERE step = 1
        UNION ALL
        SELECT run_id, layer_index, block_kind, NULL FROM search_steps
    )
    GROUP BY ALL
)
SELECT any_value(d.model) AS model, d.strategy, c.layer_index, c.block_kind, count(*) AS num_searches,
       count(s.step) AS num_removed, min(s.step) AS first_step, avg(s.step) AS mean_step,
       avg(if(s.step IS NULL, 0, 1 - (s.step - 1) / d.num_steps)) AS redundancy,
       avg(c.first_rank) AS mean_first_rank, d.model_fingerprint
FROM searches d
JOIN candidates c USING (run_id)
LEFT JOIN search_steps s ON s.run_id = c.run_id AND s.layer_index = c.layer_index AND s.block_kind = c.block_kind
GROUP BY d.model_fingerprint, d.strategy, c.layer_index, c.block_kind
ORDER BY model, d.strategy, redundancy DESC, c.layer_index, c.block_kind
"""
"""A row a model, strategy and block, over the searches in which the block could have been removed. `redundancy`: 1 if
it always goes first, 0 if it never goes; the mean over searches of K steps of 1 - (step - 1) / K. `mean_first_rank`:
its mean place among all candidates of the first step, the best where it is part of several. A search that another one
continues counts with it. LaCo is not here: it merges layers, and tries them from the top down whatever they do."""

METHOD_COMPARISON = f"""
WITH removed AS ({_REMOVED}), points AS (
    SELECT p.*, floor(p.ratio * 20) / 20 AS ratio_from, a.tasks, a.num_questions, a.pruned_accuracy AS accuracy,
           if(p.metric = 'chance' OR s.blocks IS NULL, [p.search_family], s.blocks) AS outcome
    FROM perplexity_by_ratio p
    LEFT JOIN removed s ON s.run_id = p.run_id AND s.num_blocks_removed = p.num_blocks_removed
    LEFT JOIN perplexities e ON e.run_id = p.run_id AND e.text = p.text AND e.variant = 'pruned'
                            AND e.num_blocks_removed IS NOT DISTINCT FROM p.num_blocks_removed
    LEFT JOIN accuracies a ON a.run_id = e.run_id
    WHERE p.num_blocks_removed IS DISTINCT FROM 0 AND p.ratio IS NOT NULL
), task_sets AS (
    SELECT model_fingerprint, text, text_fingerprint, ratio_from, tasks, num_questions
    FROM points WHERE accuracy IS NOT NULL
    GROUP BY model_fingerprint, text, text_fingerprint, ratio_from, tasks, num_questions
    QUALIFY row_number() OVER (
        PARTITION BY model_fingerprint, text, text_fingerprint, ratio_from
        ORDER BY count(DISTINCT search_family) DESC, num_questions DESC, tasks
    ) = 1
), comparable AS (
    SELECT p.* REPLACE (if(s.tasks IS NULL, NULL, p.accuracy) AS accuracy)
    FROM points p
    LEFT JOIN task_sets s ON (s.model_fingerprint, s.text, s.text_fingerprint, s.ratio_from, s.tasks, s.num_questions)
        IS NOT DISTINCT FROM (p.model_fingerprint, p.text, p.text_fingerprint, p.ratio_from, p.tasks, p.num_questions)
), firsts AS (
    SELECT * FROM comparable
    WINDOW way AS (PARTITION BY model_fingerprint, text, text_fingerprint, search_family, ratio_from)
    QUALIFY num_blocks_removed IS NOT DISTINCT FROM min(num_blocks_removed) OVER way
), once AS (
    SELECT *, list(comparison) FILTER (comparison IS NOT NULL) OVER same AS all_comparisons
    FROM firsts
    WINDOW same AS (
        PARTITION BY model_fingerprint, text, text_fingerprint, ratio_from, strategy, metric, block_kinds, settings,
                     calibration_fingerprint, outcome
    )
    QUALIFY row_number() OVER (same ORDER BY accuracy IS NOT NULL DESC, created_at DESC, run_id DESC) = 1
), methods AS (
    SELECT any_value(model) AS model, text, ratio_from, strategy, metric, block_kinds, settings,
           count(*) AS num_models, avg(ratio) AS mean_ratio, avg(num_blocks_removed) AS mean_blocks_removed,
           avg(perplexity) AS mean_perplexity, min(perplexity) AS best_perplexity, max(perplexity) AS worst_perplexity,
           avg(times_dense) AS mean_times_dense, avg(accuracy) AS mean_accuracy,
           any_value(tasks) FILTER (accuracy IS NOT NULL) AS tasks,
           any_value(num_questions) FILTER (accuracy IS NOT NULL) AS num_questions,
           list_sort(list_distinct(flatten(list(coalesce(all_comparisons, []))))) AS comparisons,
           model_fingerprint, text_fingerprint
    FROM once
    GROUP BY model_fingerprint, text, text_fingerprint, ratio_from, strategy, metric, block_kinds, settings
)
SELECT * EXCLUDE (model_fingerprint, text_fingerprint),
       mean_perplexity / max(mean_perplexity) FILTER (
           strategy = 'blockpruner' AND metric = 'perplexity' AND block_kinds = 'both' AND settings IS NULL
       ) OVER (PARTITION BY model_fingerprint, text, text_fingerprint, ratio_from) AS times_blockpruner,
       model_fingerprint, text_fingerprint
FROM methods
ORDER BY model, text, text_fingerprint, ratio_from, mean_perplexity, strategy, metric, block_kinds, settings
"""
"""A row a model, text, step of five percent of the parameters (`ratio_from` 0.2: from 20 to 25 %) and method: strategy,
metric, kinds of blocks and its other settings. Of each search it takes the first model in that step. Several draws and
calibration sets are averaged; where searches on one calibration set reach one model (stock-compatible ones to several
targets, of which none is the start of another), it counts once. `mean_accuracy` is over one set of tasks, the one that
most models of that step were measured on, so that it can be compared. `comparisons`: the names of those that the runs
belong to. `times_blockpruner`: the mean perplexity over that of the paper's method there."""

STAGE_COST = f"""
WITH named AS ({_NAMED}), computed AS (
    SELECT stage, fingerprint, max(seconds) AS seconds FROM stage_runs
    WHERE status = 'completed' AND NOT cached
    GROUP BY ALL
)
SELECT any_value(r.model) AS model, s.stage, r.device,
       count(*) FILTER (s.status = 'completed' AND NOT s.cached) AS num_computed,
       count(*) FILTER (s.status = 'completed' AND s.cached) AS num_cached,
       count(*) FILTER (s.status = 'failed') AS num_failed,
       sum(s.seconds) AS total_seconds,
       avg(s.seconds) FILTER (s.status = 'completed' AND NOT s.cached) AS mean_seconds,
       max(s.seconds) FILTER (s.status = 'completed' AND NOT s.cached) AS longest_seconds,
       coalesce(sum(greatest(c.seconds - s.seconds, 0)) FILTER (s.cached), 0) AS saved_seconds,
       r.model_fingerprint
FROM stage_runs s
JOIN named r USING (run_id)
LEFT JOIN computed c ON c.stage = s.stage AND c.fingerprint = s.fingerprint AND s.cached
GROUP BY coalesce(r.model_fingerprint, r.model), r.model_fingerprint, s.stage, r.device
ORDER BY model, total_seconds DESC, s.stage, r.device
"""
"""A row a model, stage and device. `total_seconds` holds all that was spent, failures and looking into the cache
included; `saved_seconds` what the cached ones took where they were computed, less that look."""

VIEWS: Mapping[str, str] = {
    "perplexity_by_ratio": PERPLEXITY_BY_RATIO,
    "accuracies": ACCURACIES,
    "leaderboard": LEADERBOARD,
    "block_redundancy": BLOCK_REDUNDANCY,
    "method_comparison": METHOD_COMPARISON,
    "stage_cost": STAGE_COST,
}
"""The query of each view by its name; a view comes after those that it uses."""
