"""Checks of sizes that many architectures have."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from moe.config import (
    AttributeConfig,
    DenseConfig,
    FeedForwardConfig,
    MoMEConfig,
    MoMELIMoEConfig,
    SparseConfig,
    named_modalities,
)
from omnivl.errors import Misfit, did_you_mean
from omnivl.parts.language import LanguageModel
from omnivl.parts.sizes import MODALITIES, MomentumConfig, Transformer


def divisions(pairs: Mapping[str, tuple[int, str, int]]) -> Iterator[Misfit]:
    """Numbers that are not multiples of their divisors.

    Args:
        pairs: By path with dots: the number, the name of its divisor, the divisor.
    """
    for path, (value, divisor, by) in pairs.items():
        if by >= 1 and value % by:
            yield Misfit(tuple(path.split(".")), str(value), f"a multiple of {divisor} {by}", "change either")


def stack_misfits(name: str, stack: Transformer) -> Iterator[Misfit]:
    """Options of a stack, a configuration's field ``name``, that do not fit together."""
    yield from divisions({f"{name}.hidden_size": (stack.hidden_size, "num_heads", stack.num_heads)})
    if stack.layers < 1:
        yield Misfit((name, "layers"), str(stack.layers), "1 or more", "raise it, e.g. to 12")
    for found in filling_misfits(stack, {"layers": stack.layers}):
        yield replace(found, path=(name, *found.path))


def activation_misfits(name: str, stack: Transformer) -> Iterator[Misfit]:
    """An activation that a stack's experts do not have; the stack is a configuration's field ``name``."""
    if stack.activation != "gelu" and not isinstance(stack.ffn, DenseConfig | MoMEConfig):
        got = f"{stack.activation!r} with ffn kind {stack.ffn.kind!r}"
        allowed = "'gelu' where there are sparse or attribute experts"
        yield Misfit((name, "activation"), got, allowed, "set it to 'gelu'")


def norm_misfits(name: str, stack: Transformer, norm: str, where: str) -> Iterator[Misfit]:
    """Another order of norms than the only one; the stack is a configuration's field ``name``.

    Args:
        name: See above.
        stack: The stack.
        norm: The order that there is.
        where: Where that is so, such as ``'blip'``.
    """
    if stack.norm != norm:
        yield Misfit((*name.split("."), "norm"), repr(stack.norm), f"{norm!r} in {where}", f"set it to {norm!r}")


def dense_misfits(name: str, stack: Transformer, where: str, note: str = "") -> Iterator[Misfit]:
    """Experts in a stack that has none; arguments as those of ``norm_misfits``. ``note`` follows the remedy."""
    if not isinstance(stack.ffn, DenseConfig):
        path = (*name.split("."), "ffn", "kind")
        yield Misfit(path, repr(stack.ffn.kind), f"'dense' in {where}", f"set it to 'dense'{note}")


def reading_misfits(name: str, stack: Transformer) -> Iterator[Misfit]:
    """Options that blocks which read texts lack; the stack is a configuration's field ``name``."""
    for option, still in (("drop_path", 0.0), ("layer_scale_init", None)):
        if (value := getattr(stack, option)) != still:
            allowed = "0" if still == 0.0 else "null"
            yield Misfit((name, option), str(value), allowed, "blocks that read texts have none")


def native_misfits(kind: str, sizes: str) -> Iterator[Misfit]:
    """Pictures of their own sizes, in an architecture, called ``kind`` in plans, that takes them as squares only."""
    if sizes == "native":
        yield Misfit(("sizes",), "'native'", f"'fixed' or 'stretched' in {kind!r}", "set it to 'fixed'")


def twin_misfits(kind: str, momentum: MomentumConfig | None) -> Iterator[Misfit]:
    """Momentum twins of an architecture, called ``kind`` in plans, that has none."""
    if momentum is not None:
        yield Misfit(("momentum",), "momentum twins", f"null in {kind!r}, which has none", "set it to null")


def language_misfits(language: LanguageModel, num_queries: int) -> Iterator[Misfit]:
    """Options of a language model, a configuration's field ``language``, that do not fit together.

    Args:
        language: Its sizes.
        num_queries: Positions before the tokens.
    """
    blocks, longest = language.blocks, num_queries + language.length
    for found in stack_misfits("blocks", blocks):
        yield replace(found, path=("language", *found.path))
    yield from norm_misfits("language.blocks", blocks, "pre", "a language model")
    yield from dense_misfits("language.blocks", blocks, "a language model")
    if longest > language.positions:
        allowed = f"{longest} or more: {num_queries} queries and {language.length} tokens"
        yield Misfit(("language", "positions"), str(language.positions), allowed, "raise it, or lower language.length")


def filling_misfits(stack: Transformer, depths: Mapping[str, int]) -> Iterator[Misfit]:
    """Options of fillings that do not fit together, in stacks that differ only in depth.

    Args:
        stack: One of them.
        depths: Their numbers of blocks, by the fields that give them.
    """
    ffn, inner = stack.ffn, stack.inner_size
    if inner < 1:
        yield Misfit(("mlp_ratio",), f"{stack.mlp_ratio:g}", "1 / hidden_size or more", "raise it, e.g. to 4")
    elif isinstance(ffn, SparseConfig) and round(inner * ffn.expert_ratio) < 1:
        allowed = f"1 / {inner} or more, {inner} being the inner size of a dense layer"
        yield Misfit(("ffn", "expert_ratio"), f"{ffn.expert_ratio:g}", allowed, "raise it, e.g. to 1")
    yield from _modality_misfits(ffn)
    yield from _place_misfits(ffn, depths)


def _modality_misfits(ffn: FeedForwardConfig) -> Iterator[Misfit]:
    """Modalities that a filling names but do not exist, and missing pools."""
    known = ", ".join(map(repr, MODALITIES))
    for named, names in named_modalities(ffn).items():
        for name in names:
            if name not in MODALITIES:
                change = did_you_mean(name, MODALITIES, "choose one of these")
                yield Misfit(("ffn", *named.split(".")), repr(name), known, change)
    if isinstance(ffn, MoMELIMoEConfig) and ffn.common_experts < ffn.router.fewest_experts:
        for name in MODALITIES:
            if name not in ffn.pools:
                got = f"no pool for {name} and {ffn.common_experts} common experts"
                allowed = f"{ffn.router.fewest_experts} or more, as many as a token needs"
                yield Misfit(("ffn", "pools"), got, allowed, "give it a pool or raise common_experts")


def _place_misfits(ffn: FeedForwardConfig, depths: Mapping[str, int]) -> Iterator[Misfit]:
    """Blocks that are named as places of experts but not every stack that has blocks has."""
    blocks = ffn.blocks if isinstance(ffn, SparseConfig | AttributeConfig) else None
    built = {name: depth for name, depth in depths.items() if depth > 0}
    if blocks is None or not built:
        return
    shortest = min(built, key=lambda name: built[name])
    depth = built[shortest]
    for block in blocks:
        if not -depth <= block < depth:
            allowed = f"{-depth} to {depth - 1}, the blocks of {depth} {shortest}"
            yield Misfit(("ffn", "blocks"), str(block), allowed, "name another block or build more")
    if len({block % depth for block in blocks}) < len(blocks):
        got = f"{list(blocks)} with {depth} {shortest}"
        yield Misfit(("ffn", "blocks"), got, "each block once", "take out those that are named from both ends")
