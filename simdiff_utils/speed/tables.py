"""What was measured beside what is possible, in the words of those who serve models, and in the columns of
llama-bench."""

import numpy as np
import pandas as pd

from simdiff_utils.speed.timing import KEYS, summarise_speed

_ONE = ["batch_size", "way", "model", "n_remove"]  # what is one model, served in one way
_PREFILL = "prefill"


def describe_speed(samples: pd.DataFrame, bounds: pd.DataFrame) -> pd.DataFrame:
    """The summary of the runs beside the bound.

    Args:
        samples: of `measure_speed`, one protocol or several.
        bounds: of `bound_phases`, with n_remove; the dense model (0) among them.

    Returns:
        the rows of `summarise_speed`, with ideal_seconds, ideal_speedup (the dense model's ideal_seconds over
        these), and share_of_bound (ideal_seconds over the seconds measured).
    """
    key = ["phase", "batch_size"]
    table = summarise_speed(samples).merge(bounds[[*key, "n_remove", "ideal_seconds"]])
    dense = bounds[bounds["n_remove"] == 0].set_index(key)["ideal_seconds"]
    table["ideal_speedup"] = table.join(dense.rename("dense"), on=key)["dense"] / table["ideal_seconds"]
    return table.assign(share_of_bound=table["ideal_seconds"] / table["seconds"])


def ideal_steps(bounds: pd.DataFrame, n_removed: int) -> dict[str, float]:
    """Seconds of one decode step at the bound, at the first batch size, by model; empty where nothing is
    decoded."""
    steps = bounds[bounds["phase"].str.startswith("decode")].drop_duplicates("n_remove").set_index("n_remove")
    seconds = steps["ideal_seconds"] / steps["n_passes"]
    return {name: seconds[n] for name, n in (("dense", 0), ("pruned", n_removed)) if n in seconds}


def over_depth(stored: pd.DataFrame, measured: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The curves that the workbook has measured (`benchmarks/speed.py`), and one run's own points beside
    them.

    Args:
        stored: rows of `describe_speed` with label, protocol and n_layers.
        measured: rows of `describe_speed`, of one batch size.
        n_layers: of the dense model measured.

    Returns:
        the rows of pruned models, eager, with label and n_layers.
    """
    longest = {_PREFILL: "prefill", "decode": "interactive"}  # the protocol that each phase is shown from
    stored = stored[stored["protocol"] == stored["phase"].map(longest)]
    here = f"this run, batch {measured['batch_size'].iloc[0]}"
    table = pd.concat([stored, measured.assign(label=here, n_layers=n_layers)])
    return table[(table["model"] == "pruned") & (table["way"] == "eager")]


def describe_serving(summary: pd.DataFrame, bounds: pd.DataFrame, rates: dict) -> pd.DataFrame:
    """TTFT, TPOT, throughput, MBU and MFU.

    Args:
        summary: of `summarise_speed`.
        bounds: of `bound_phases`, for every model of the summary.
        rates: of the machine, the fields of `bound.Rates`.

    Returns:
        one row per (batch_size, way, model, n_remove), NaN where nothing was decoded, or not every step
        timed: ttft_ms (time to the first token: prefill), tpot_ms and tpot_p99_ms (time per output token:
        median and 99th percentile of the decode's steps), end_to_end_s (both phases), tokens_per_s (decoded,
        of the whole batch), mbu (memory bandwidth utilisation: bytes that a decode step has to read, over its
        mean time and the machine's bandwidth), mfu (model FLOPs utilisation: operations of the prefill, over
        its time and the rate of a matrix product).
    """
    work = bounds.set_index(["phase", "batch_size", "n_remove"])
    rows = []
    for key, group in summary.groupby(_ONE, sort=False):
        row = dict(zip(_ONE, key, strict=True))
        phases = {phase.partition(" ")[0]: facts for phase, facts in group.set_index("phase").iterrows()}
        names = {phase.partition(" ")[0]: phase for phase in group["phase"]}
        done = {short: work.loc[names[short], row["batch_size"], row["n_remove"]] for short in names}
        prefill, decode = phases[_PREFILL], phases.get("decode")
        operations = done[_PREFILL]["operations"]
        row |= {"ttft_ms": 1000 * prefill["seconds"], "end_to_end_s": prefill["seconds"]}
        row["mfu"] = operations / prefill["seconds"] / rates["matrix_rate"]
        if decode is not None:
            of_step = done["decode"]
            step = decode["seconds"] / of_step["n_passes"]
            row["end_to_end_s"] += decode["seconds"]
            row |= {"tpot_ms": 1000 * decode["median_step"], "tpot_p99_ms": 1000 * decode["p99_step"]}
            row["tokens_per_s"] = decode["tokens_per_s"]
            row["mbu"] = (of_step["weight_bytes"] + of_step["kv_bytes"]) / step / rates["bandwidth"]
        rows.append(row)
    columns = [*_ONE, "ttft_ms", "tpot_ms", "tpot_p99_ms", "end_to_end_s", "tokens_per_s", "mbu", "mfu"]
    return pd.DataFrame(rows).reindex(columns=columns)


def as_llama_bench(samples: pd.DataFrame, facts: dict[str, object], prompt_len: int) -> pd.DataFrame:
    """Columns that llama-bench writes (`-o csv`), for whoever compares: pp512 is a row with n_prompt 512,
    tg128 one with n_gen 128.

    Args:
        samples: of `measure_speed`.
        facts: columns that say what ran, such as model_type, backends, n_threads, type_k.
        prompt_len: tokens of a prompt. A decode stands behind it (n_depth).

    Returns:
        one row per model, way, batch size and phase: the facts, model_filename, n_batch (sequences at once),
        n_prompt, n_gen, n_depth, avg_ns and stddev_ns of a run, avg_ts and stddev_ts (tokens a second).
    """
    rows = []
    for key, group in samples.groupby(KEYS, sort=False):
        named = dict(zip(KEYS, key, strict=True))
        n_tokens, writes = group["tokens"].iloc[0] // named["batch_size"], named["phase"] != _PREFILL
        nanoseconds, rate = 1e9 * group["seconds"], group["tokens_per_s"]
        rows.append(
            facts
            | {
                "model_filename": f"{named['model']}, {named['n_remove']} layers removed, {named['way']}",
                "n_batch": named["batch_size"],
                "n_prompt": 0 if writes else n_tokens,
                "n_gen": n_tokens if writes else 0,
                "n_depth": prompt_len if writes else 0,
                "avg_ns": round(nanoseconds.mean()),
                "stddev_ns": round(np.std(nanoseconds, ddof=1)) if len(group) > 1 else 0,
                "avg_ts": rate.mean(),
                "stddev_ts": np.std(rate, ddof=1) if len(group) > 1 else 0.0,
            }
        )
    return pd.DataFrame(rows)
