"""What experts have learnt, computed from a table of routed tokens. All functions take and return pandas tables.

A table of routed tokens has a row for each token, layer and choice (where experts choose: for each expert that took the
token, and none for a token that no expert took), with at least

- ``layer``, ``expert`` (int), ``choice`` (0 for the first), ``gate``, ``served`` (bool, False where the expert had no
  room), ``entropy`` (nats, of the token's probabilities);
- ``token``: equal for all rows of one token, in all layers and of all models that saw it;
- any columns that describe the token: ``modality``, ``position``, ``frame``, ``word``, ``label`` ...

All figures but co-activation and stability count first choices and further ones alike, served or not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Frame = Any
"""A ``pandas.DataFrame``."""


def expert_shares(tokens: Frame, by: str = "modality") -> Frame:
    """Of each layer and expert: number of choices, their share of the layer's, and their distribution over a column.

    Args:
        tokens: Routed tokens.
        by: A column; each of its values gets a column with its share of the expert's choices.

    Returns:
        A row for each layer and expert that got a token: ``choices``, ``load`` and a column for each value of ``by``.
    """
    counts = tokens.groupby(["layer", "expert", by], observed=True).size().unstack(by, fill_value=0)
    choices = counts.sum(axis=1)
    shares = counts.div(choices, axis=0)
    shares.insert(0, "load", choices / choices.groupby("layer").transform("sum"))
    shares.insert(0, "choices", choices)
    return shares.reset_index().rename_axis(columns=None)


def expert_table(tokens: Frame, by: str = "modality") -> Frame:
    """Of each layer and expert: the result of ``expert_shares``, and the dropped share, entropy and confidence.

    Args:
        tokens: Routed tokens.
        by: As in ``expert_shares``.

    Returns:
        A row for each layer and expert that got a token: ``choices``, ``load``; ``dropped``, the share of its choices
        that it did not serve (0 where experts choose); ``entropy``, the mean entropy in nats of the probabilities of
        the tokens that chose it; ``confidence``, the mean weight of its first choices, NaN where it has none; and a
        column for each value of ``by``.
    """
    keys = ["layer", "expert"]
    groups = tokens.groupby(keys, observed=True)
    first = tokens[tokens["choice"] == 0].groupby(keys, observed=True)
    figures = pd.DataFrame(
        {
            "dropped": 1.0 - groups["served"].mean(),
            "entropy": groups["entropy"].mean(),
            "confidence": first["gate"].mean(),
        }
    )
    shares = expert_shares(tokens, by).set_index(keys)
    return shares[["choices", "load"]].join(figures).join(shares.drop(columns=["choices", "load"])).reset_index()


def usage(tokens: Frame, num_experts: Mapping[str, int]) -> Frame:
    """Of each layer and modality: number of experts used, confidence of the router and evenness of its choices.

    Args:
        tokens: Routed tokens.
        num_experts: Experts of each layer.

    Returns:
        Columns ``layer``, ``modality``, ``tokens``; ``experts_used``, the exponential of the entropy of the choices;
        ``experts_touched``, how many got any token at all; ``confidence``, the mean weight of the first choice;
        ``local_entropy``, the mean entropy of a token's probabilities, and ``global_entropy``, that of the choices of
        all tokens, both in nats; ``evenness``, the latter over its largest value, ``log num_experts``; ``dropped``, the
        share of the choices that were not served (0 where experts choose).
    """
    rows = []
    for (layer, modality), part in tokens.groupby(["layer", "modality"], observed=True):
        shares = part["expert"].value_counts(normalize=True).to_numpy()
        spread, first = entropy_of(shares), part[part["choice"] == 0]
        rows.append(
            {
                "layer": layer,
                "modality": modality,
                "tokens": len(first),
                "experts_used": float(np.exp(spread)),
                "experts_touched": len(shares),
                "confidence": float(first["gate"].mean()),
                "local_entropy": float(first["entropy"].mean()),
                "global_entropy": spread,
                "evenness": spread / float(np.log(num_experts[layer])) if num_experts[layer] > 1 else 1.0,
                "dropped": float(1.0 - part["served"].mean()),
            }
        )
    return pd.DataFrame(rows)


def entropy_of(shares: Any) -> float:
    """Entropy in nats of shares that sum to one."""
    positive = np.asarray(shares, dtype=np.float64)
    positive = positive[positive > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum()))  # one share alone would give -0


def mutual_information(tokens: Frame, column: str) -> Frame:
    """Mutual information of a column and the expert, by layer.

    Returns:
        Columns ``layer``, ``bits`` (mutual information) and ``explained``, its share of the experts' entropy: 1 where
        the expert follows from the column, 0 where the two are independent. Counts are not corrected for the number of
            tokens: the figure is too large for a column of many rare values; compare with the same column shuffled.
    """
    rows = []
    for layer, part in tokens.dropna(subset=[column]).groupby("layer", observed=True):
        counts = pd.crosstab(part["expert"], part[column]).to_numpy(dtype=np.float64)
        joint = counts / counts.sum()
        experts, values = joint.sum(1), joint.sum(0)
        information = max(0.0, entropy_of(experts) + entropy_of(values) - entropy_of(joint.ravel()))
        spread = entropy_of(experts)
        explained = information / spread if spread else 0.0
        rows.append({"layer": layer, "bits": information / np.log(2), "explained": explained})
    return pd.DataFrame(rows)


def profiles(tokens: Frame, layer: str, by: str = "label", *, count: int = 20, min_tokens: int = 30) -> Frame:
    """Distribution of the tokens of each value of a column over a layer's experts; values that deviate most come first.

    Values of few tokens deviate by chance: raise ``min_tokens`` where tokens come in groups, as the patches of a
    picture do.

    Args:
        tokens: Routed tokens.
        layer: Which layer.
        by: The column. Rows without a value do not count.
        count: Most values to return.
        min_tokens: Fewest rows of a value.

    Returns:
        A row per value, indexed by it: ``tokens``, its number of rows; ``bits``, the Jensen-Shannon divergence of its
        shares from those of all rows, ``H((p + q) / 2) - (H(p) + H(q)) / 2``, from 0 to 1; and for each expert that got
        a token, by its number, the share of the value's rows that went there.

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37 (1), 1991, eq. 4.1.
    """
    known = tokens[(tokens["layer"] == layer) & tokens[by].notna()]
    counts = pd.crosstab(known[by], known["expert"])
    mean = counts.sum(axis=0) / max(1, len(known))
    counts = counts[counts.sum(axis=1) >= min_tokens]
    shares = counts.div(counts.sum(axis=1), axis=0)
    spread = entropy_of(mean)
    bits = [(entropy_of((row + mean) / 2) - (entropy_of(row) + spread) / 2) / np.log(2) for _, row in shares.iterrows()]
    shares.insert(0, "bits", np.maximum(np.array(bits, dtype=np.float64), 0.0))
    shares.insert(0, "tokens", counts.sum(axis=1))
    return shares.sort_values("bits", ascending=False, kind="stable").head(count).rename_axis(columns=None)


def co_activation(tokens: Frame, first: str, second: str) -> Frame:
    """The distribution of each expert's tokens over the experts of another layer (first choices); shares by row."""
    chosen = tokens[tokens["choice"] == 0].pivot(index="token", columns="layer", values="expert")
    return pd.crosstab(chosen[first], chosen[second], normalize="index")


def stability(before: Frame, after: Frame) -> Frame:
    """The share of tokens whose first expert is the same in two models, by layer.

    Returns:
        Columns ``layer``, ``tokens`` (in both tables), ``kept``, and ``by_chance``: the share for two independent
        routers with the same loads.
    """
    keys = ["layer", "token"]
    one, two = (table[table["choice"] == 0][[*keys, "expert"]] for table in (before, after))
    both = one.merge(two, on=keys, suffixes=("_before", "_after"))
    rows = []
    for layer, part in both.groupby("layer", observed=True):
        loads = [part[f"expert_{when}"].value_counts(normalize=True) for when in ("before", "after")]
        rows.append(
            {
                "layer": layer,
                "tokens": len(part),
                "kept": float((part["expert_before"] == part["expert_after"]).mean()),
                "by_chance": float(loads[0].mul(loads[1], fill_value=0.0).sum()),
            }
        )
    return pd.DataFrame(rows)


def strongest(tokens: Frame, layer: str, expert: int, columns: Sequence[str], count: int = 20) -> Frame:
    """The tokens that an expert takes with the highest weight, no two with equal ``columns``."""
    own = tokens[(tokens["layer"] == layer) & (tokens["expert"] == expert)].sort_values("gate", ascending=False)
    return own.drop_duplicates(subset=list(columns)).head(count).reset_index(drop=True)
