import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from engine.telemetry.peak import Peak
from engine.telemetry.throughput import Throughput
from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.flops import chain_flops
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch
from omnivl.data.special_tokens import SpecialTokens
from omnivl.objectives import Classify, Objective, UniVLC

MODEL = OmniVL(
    hidden_size=8,
    num_heads=2,
    image_size=8,
    video_size=8,
    patch_size=4,
    num_frames=2,
    text_length=4,
    vocab_size=20,
)


def bare_chain(objectives: Sequence[Objective]) -> Chain:
    tokens = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=20, num_reserved=5)
    with torch.device("meta"):
        return build_chain(MODEL, objectives, tokens)


def batch(num_frames: int) -> Batch:
    """Two samples with 3 and 2 words."""
    token_ids = torch.tensor([[1, 5, 2, 0], [1, 2, 0, 0]])
    numbers = torch.zeros(2, dtype=torch.int64)
    kind = "image_text" if num_frames == 1 else "video_text"
    frames = torch.zeros(2, num_frames, 3, 8, 8, dtype=torch.uint8)
    return Batch(kind, frames, token_ids, numbers, numbers, numbers)  # type: ignore[arg-type]


def test_figures_are_counts_over_time() -> None:
    objectives = (UniVLC(),)
    chain = bare_chain(objectives)
    throughput = Throughput(chain, MODEL, objectives, pad=0, replicas=3, processes=3, peak=Peak(1e9, "measured"))
    throughput.add([batch(1), batch(2)], waited=0.0)
    figures = throughput.figures(torch.device("cpu"))
    # per step, on 3 replicas: 2 + 2 samples; patches 2 * 4 and 2 * 2 * 4, words 5 and 5
    samples, tokens = 3 * 4, 3 * (8 + 16 + 5 + 5)
    flops = 3 * sum(
        chain_flops(chain, plan_layout(objectives, kind, 2, frames), text_tokens=5)
        for kind, frames in (("image_text", 1), ("video_text", 2))
    )
    seconds = figures["seconds_per_step"]
    assert abs(figures["samples_per_second"] * seconds / samples - 1) < 1e-9
    assert abs(figures["tokens_per_second"] * seconds / tokens - 1) < 1e-9
    assert abs(figures["tflops"] * 1e12 * seconds / flops - 1) < 1e-9
    assert abs(figures["mfu"] * seconds * 3e9 / flops - 1) < 1e-9  # three replicas have three peaks
    assert figures["memory_gib"] > 0.01


def test_names_of_a_list_count_with_their_own_words() -> None:
    """Of three names 3, 3 and 4 positions are read, also beside pictures without a text."""
    objectives = (Classify(names=("a", "b", "c")),)
    chain, pairs = bare_chain(objectives), batch(1)
    names = torch.tensor([[1, 5, 2, 0], [1, 6, 2, 0], [1, 7, 8, 2]])
    pictures = replace(pairs, kind="image", token_ids=None, prepared={"classify/names/token_ids": names})
    throughput = Throughput(chain, MODEL, objectives, pad=0, replicas=1, processes=1, peak=Peak(1e9, "measured"))
    throughput.add([pictures], waited=0.0)
    figures = throughput.figures(torch.device("cpu"))
    flops = chain_flops(chain, plan_layout(objectives, "image", 2, 1), text_tokens=0, listed_tokens=10)
    assert flops > chain_flops(chain, plan_layout(objectives, "image", 2, 1), text_tokens=0)
    assert abs(figures["tflops"] * 1e12 * figures["seconds_per_step"] / flops - 1) < 1e-9


def test_waiting_counts_and_pauses_do_not() -> None:
    throughput = Throughput(
        bare_chain((UniVLC(),)), MODEL, (UniVLC(),), pad=0, replicas=1, processes=1, peak=Peak(1e9, "measured")
    )
    throughput.add([batch(1)], waited=0.0)
    before = throughput.figures(torch.device("cpu"))
    throughput.restart()
    throughput.pause(-8.0)  # as if the window had begun 8 s earlier
    throughput.add([batch(1)], waited=2.0)
    figures = throughput.figures(torch.device("cpu"))
    assert before["data_wait"] == 0.0
    assert figures["save_seconds"] == 0.0
    assert abs(figures["data_wait"] - 0.25) < 0.01
    throughput.pause(6.0, saving=1.5)
    after = throughput.figures(torch.device("cpu"))
    assert abs(after["data_wait"] - 1.0) < 0.05
    assert after["save_seconds"] == 1.5


def test_cpu_seconds_are_counted_apart_from_pauses() -> None:
    throughput = Throughput(
        bare_chain((UniVLC(),)), MODEL, (UniVLC(),), pad=0, replicas=2, processes=2, peak=Peak(1e9, "measured")
    )

    def compute(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    compute(0.1)
    throughput.add([batch(1)], waited=0.0)
    compute(0.2)  # an evaluation
    throughput.pause(0.2)
    compute(0.1)
    throughput.add([batch(1)], waited=0.0)
    time.sleep(0.2)
    figures = throughput.figures(torch.device("cpu"))
    assert 0.2 <= figures["cpu_seconds_per_step"] < 0.3  # 0.2 s in two steps of each of two processes
    throughput.restart()
    throughput.add([batch(1)], waited=0.0)
    assert throughput.figures(torch.device("cpu"))["cpu_seconds_per_step"] < 0.1
