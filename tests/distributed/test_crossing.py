"""What crosses between pipeline stages: only what the next ones read, in the type in which it was computed."""

import json
from typing import Any

import pytest
import test_layouts as layouts

from engine.hosts.pipeline.crossing import Crossing
from engine.hosts.pipeline.packing import Packed

pytestmark = pytest.mark.distributed

STEPS = 4


def crossed(host_name: str, model_name: str) -> dict[str, Any]:
    """Worker: types and bytes of what this stage sends on, by kind of data, in the order of time."""
    model, sent = layouts.Model(model_name), dict[str, list[dict[str, Any]]]()
    send = Crossing.send_state

    def watched(crossing: Crossing, packed: Packed) -> None:
        key, entries = json.loads(packed[0].numpy().tobytes())
        types = {name: dtype for name, dtype, *_ in entries}
        sent.setdefault(key[0], []).append({"types": types, "bytes": sum(one.nbytes for one in packed)})
        send(crossing, packed)

    Crossing.send_state = watched  # type: ignore[method-assign]
    host = layouts.make_host(host_name, model)
    for step in range(STEPS):
        host.step(model.batches(step, host.gather), step)
    return sent


@pytest.mark.parametrize("host", ["pipe2-zero0", "pipe4-zero1"])
def test_only_what_is_read_crosses_after_the_first_step(run_distributed: Any, host: str) -> None:
    processes = int(host[4])
    stages = run_distributed(crossed, processes=processes, host_name=host, model_name="real-dense-spatial-bf16")
    assert stages[-1] == {}
    for stage in stages[:-1]:
        assert stage.keys() == {"image_text", "image_label"}
        for kind, sent in stage.items():
            first, last = sent[0], sent[-1]
            assert last["types"].keys() < first["types"].keys(), kind
            assert last["bytes"] < first["bytes"], kind
            assert all(one["types"] == last["types"] for one in sent[layouts.ACCUMULATION :]), kind
    # Pixels are targets of masked pictures: they cross to the stage of the losses where those are computed.
    assert "frames" in stages[0]["image_text"][0]["types"]
    assert "token_ids" not in stages[-2]["image_text"][-1]["types"]
    for name in ("visual", "text"):
        crossing = [one["types"][name] for stage in stages[:-1] for one in stage["image_text"] if name in one["types"]]
        assert set(crossing) <= {"bfloat16"}, name
