"""The token ids that models and objectives know by their role."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that objectives need, from the tokenizer."""

    pad: int
    cls: int
    sep: int
    mask: int
    decode: int  # [DEC], the start of the generation stream
    vocab_size: int
    num_reserved: int  # ids below this are special or unused and are never drawn as random replacements
