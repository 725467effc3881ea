"""Plans of BLIP-2's second stage: whose vocabulary it has, what may join late, what is refused, the published size."""

from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.plan.parse import load_plan
from engine.step.freeze import freeze, freeze_idle, store_frozen
from omnivl.architectures import BLIP2
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextInput, load_readers, load_tokenizer
from omnivl.errors import DataError

PLANS = Path(__file__).parents[4] / "configs" / "plans"
TINY, PAPER = PLANS / "blip2_tiny.yaml", PLANS / "blip2_opt.yaml"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(200))]


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return str(tmp_path / "vocab.txt")


def language_of(*changes: str) -> tuple[int, int]:
    """Rows of the words' table of the language model, and of the Q-Former."""
    model = load_plan(TINY, changes).stages[0].model
    assert isinstance(model, BLIP2)
    assert model.language is not None
    return model.language.vocab_size, model.words.vocab_size


def test_the_vocabulary_is_that_of_the_stack_s_own_tokenizer(words: str) -> None:
    own = load_tokenizer(words).special.vocab_size
    assert language_of() == (4096, 4096)
    assert language_of(f"model.language.tokenizer={words}") == (own, 4096)
    assert language_of(f"model.language.tokenizer={words}", "model.language.vocab_size=300") == (300, 4096)
    assert language_of(f"tokenizer={words}") == (own, own)


def test_a_tokenizer_that_is_not_there_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        language_of("model.language.tokenizer=nowhere.txt")
    assert "model.language.tokenizer: got 'nowhere.txt', which cannot be loaded" in str(caught.value)
    assert "name one that is there, or set model.language.vocab_size" in str(caught.value)


def test_fewer_rows_than_words_are_refused(words: str) -> None:
    own = load_tokenizer(words)
    count = own.special.vocab_size
    with pytest.raises(DataError) as caught:
        load_readers({"language": TextInput(words, 8, 100)}, own)
    assert str(caught.value) == (
        f"model.language.vocab_size: got 100 rows for a tokenizer of {count} words; allowed {count} or more; raise it, "
        "or name another model.language.tokenizer"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model.language=null",
            "stages.2.objectives.0.kind: got 'prefix_lm', which asks for the stream 'language'; allowed objectives on "
            "the streams of architecture 'blip2': visual, queries, text, embedding, fused, generation; take it out or "
            "change model.kind",
        ),
        (
            "model.language.positions=20",
            "model.language.positions: got 20; allowed 24 or more: 8 queries and 16 tokens; raise it, or lower "
            "language.length",
        ),
        (
            "stages.3.model={language: {vocab_size: 5000}}",
            "stages.3.model.language.vocab_size: got 5000 for weights of stage 'words' with 4096; allowed 4096",
        ),
        (
            "stages.3.weights={text: folder}",
            "stages.3.weights: got weights of other origin beside init_from 'words'; allowed one of the two",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(TINY, [change])
    assert message in str(caught.value)


def test_the_paper_s_second_stage_trains_what_is_published_and_keeps_the_rest_in_bf16() -> None:
    plan = load_plan(PAPER)
    first, second = plan.stages
    assert isinstance(first.model, BLIP2)
    assert first.model.language is None
    assert second.weights.folders == {"language": "data/opt-2.7b"}
    with torch.device("meta"):
        chain = build_chain(second.model, second.objectives, TOKENS)
    freeze(chain, second.freeze, "stages.1.freeze")
    freeze_idle(chain, second.layouts())
    kept = store_frozen(chain, second.model.stacks)
    trained = {
        name: sum(p.numel() for p in layer.parameters() if p.requires_grad)
        for name, layer in chain.named_layers.items()
    }
    qformer = sum(size for name, size in trained.items() if name.startswith("qformer_"))
    # The published Q-Former of the second stage, 105.14 M: without words and what follows them.
    assert qformer == 105_136_128
    embedded, mapped, norm = 32 * 768 + 2 * 768, 768 * 2560 + 2560, 2 * 1408
    assert sum(trained.values()) == qformer + embedded + mapped + norm == 107_133_696
    assert kept["language"] == 2_651_596_800 - sum(p.numel() for p in language_vectors(chain))
    assert "107.13 M" in PAPER.read_text(encoding="utf-8")


def language_vectors(chain: torch.nn.Module) -> list[torch.Tensor]:
    return [p for name, p in chain.named_parameters() if name.startswith("language_") and p.dim() == 1]
