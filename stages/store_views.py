"""The views of results.duckdb: what people ask of many runs, over the tables of `store_schema`.

Knows SQL text only. Runs are compared by what they are made of and not by what it was called: a model by its
fingerprint, a text by that of its tokens (another file of the same name, or another sequence length, is another text),
and where two runs hold the same measurement, the second from the cache, it counts once.
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

PERPLEXITY_BY_RATIO = f"""
WITH removed AS ({_REMOVED}), texts AS (
    SELECT run_id, if(role = 'calibration', role, substr(role, 6)) AS text,
           arg_max(fingerprint, started_at) AS text_fingerprint
    FROM stage_runs
    WHERE status = 'completed' AND (role = 'calibration' OR starts_with(role, 'text:'))
    GROUP BY ALL
), points AS (
    SELECT run_id, text, num_blocks_removed, perplexity, 1 AS choice
    FROM perplexities WHERE num_blocks_removed IS NOT NULL
    UNION ALL
    SELECT run_id, 'calibration', num_blocks_removed, perplexity, 2 FROM removed
), measured AS (
    SELECT * FROM points
    QUALIFY row_number() OVER (PARTITION BY run_id, text, num_blocks_removed ORDER BY choice) = 1
)
SELECT run_id, r.name, r.model, r.strategy, r.metric, r.block_kinds, m.text, m.num_blocks_removed,
       if(m.num_blocks_removed = 0, 0, s.ratio) AS ratio, m.perplexity, d.perplexity AS dense_perplexity,
       m.perplexity / d.perplexity AS times_dense, r.created_at, r.model_fingerprint, t.text_fingerprint,
       c.text_fingerprint AS calibration_fingerprint, r.comparison
FROM measured m
JOIN runs r USING (run_id)
LEFT JOIN texts t USING (run_id, text)
LEFT JOIN texts c ON c.run_id = m.run_id AND c.text = 'calibration'
LEFT JOIN removed s ON s.run_id = m.run_id AND s.num_blocks_removed = m.num_blocks_removed
LEFT JOIN measured d ON d.run_id = m.run_id AND d.text = m.text AND d.num_blocks_removed = 0
ORDER BY r.created_at, run_id, m.text, m.num_blocks_removed
"""
"""A row a run, text and number of removed blocks. On the calibration set that is every step of the search; on another
text the dense model and the exported one."""

_ACCURACIES = """
    SELECT run_id, tasks,
           coalesce(avg(value) FILTER (variant = 'dense' AND is_average), avg(value) FILTER (variant = 'dense'))
               AS dense_accuracy,
           coalesce(avg(value) FILTER (variant = 'pruned' AND is_average), avg(value) FILTER (variant = 'pruned'))
               AS pruned_accuracy
    FROM (
        SELECT run_id, variant, value, task = 'average' AS is_average,
               string_agg(DISTINCT task, ', ' ORDER BY task) FILTER (task <> 'average') OVER (PARTITION BY run_id)
                   AS tasks
        FROM evaluations WHERE metric IN ('acc', 'acc_norm', 'acc_norm or acc')
        QUALIFY row_number() OVER (PARTITION BY run_id, variant, task ORDER BY metric = 'acc_norm' DESC) = 1
    )
    GROUP BY ALL
"""
"""The average that the evaluation gives, as in the paper's tables; artifacts of earlier versions have none: there, the
mean over tasks of acc_norm where there is one, else acc."""

LEADERBOARD = f"""
WITH accuracies AS ({_ACCURACIES}), entries AS (
    SELECT p.*, a.dense_accuracy, a.pruned_accuracy, a.tasks, s.fingerprint AS search_fingerprint
    FROM perplexity_by_ratio p
    JOIN perplexities e ON e.run_id = p.run_id AND e.text = p.text AND e.variant = 'pruned'
                       AND e.num_blocks_removed = p.num_blocks_removed
    LEFT JOIN stage_runs s ON s.run_id = p.run_id AND s.role = 'search' AND s.status = 'completed'
    LEFT JOIN accuracies a ON a.run_id = p.run_id
), once AS (
    SELECT * FROM entries
    WINDOW same_model AS (
        PARTITION BY model_fingerprint, text, text_fingerprint, search_fingerprint, num_blocks_removed
    ), same_model_and_tasks AS (
        PARTITION BY model_fingerprint, text, text_fingerprint, search_fingerprint, num_blocks_removed, tasks
        ORDER BY created_at DESC, run_id DESC
    )
    QUALIFY row_number() OVER same_model_and_tasks = 1
        AND (tasks IS NOT NULL OR NOT bool_or(tasks IS NOT NULL) OVER same_model)
)
SELECT 1 + (
           SELECT count(DISTINCT o.run_id) FROM once o
           WHERE o.model_fingerprint = e.model_fingerprint AND o.text = e.text
             AND o.text_fingerprint IS NOT DISTINCT FROM e.text_fingerprint
             AND o.ratio >= e.ratio AND o.perplexity < e.perplexity
       ) AS rank,
       model, text, name, strategy, metric, block_kinds, num_blocks_removed, ratio, perplexity, dense_perplexity,
       times_dense, pruned_accuracy, dense_accuracy, tasks, run_id, created_at, model_fingerprint, text_fingerprint
FROM once e
ORDER BY model, text, rank, ratio DESC, run_id
"""
"""A row a pruned model and text. `rank`: one more than the runs that removed at least as many parameters of the same
model and have a lower perplexity on the same text; so that rank 1 is the best for its size."""

BLOCK_REDUNDANCY = """
WITH searches AS (
    SELECT run_id, r.model, r.model_fingerprint, r.strategy, r.metric, r.block_kinds, c.fingerprint AS calibration,
           max(s.step) AS num_steps,
           string_agg(s.block_kind || ':' || s.layer_index, ' ' ORDER BY s.step, s.layer_index, s.block_kind) || ' '
               AS pruning_order
    FROM search_steps s
    JOIN runs r USING (run_id)
    LEFT JOIN stage_runs c ON c.run_id = s.run_id AND c.role = 'calibration' AND c.status = 'completed'
    GROUP BY ALL
), distinct_searches AS (
    SELECT * FROM searches a WHERE NOT EXISTS (
        FROM searches b
        WHERE b.model_fingerprint = a.model_fingerprint AND b.calibration IS NOT DISTINCT FROM a.calibration
          AND (b.strategy, b.metric, b.block_kinds) IS NOT DISTINCT FROM (a.strategy, a.metric, a.block_kinds)
          AND starts_with(b.pruning_order, a.pruning_order)
          AND (b.num_steps, b.run_id) > (a.num_steps, a.run_id)
    )
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
FROM distinct_searches d
JOIN candidates c USING (run_id)
LEFT JOIN search_steps s ON s.run_id = c.run_id AND s.layer_index = c.layer_index AND s.block_kind = c.block_kind
GROUP BY d.model_fingerprint, d.strategy, c.layer_index, c.block_kind
ORDER BY model, d.strategy, redundancy DESC, c.layer_index, c.block_kind
"""
"""A row a model, strategy and block, over the searches in which the block could have been removed. `redundancy`: 1 if
it always goes first, 0 if it never goes; the mean over searches of K steps of 1 - (step - 1) / K. `mean_first_rank`:
its mean place among all candidates of the first step, the best where it is part of several. A search that another one
of the same settings continues counts with it."""

METHOD_COMPARISON = f"""
WITH accuracies AS ({_ACCURACIES}), removed AS ({_REMOVED}), points AS (
    SELECT p.*, floor(p.ratio * 20) / 20 AS ratio_from, v.blocks,
           if(e.run_id IS NULL, NULL, a.pruned_accuracy) AS accuracy,
           if(e.run_id IS NULL, NULL, a.tasks) AS tasks
    FROM perplexity_by_ratio p
    JOIN removed v ON v.run_id = p.run_id AND v.num_blocks_removed = p.num_blocks_removed
    LEFT JOIN perplexities e ON e.run_id = p.run_id AND e.text = p.text AND e.variant = 'pruned'
                            AND e.num_blocks_removed = p.num_blocks_removed
    LEFT JOIN accuracies a ON a.run_id = p.run_id
), firsts AS (
    SELECT * FROM points p WHERE NOT EXISTS (
        FROM points o
        WHERE o.model_fingerprint = p.model_fingerprint AND o.text = p.text AND o.ratio_from = p.ratio_from
          AND (o.text_fingerprint, o.calibration_fingerprint, o.strategy, o.metric, o.block_kinds)
              IS NOT DISTINCT FROM
              (p.text_fingerprint, p.calibration_fingerprint, p.strategy, p.metric, p.block_kinds)
          AND len(o.blocks) < len(p.blocks) AND list_has_all(p.blocks, o.blocks)
    )
), once AS (
    SELECT *, list(comparison) FILTER (comparison IS NOT NULL) OVER same AS all_comparisons
    FROM firsts
    WINDOW same AS (PARTITION BY model_fingerprint, text, text_fingerprint, strategy, metric, block_kinds, blocks)
    QUALIFY row_number() OVER (same ORDER BY accuracy IS NOT NULL DESC, created_at DESC, run_id DESC) = 1
), methods AS (
    SELECT any_value(model) AS model, text, ratio_from, strategy, metric, block_kinds, count(*) AS num_models,
           avg(ratio) AS mean_ratio, avg(num_blocks_removed) AS mean_blocks_removed,
           avg(perplexity) AS mean_perplexity, min(perplexity) AS best_perplexity, max(perplexity) AS worst_perplexity,
           avg(times_dense) AS mean_times_dense, avg(accuracy) AS mean_accuracy,
           string_agg(DISTINCT tasks, '; ' ORDER BY tasks) AS tasks,
           list_sort(list_distinct(flatten(list(coalesce(all_comparisons, []))))) AS comparisons,
           model_fingerprint, text_fingerprint
    FROM once
    GROUP BY model_fingerprint, text, text_fingerprint, ratio_from, strategy, metric, block_kinds
)
SELECT * EXCLUDE (model_fingerprint, text_fingerprint),
       mean_perplexity / max(mean_perplexity) FILTER (
           strategy = 'blockpruner' AND metric = 'perplexity' AND block_kinds = 'both'
       ) OVER (PARTITION BY model_fingerprint, text, text_fingerprint, ratio_from) AS times_blockpruner,
       model_fingerprint, text_fingerprint
FROM methods
ORDER BY model, text, text_fingerprint, ratio_from, mean_perplexity, strategy, metric, block_kinds
"""
"""A row a model, text, step of five percent of the parameters (`ratio_from` 0.2: from 20 to 25 %) and method: strategy,
metric and kinds of blocks. Of each search it takes the first model in that step; several searches of one method (seeds,
calibration sets) are averaged. `comparisons`: the names of those that the runs belong to. `times_blockpruner`: the mean
perplexity over that of the paper's method there."""

STAGE_COST = """
WITH computed AS (
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
JOIN runs r USING (run_id)
LEFT JOIN computed c ON c.stage = s.stage AND c.fingerprint = s.fingerprint AND s.cached
GROUP BY coalesce(r.model_fingerprint, r.model), r.model_fingerprint, s.stage, r.device
ORDER BY model, total_seconds DESC, s.stage, r.device
"""
"""A row a model, stage and device. `total_seconds` holds all that was spent, failures and looking into the cache
included; `saved_seconds` what the cached ones took where they were computed, less that look."""

VIEWS: Mapping[str, str] = {
    "perplexity_by_ratio": PERPLEXITY_BY_RATIO,
    "leaderboard": LEADERBOARD,
    "block_redundancy": BLOCK_REDUNDANCY,
    "method_comparison": METHOD_COMPARISON,
    "stage_cost": STAGE_COST,
}
"""The query of each view by its name; a view comes after those that it uses."""
