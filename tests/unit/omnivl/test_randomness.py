import hashlib
import pickle

import numpy as np
import pytest

from omnivl.randomness import Streams, generator, stable_hash, uniforms


def documented(*key: int | str) -> np.random.Generator:
    """Philox under the 128-bit key that its definition names: BLAKE2b of the key's ``repr``, little-endian."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@pytest.mark.parametrize("key", [(0, "emoji", "mlm", 12345), (), ("größer",), (-1, 2**70)])
def test_streams_are_those_of_philox_under_the_hashed_key(key: tuple[int | str, ...]) -> None:
    mine, plain = generator(*key), documented(*key)
    assert np.array_equal(mine.random(9), plain.random(9))
    assert np.array_equal(mine.integers(1000, size=7), plain.integers(1000, size=7))
    assert np.array_equal(mine.permutation(50), plain.permutation(50))
    assert np.array_equal(mine.standard_normal(5), plain.standard_normal(5))


def test_a_generator_can_be_sent_to_another_process_in_the_middle_of_its_stream() -> None:
    original = generator(3, "sent")
    original.random(5)
    copy = pickle.loads(pickle.dumps(original))
    assert np.array_equal(copy.random(8), original.random(8))


def test_keys_tell_apart_order_and_type() -> None:
    firsts = [generator(*key).random() for key in ((1, 2), (2, 1), ("1", 2), (12,), ("12",))]
    assert len(set(firsts)) == len(firsts)


def test_a_hash_is_63_bits_of_the_digest() -> None:
    digest = hashlib.blake2b(b"('class', 'emoji')", digest_size=16).digest()
    assert stable_hash("class", "emoji") == int.from_bytes(digest, "little") % 2**63


def test_uniforms_are_a_function_of_key_and_position_alone() -> None:
    whole = uniforms(range(10, 20), 7, 3, "emoji", "mlm")
    assert whole.shape == (10, 7)
    assert (whole >= 0).all() and (whole < 1).all()
    assert len(np.unique(whole)) == whole.size
    assert np.array_equal(uniforms([17, 11, 17], 7, 3, "emoji", "mlm"), whole[[7, 1, 7]])
    assert np.array_equal(uniforms([13], 3, 3, "emoji", "mlm")[0], whole[3, :3]), "more numbers begin with the same"
    assert not np.isin(uniforms(range(10, 20), 7, 4, "emoji", "mlm"), whole).any()
    assert uniforms([], 7, 3).shape == (0, 7)


def test_uniforms_are_those_of_philox_from_the_samples_place_on() -> None:
    philox = documented(5, "vlm").bit_generator
    philox.advance(9 * 2**64)
    assert np.array_equal(uniforms([2, 9], 6, 5, "vlm")[1], np.random.Generator(philox).random(6))


def test_a_stream_begins_anew_wherever_its_generator_was_left() -> None:
    streams = Streams(5, "augment")
    whole = streams.at(3).random(6)
    streams.at(8).integers(100, size=3, dtype=np.uint32)  # leaves a half of a word and a part of a block behind
    assert np.array_equal(streams.at(3).random(6), whole)
    assert np.array_equal(Streams(5, "augment").at(3).random(6), whole)
    assert not np.isin(streams.at(4).random(6), whole).any()
    assert np.array_equal(streams.at(0).random(6), generator(5, "augment").random(6))
