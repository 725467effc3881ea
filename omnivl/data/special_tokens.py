"""The token ids that models and objectives know by their role."""

from dataclasses import dataclass

from omnivl.errors import DataError


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

    @property
    def roles(self) -> dict[str, int]:
        """The ids by the names of their roles."""
        return {"pad": self.pad, "start": self.cls, "end": self.sep, "mask": self.mask, "[DEC]": self.decode}

    def check(self, source: str) -> None:
        """Refuses ids that cannot be told apart.

        Args:
            source: Name of the tokenizer, for messages.

        Raises:
            DataError: An id is outside of the vocabulary, padding is the start, or the mask or ``[DEC]`` is not a token
                of its own.
        """
        for role, token in self.roles.items():
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"tokenizer {source!r}: got id {token} for the {role} token; allowed are 0 to "
                    f"{self.vocab_size - 1}, the ids of its vocabulary; give it a {role} token of its vocabulary"
                )
        alone = [("pad", "start"), *((one, two) for one in ("mask", "[DEC]") for two in self.roles if one != two)]
        for one, two in alone:
            if self.roles[one] == self.roles[two]:
                raise DataError(
                    f"tokenizer {source!r}: got one token, id {self.roles[one]}, as {one} and as {two}; allowed are "
                    f"two; give it a {one} token of its own"
                )
